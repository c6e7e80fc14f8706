"""What a client sees while it waits: a real relay, owner and queue; replicas come and go as the test says."""

import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest
from aiohttp import web

from platform_helpers import KEY, REVISION, replica_route, route
from snowdrop.domain.errors import RevisionFailedError
from snowdrop.domain.ids import ReplicaId
from snowdrop.domain.replica import ReplicaState
from snowdrop.domain.service import QueueSpec
from snowdrop.gateway.app import build_app
from snowdrop.gateway.broker import LocalBroker
from snowdrop.gateway.carrier import Carrier
from snowdrop.gateway.edge.server import serving
from snowdrop.gateway.effects import Now
from snowdrop.gateway.owner import Owner
from snowdrop.gateway.queue import QueueCore
from snowdrop.gateway.relay import Relay
from snowdrop.gateway.upstream.pool import Upstreams
from snowdrop.wire.control import DeploymentRoute, Parked, RouteChanged, Routes, StartingReplica
from snowdrop.wire.http import serving_unix

pytestmark = pytest.mark.anyio
WAIT_S_MAX = 10.0
EVENTS = {"accept": "text/event-stream"}
SOON = QueueSpec(progress_first_s=0.0, progress_every_s=0.1)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Bench:
    """One deployment, `embed`, and control's part played by the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.core = QueueCore(keys_required=False)
        self.owner = Owner(self.core, "gw")
        self.client: aiohttp.ClientSession
        self.seen: list[web.Request] = []
        self.demands = 0
        self.owner.connected(self)
        self.publish(route(queue=SOON))

    def send_soon(self, message: object) -> None: ...

    def load_changed(self) -> None:
        self.demands += 1

    def publish(self, table: DeploymentRoute) -> None:
        self.owner.from_control(Routes(generation=1, deployments=(table,)))

    def change(self, table: DeploymentRoute) -> None:
        self.owner.from_control(RouteChanged(generation=2, tenant=KEY[0], deployment=KEY[1], route=table))

    @asynccontextmanager
    async def replica(self, handler: Handler) -> AsyncIterator[DeploymentRoute]:
        """A replica that is up but that nobody knows of yet; the route that says so."""

        async def noted(request: web.Request) -> web.StreamResponse:
            self.seen.append(request)
            return await handler(request)

        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", noted)
        path = self.folder / "r.sock"
        async with serving_unix(app, path):
            yield route(replica_route(socket_path=str(path), concurrency=1, ready=1), queue=SOON)

    async def until(self, condition: Callable[[], bool]) -> None:
        with anyio.fail_after(WAIT_S_MAX):
            while not condition():
                await anyio.sleep(0.001)

    async def one_waits(self) -> None:
        await self.until(lambda: self.core.gauges()[0].queued == 1)

    def tick(self, seconds: float) -> None:
        """Time passes for the queue."""
        now = anyio.current_time() + seconds
        self.owner._carry_out(self.core.tick(Now(now, int(now * 1e9))))


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    upstreams = Upstreams()
    relay = Relay(Carrier(LocalBroker(made.owner, "w-0"), upstreams), request_bytes_max=1 << 20)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "gw.sock"))
    async with serving(build_app(relay, ready=lambda: True), listener, shutdown_s_max=WAIT_S_MAX):
        connector = aiohttp.UnixConnector(path=str(tmp_path / "gw.sock"))
        timeout = aiohttp.ClientTimeout(total=WAIT_S_MAX)
        async with aiohttp.ClientSession("http://gw", connector=connector, timeout=timeout) as made.client:
            yield made
            await made.until(lambda: not made.core.busy)
    upstreams.close()


def starting(**more: Any) -> DeploymentRoute:
    """A route whose only replica is loading."""
    one = StartingReplica(
        replica=ReplicaId("rep-1"), revision=REVISION, state=ReplicaState.LOADING, ordered_unix_ns=0
    )
    return route(queue=SOON, starting=1, coming=(one,), **more)


async def events(request: web.Request) -> web.StreamResponse:
    answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await answer.prepare(request)
    await answer.write(b'data: {"n": 1}\n\ndata: {"n": 2}\n\n')
    return answer


def fields_of(comment: str) -> dict[str, str]:
    assert comment.startswith(": snowdrop ")
    return dict(part.split("=") for part in comment.removeprefix(": snowdrop ").split())


async def test_a_stream_that_waits_is_told_soon_and_again_and_then_gets_its_events(bench: Bench) -> None:
    bench.change(starting(start_s=60.0))
    async with bench.replica(events) as ready:
        async with bench.client.get("/embed/x", headers=EVENTS) as answer:
            assert (answer.status, answer.content_type) == (200, "text/event-stream")
            comments = [(await answer.content.readuntil(b"\n\n")).decode().strip() for _ in range(3)]
            assert not bench.seen
            bench.change(ready)
            rest = (await answer.read()).decode()
        told = [fields_of(comment) for comment in comments]
        assert {each["phase"] for each in told} == {"startup"}
        assert {each["position"] for each in told} == {"0"}
        for each in told:
            assert "percent" not in each or 0 <= int(each["percent"]) < 100
        *more, last = [part for part in rest.split("\n\n") if part.startswith(":")]
        assert fields_of(last)["phase"] == "answer"
        assert all(fields_of(each)["phase"] == "startup" for each in more)
        assert [part for part in rest.split("\n\n") if part and not part.startswith(":")] == [
            'data: {"n": 1}',
            'data: {"n": 2}',
        ]


async def test_the_expected_time_comes_nearer_between_the_owners_words(bench: Bench) -> None:
    bench.change(route(queue=SOON, start_s=50.0))
    async with bench.replica(events) as ready, bench.client.get("/embed/x", headers=EVENTS) as answer:
        told = [fields_of((await answer.content.readuntil(b"\n\n")).decode().strip()) for _ in range(2)]
        first, second = [float(each["expected_s"]) for each in told]
        assert 0 < second <= first <= 50.0
        assert told[0]["phase"] == "activate"
        bench.change(ready)
        await answer.read()


async def test_a_plain_request_gets_no_early_bytes_and_its_own_status(bench: Bench) -> None:
    async def teapot(_request: web.Request) -> web.Response:
        return web.Response(status=418, text="short and stout")

    async with bench.replica(teapot) as ready, anyio.create_task_group() as tasks:
        answers: list[tuple[int, str]] = []

        async def ask(accept: str) -> None:
            async with bench.client.get("/embed/x", headers={"accept": accept}) as answer:
                answers.append((answer.status, await answer.text()))

        tasks.start_soon(ask, "*/*")
        tasks.start_soon(ask, "application/json, text/event-stream")
        await bench.until(lambda: bench.core.gauges()[0].queued == 2)
        bench.tick(0.5)
        bench.change(ready)
        await bench.until(lambda: len(answers) == 2)
        assert answers == [(418, "short and stout")] * 2


async def test_a_failure_after_comments_is_an_error_event_and_the_stream_ends_well(bench: Bench) -> None:
    async with bench.client.get("/embed/x", headers=EVENTS) as answer:
        await answer.content.readuntil(b"\n\n")
        bench.change(route(queue=SOON, refusal=RevisionFailedError("it does not start").body()))
        rest = (await answer.read()).decode()
    *_, last = rest.strip().split("\n\n")
    event, data = last.split("\n")
    assert event == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["kind"] == "revision_failed"


@pytest.mark.parametrize(("status", "name"), [(200, ""), (422, "event: error\n")])
async def test_another_answer_than_a_stream_becomes_one_event(bench: Bench, status: int, name: str) -> None:
    async def answer_json(_request: web.Request) -> web.Response:
        return web.Response(status=status, text='{"a":\n1}', content_type="application/json")

    async with bench.replica(answer_json) as ready, bench.client.get("/embed/x", headers=EVENTS) as answer:
        await answer.content.readuntil(b"\n\n")
        bench.change(ready)
        rest = (await answer.read()).decode()
    *_, last = rest.strip().split("\n\n")
    assert last + "\n" == f'{name}data: {{"a":\ndata: 1}}\n'


async def test_an_answer_too_large_for_an_event_is_said_to_be_and_not_held(bench: Bench) -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"content-type": "application/octet-stream"})
        await answer.prepare(request)
        while True:
            await answer.write(bytes(1 << 16))
            await anyio.sleep(0)

    async with bench.replica(endless) as ready, bench.client.get("/embed/x", headers=EVENTS) as answer:
        await answer.content.readuntil(b"\n\n")
        bench.change(ready)
        rest = (await answer.read()).decode()
    assert len(rest) < 10_000
    *_, last = rest.strip().split("\n\n")
    assert json.loads(last.removeprefix("event: error\ndata: "))["error"]["kind"] == "too_large"


async def test_head_gets_no_comments(bench: Bench) -> None:
    async def hello(_request: web.Request) -> web.Response:
        return web.Response(headers={"x-own": "1"})

    async with bench.replica(hello) as ready, anyio.create_task_group() as tasks:

        async def ask() -> None:
            async with bench.client.head("/embed/x", headers=EVENTS) as answer:
                assert (answer.status, answer.headers["x-own"]) == (200, "1")

        tasks.start_soon(ask)
        await bench.one_waits()
        bench.tick(2.0)
        bench.change(ready)


async def test_a_stream_that_need_not_wait_has_the_status_and_headers_of_the_service(bench: Bench) -> None:
    async def refuse(_request: web.Request) -> web.Response:
        return web.Response(status=422, text="no", headers={"x-own": "1"})

    async with bench.replica(refuse) as ready:
        bench.change(ready)
        async with bench.client.get("/embed/x", headers=EVENTS) as answer:
            assert (answer.status, await answer.text(), answer.headers["x-own"]) == (422, "no", "1")


async def test_comments_can_be_turned_off(bench: Bench) -> None:
    off = QueueSpec(progress_first_s=None)
    bench.change(route(queue=off))
    async with bench.replica(events) as ready, anyio.create_task_group() as tasks:

        async def ask() -> None:
            async with bench.client.get("/embed/x", headers=EVENTS) as answer:
                assert b": snowdrop" not in await answer.read()

        tasks.start_soon(ask)
        await bench.one_waits()
        bench.tick(2.0)
        bench.change(ready)


@pytest.mark.parametrize("accept", ["text/event-stream", "*/*"])
async def test_a_client_that_goes_while_it_waits_leaves_the_queue(bench: Bench, accept: str) -> None:
    async with anyio.create_task_group() as tasks:

        async def ask() -> None:
            async with bench.client.get("/embed/x", headers={"accept": accept}) as answer:
                await answer.read()

        tasks.start_soon(ask)
        await bench.one_waits()
        tasks.cancel_scope.cancel()
    await bench.until(lambda: not bench.core.busy)
    (gone,) = bench.core.waits.take()
    assert (gone.outcome, gone.reason) == ("gone", "no replica was ready or starting")
    assert not bench.seen


async def test_a_bound_on_waiting_is_kept_and_said(bench: Bench) -> None:
    bench.change(route(queue=SOON, start_s=40.0))
    async with anyio.create_task_group() as tasks:

        async def ask() -> None:
            async with bench.client.get("/embed/x", headers={"prefer": "wait=7, handling=lenient"}) as answer:
                assert answer.status == 503
                assert answer.headers["preference-applied"] == "wait=7"
                # As long a wait as this one will do in 40 - 7 seconds.
                assert 1 <= int(answer.headers["retry-after"]) <= 33
                error = (await answer.json())["error"]
            assert error["kind"] == "waited_too_long"
            assert "7 s" in error["where"]

        tasks.start_soon(ask)
        await bench.one_waits()
        bench.tick(6.0)
        assert bench.core.gauges()[0].queued == 1
        bench.tick(8.0)


@pytest.mark.parametrize("prefer", ["wait=x", "wait", "wait=-1", "wait=1.5", 'wait="oops', ""])
async def test_a_preference_that_cannot_be_read_is_as_if_it_were_not_there(bench: Bench, prefer: str) -> None:
    async def hello(_request: web.Request) -> web.Response:
        return web.Response(text="hello")

    async with bench.replica(hello) as ready:
        bench.change(ready)
        async with bench.client.get("/embed/x", headers={"prefer": prefer}) as answer:
            assert answer.status == 200
            assert "preference-applied" not in answer.headers


@pytest.mark.parametrize(
    "headers", [{"snowdrop-priority": "high"}, {"snowdrop-timeout": "soon"}, {"snowdrop-deadline": "nan"}]
)
async def test_own_headers_that_make_no_sense_are_refused(bench: Bench, headers: dict[str, str]) -> None:
    async with bench.client.get("/embed/x", headers=headers) as answer:
        assert answer.status == 422
        assert next(iter(headers)) in (await answer.json())["error"]["where"]


async def test_the_clients_own_deadline_bounds_the_answer_and_goes_on_to_the_replica(bench: Bench) -> None:
    async def never(_request: web.Request) -> web.Response:
        await anyio.sleep_forever()
        raise AssertionError

    async with bench.replica(never) as ready:
        bench.change(ready)
        async with bench.client.get("/embed/x", headers={"snowdrop-timeout": "0.2"}) as answer:
            assert answer.status == 504
            assert "snowdrop-timeout" in (await answer.json())["error"]["where"]
    assert float(bench.seen[0].headers["snowdrop-deadline"]) > 0


@pytest.mark.parametrize("parked", [False, True])
async def test_a_deadline_that_comes_in_the_queue_is_504_and_says_what_it_waited_for(
    bench: Bench, parked: bool
) -> None:
    failed = RevisionFailedError("it does not start").body()
    waits_too = Parked(error=failed, next_try_unix_ns=0, wait_s_max=600.0)
    bench.change(route(queue=SOON, parked=waits_too if parked else None))
    async with anyio.create_task_group() as tasks:

        async def ask() -> None:
            headers = {"snowdrop-timeout": "7", "prefer": "wait=500"}
            async with bench.client.get("/embed/x", headers=headers) as answer:
                assert answer.status == 504
                error = (await answer.json())["error"]
            assert (error["kind"], error["where"]) == ("timed_out", "header snowdrop-timeout or snowdrop-deadline")
            assert ("it does not start" if parked else "no replica was ready") in error["message"]

        tasks.start_soon(ask)
        await bench.one_waits()
        bench.tick(6.0)
        assert bench.core.gauges()[0].queued == 1
        bench.tick(8.0)
    assert [wait.outcome for wait in bench.core.waits.take()] == ["too_long"]


async def test_nothing_is_started_for_a_deadline_that_has_passed(bench: Bench) -> None:
    async with bench.replica(events) as ready:
        bench.change(ready)
        async with bench.client.get("/embed/x", headers={"snowdrop-deadline": "1.0"}) as answer:
            assert answer.status == 504
    assert not bench.seen


class TestReadyz:
    async def test_looking_wakes_nothing(self, bench: Bench) -> None:
        demands = bench.demands
        for method in ("GET", "HEAD"):
            async with bench.client.request(method, "/embed/readyz") as answer:
                assert answer.status == 503
                assert "retry-after" not in answer.headers
                body = json.loads(await answer.read() or b"{}")
            assert not body or (body["phase"], body["ready"]) == ("asleep", False)
        assert bench.demands == demands
        assert bench.core.loads(Now(1.0, 1))[0].queued == 0

    async def test_activating_wakes_as_a_request_does_until_a_replica_is_ready(self, bench: Bench) -> None:
        demands = bench.demands
        bench.change(route(queue=SOON, start_s=12.0))
        async with bench.client.head("/embed/readyz?activate=true") as answer:
            assert (answer.status, answer.headers["retry-after"]) == (503, "12")
        assert bench.demands == demands + 1
        (load,) = bench.core.loads(Now(1.0, 1))
        assert (load.queued, load.in_flight) == (1, 0)
        bench.change(starting(start_s=12.0))
        async with bench.client.get("/embed/readyz") as answer:
            body = await answer.json()
        assert (body["phase"], body["replicas"]["starting"]) == ("startup", 1)
        async with bench.replica(events) as ready:
            bench.change(ready)
            async with bench.client.get("/embed/readyz") as answer:
                assert answer.status == 200
                body = await answer.json()
        assert (body["ready"], body["slots"], body["expected_s"]) == (True, 1, 0)
        (load,) = bench.core.loads(Now(2.0, 2))
        assert load.queued == 0

    async def test_it_waits_if_asked(self, bench: Bench) -> None:
        async with bench.replica(events) as ready, anyio.create_task_group() as tasks:

            async def ask() -> None:
                headers = {"prefer": "wait=9"}
                async with bench.client.get("/embed/readyz?activate=true", headers=headers) as answer:
                    assert (answer.status, answer.headers["preference-applied"]) == (200, "wait=9")

            tasks.start_soon(ask)
            await bench.until(lambda: bench.core.loads(Now(1.0, 1))[0].queued == 1)
            bench.change(ready)

    async def test_a_service_that_answers_there_itself_does(self, bench: Bench) -> None:
        async def own(_request: web.Request) -> web.Response:
            return web.Response(text="mine")

        async with bench.replica(own) as ready:
            (only,) = ready.replicas
            bench.change(route(only, queue=SOON, own_readyz=True))
            async with bench.client.get("/embed/readyz") as answer:
                assert await answer.text() == "mine"

    async def test_errors_are_said(self, bench: Bench) -> None:
        async with bench.client.get("/nobody/readyz") as answer:
            assert answer.status == 404
        async with bench.client.get("/embed/readyz?activate=maybe") as answer:
            assert answer.status == 422
        bench.change(route(queue=SOON, refusal=RevisionFailedError("it does not start").body()))
        async with bench.client.get("/embed/readyz?activate=true") as answer:
            assert answer.status == 503
            assert (await answer.json())["error"]["kind"] == "revision_failed"

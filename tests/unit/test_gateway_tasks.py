"""Tasks at the gateway: the dispatcher against control's real API, and the edge that passes on."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import aiohttp
import anyio
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from multidict import CIMultiDict

from snowdrop.domain.errors import (
    InvalidInputError,
    QueueFullError,
    ReplicaDiedError,
    SnowdropError,
    UnauthorisedError,
)
from snowdrop.domain.ids import TaskId
from snowdrop.domain.task import Task, TaskState
from snowdrop.gateway.app import build_app
from snowdrop.gateway.call import Call, Sink
from snowdrop.gateway.carrier import Carrier
from snowdrop.gateway.relay import Relay
from snowdrop.gateway.tasks import dispatcher as dispatcher_module
from snowdrop.gateway.tasks.client import TaskControl
from snowdrop.gateway.tasks.dispatcher import Dispatcher
from snowdrop.gateway.tasks.edge import TaskEdge
from snowdrop.gateway.tasks.spool import MEMORY_BYTES_MAX
from snowdrop.wire.slots import Granted, Speaker
from task_world import KEY, TaskWorld

pytestmark = pytest.mark.anyio
GRANTED = cast("Granted", object())
Work = Callable[[Call, Sink], Any]


class FakeBroker:
    """Knows one deployment that speaks OpenAI's dialect, of every caller but one."""

    async def speakers(self, key_sha256: str | None) -> tuple[Speaker, ...]:
        if key_sha256 is not None:
            raise UnauthorisedError("unknown API key")
        speaks = Speaker(tenant=KEY[0], deployment=KEY[1], paths=("/v1/chat/completions",), created_unix_s=1)
        return (speaks,)


class FakeCarrier:
    """Does what the test says in place of queue, slot and replica."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.calls: list[Call] = []
        self.broker = FakeBroker()

    async def carry(self, call: Call, sink: Sink) -> None:
        self.calls.append(call)
        call.granted = GRANTED
        await self.work(call, sink)


async def body_of(call: Call) -> bytes:
    return b"".join([chunk async for chunk in call.body.stream()])


async def echoes(call: Call, sink: Sink) -> None:
    await sink.whole(200, CIMultiDict({"content-type": "application/json"}), await body_of(call))


@contextlib.asynccontextmanager
async def platform(
    tmp_path: Path, work: Work, *, shutdown_s_max: float = 5.0, **settings: Any
) -> AsyncIterator[tuple[TaskWorld, aiohttp.ClientSession, FakeCarrier]]:
    world = TaskWorld(tmp_path, **settings)
    await world.deployed(slots=8)
    carrier = FakeCarrier(work)
    control = TaskControl(str(world.socket))
    made = Dispatcher(
        control, cast("Carrier", carrier), world.queue.settings, holder="g1", spool=tmp_path / "spool"
    )
    async with world.serving() as http, control.open(), anyio.create_task_group() as tasks:

        async def dispatch() -> None:
            await made.run(shutdown_s_max=shutdown_s_max)

        tasks.start_soon(dispatch)
        yield world, http, carrier
        tasks.cancel_scope.cancel()


async def submit(http: aiohttp.ClientSession, body: Any = 1, **more: Any) -> TaskId:
    async with http.post("/v1/tasks", json={"deployment": "embed", "path": "/x", "body": body, **more}) as answer:
        return TaskId((await answer.json())["id"])


async def ended(world: TaskWorld, name: TaskId) -> Task:
    with anyio.fail_after(10):
        return await world.queue.get(KEY[0], name, wait_s=10)


async def state_is(world: TaskWorld, name: TaskId, state: TaskState) -> Task:
    with anyio.fail_after(10):
        while True:
            task = await world.queue.get(KEY[0], name)
            if task.state is state:
                return task
            await anyio.sleep(0.01)


async def test_a_task_is_an_ordinary_call_of_its_tenant_with_the_least_priority(tmp_path: Path) -> None:
    async with platform(tmp_path, echoes) as (world, http, carrier):
        task = await ended(world, await submit(http, {"a": 1}, headers={"x-y": "z"}, timeout_s=30))
        assert (task.state, task.answer and task.answer.status) == (TaskState.SUCCEEDED, 200)
        (call,) = carrier.calls
        assert (call.kind, call.caller.tenant, call.caller.key_sha256) == ("task", KEY[0], None)
        assert (call.deployment, call.method, call.target, call.headers["x-y"]) == ("embed", "POST", "/x", "z")
        assert call.headers["snowdrop-task"] == task.id
        assert call.wait.priority is not None
        assert call.wait.priority < 0
        assert call.deadline_unix_s is not None


@pytest.mark.parametrize("size", [10, 200_000, MEMORY_BYTES_MAX + 10])
async def test_bodies_of_any_size_come_back_as_they_were(tmp_path: Path, size: int) -> None:
    async with platform(tmp_path, echoes) as (world, http, _carrier):
        name = await submit(http, "y" * size)
        await ended(world, name)
        async with http.get(f"/v1/tasks/{name}/result") as answer:
            assert len(await answer.json()) == size


async def test_what_the_service_saw_counts_and_what_it_did_not_see_does_not(tmp_path: Path) -> None:
    async def work(call: Call, sink: Sink) -> None:
        number = len(carrier.calls)
        if number == 1:
            call.granted = None
            raise QueueFullError("full", retry_after_s=0.0)
        if number == 2:
            raise ReplicaDiedError("it died")
        await sink.whole(200, CIMultiDict(), b"1")

    async with platform(tmp_path, work) as (world, http, carrier):
        name = await submit(http, attempts_max=2)
        with anyio.fail_after(10):
            while not (task := await world.queue.get(KEY[0], name)).ended:
                if task.due_unix_ns > world.clock.wall_ns():  # it pauses: the pause is over
                    world.clock.s = task.due_unix_ns / 1e9 + 1
                    await world.queue.look()
                await anyio.sleep(0.01)
        assert (task.state, task.attempts, task.generation) == (TaskState.SUCCEEDED, 2, 3)


@pytest.mark.parametrize(
    ("status", "state"), [(200, TaskState.SUCCEEDED), (422, TaskState.FAILED), (503, TaskState.QUEUED)]
)
async def test_an_answers_status_decides(tmp_path: Path, status: int, state: TaskState) -> None:
    async def work(_call: Call, sink: Sink) -> None:
        await sink.whole(status, CIMultiDict({"retry-after": "120"}), b"{}")

    async with platform(tmp_path, work) as (world, http, _carrier):
        name = await submit(http)
        with anyio.fail_after(5):
            while not (task := await world.queue.get(KEY[0], name)).history[1:]:
                await anyio.sleep(0.01)
        assert task.state is state
        if state is TaskState.QUEUED:
            assert task.due_unix_ns - world.clock.wall_ns() == 120 * 10**9


async def test_an_answer_that_breaks_off_is_no_answer(tmp_path: Path) -> None:
    async def work(_call: Call, sink: Sink) -> None:
        await sink.begin(200, CIMultiDict(), None)
        await sink.write(b"half")
        await sink.broken(ReplicaDiedError("it died"))

    async with platform(tmp_path, work) as (world, http, _carrier):
        task = await ended(world, await submit(http, attempts_max=1))
        assert (task.state, task.answer) == (TaskState.FAILED, None)
        assert task.error is not None
        assert task.error.kind == "replica_died"


async def test_an_answer_too_large_to_keep_fails_by_name(tmp_path: Path) -> None:
    async def work(_call: Call, sink: Sink) -> None:
        try:
            await sink.begin(200, CIMultiDict(), None)
            await sink.write(b"x" * 11)
        except SnowdropError as error:  # as the carrier does
            await sink.broken(error)

    async with platform(tmp_path, work, result_bytes_max=10) as (world, http, _carrier):
        task = await ended(world, await submit(http))
        assert task.error is not None
        assert (task.state, task.error.where) == (TaskState.FAILED, "tasks.result_bytes_max=10")


async def test_cancelling_a_task_cancels_its_call(tmp_path: Path) -> None:
    cancelled = anyio.Event()

    async def work(_call: Call, _sink: Sink) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.set()

    async with platform(tmp_path, work) as (world, http, _carrier):
        name = await submit(http)
        await state_is(world, name, TaskState.RUNNING)
        async with http.delete(f"/v1/tasks/{name}"):
            pass
        with anyio.fail_after(5):
            await cancelled.wait()
        assert (await world.queue.get(KEY[0], name)).state is TaskState.CANCELLED


async def test_a_gateway_that_stops_hands_back_what_it_cannot_end(tmp_path: Path) -> None:
    async def work(_call: Call, _sink: Sink) -> None:
        await anyio.sleep_forever()

    world = TaskWorld(tmp_path)
    await world.deployed()
    control = TaskControl(str(world.socket))
    made = Dispatcher(
        control, cast("Carrier", FakeCarrier(work)), world.queue.settings, holder="g1", spool=tmp_path / "spool"
    )
    async with world.serving() as http, control.open():
        async with anyio.create_task_group() as tasks:

            async def dispatch() -> None:
                await made.run(shutdown_s_max=0.0)

            tasks.start_soon(dispatch)
            name = await submit(http)
            await state_is(world, name, TaskState.RUNNING)
            tasks.cancel_scope.cancel()
        task = await world.queue.get(KEY[0], name)
        assert (task.state, task.attempts) == (TaskState.QUEUED, 0)
        assert task.due_unix_ns <= world.clock.wall_ns(), "another one may take it at once"


async def test_an_answer_waits_for_a_control_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher_module, "AWAY_S", 0.01)
    go_on = anyio.Event()

    async def work(_call: Call, sink: Sink) -> None:
        await go_on.wait()
        await sink.whole(200, CIMultiDict(), b"kept")

    world = TaskWorld(tmp_path)
    await world.deployed()
    control = TaskControl(str(world.socket))
    made = Dispatcher(
        control, cast("Carrier", FakeCarrier(work)), world.queue.settings, holder="g1", spool=tmp_path / "spool"
    )
    async with control.open(), anyio.create_task_group() as tasks:

        async def dispatch() -> None:
            await made.run(shutdown_s_max=0.0)

        tasks.start_soon(dispatch)
        async with world.serving() as http:
            name = await submit(http)
            await state_is(world, name, TaskState.RUNNING)
        go_on.set()
        await anyio.sleep(0.05)
        assert (await world.queue.get(KEY[0], name)).state is TaskState.RUNNING
        async with world.serving() as http:
            await ended(world, name)
            async with http.get(f"/v1/tasks/{name}/result") as answer:
                assert await answer.read() == b"kept"
        tasks.cancel_scope.cancel()


# --- the edge -------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def edge(control_socket: Path) -> AsyncIterator[aiohttp.ClientSession]:
    control = TaskControl(str(control_socket))

    async def never(_call: Call, _sink: Sink) -> None:
        raise AssertionError("a task is not relayed")

    relay = Relay(cast("Carrier", FakeCarrier(never)), request_bytes_max=10 << 20)
    async with control.open():
        app = build_app(relay, ready=lambda: True, tasks=TaskEdge(control))
        server = TestServer(app)
        await server.start_server()
        try:
            async with aiohttp.ClientSession(server.make_url("/")) as session:
                yield session
        finally:
            await server.close()


async def test_prefer_respond_async_makes_a_task_of_any_request(tmp_path: Path) -> None:
    async with platform(tmp_path, echoes) as (world, _http, carrier), edge(world.socket) as client:
        headers = {"prefer": "respond-async", "idempotency-key": "k", "x-own": "1"}
        for _ in range(2):
            async with client.put("/embed/some/where?a=%20b", data=b"z" * 100_000, headers=headers) as answer:
                assert answer.status == 202
                assert answer.headers["preference-applied"] == "respond-async"
                name = (await answer.json())["id"]
        await ended(world, TaskId(name))
        (call,) = carrier.calls
        assert (call.method, call.target, call.headers["x-own"]) == ("PUT", "/some/where?a=%20b", "1")
        assert not {"prefer", "idempotency-key", "authorization"} & {header.lower() for header in call.headers}
        async with client.get(f"/v1/tasks/{name}/result") as answer:
            assert await answer.read() == b"z" * 100_000


async def test_a_request_with_many_headers_becomes_a_task_too(tmp_path: Path) -> None:
    many = {f"x-{number}": "v" * 1_000 for number in range(12)}
    async with platform(tmp_path, echoes) as (_world, _http, carrier), edge(_world.socket) as client:
        async with client.post("/embed/x?wait", headers={"prefer": "respond-async, wait=20", **many}) as answer:
            assert answer.status == 200
        assert carrier.calls[0].headers["x-11"] == "v" * 1_000
        async with client.post("/embed/x", headers={"prefer": "respond-async", "x-own": "\u00e9"}) as answer:
            assert answer.status == 422


async def test_with_a_wait_the_answer_itself_if_it_comes_in_time_else_the_task(tmp_path: Path) -> None:
    go_on = anyio.Event()

    async def work(call: Call, sink: Sink) -> None:
        if call.target == "/slow":
            await go_on.wait()
        await sink.whole(201, CIMultiDict({"content-type": "text/plain"}), b"here")

    async with platform(tmp_path, work) as (world, _http, _carrier), edge(world.socket) as client:
        async with client.post("/embed/quick", headers={"prefer": "respond-async, wait=20"}) as answer:
            assert (answer.status, await answer.read()) == (201, b"here")
            assert answer.headers["preference-applied"] == "respond-async, wait=20"
        async with client.post("/embed/slow", headers={"prefer": "respond-async, wait=1"}) as answer:
            assert answer.status == 202
            name = (await answer.json())["id"]
        go_on.set()
        async with client.get(f"/v1/tasks/{name}/result?wait=20") as answer:
            assert (answer.status, await answer.read()) == (201, b"here")


async def test_a_request_of_openai_becomes_a_task_only_for_a_model_that_can_do_it(tmp_path: Path) -> None:
    prefer = {"prefer": "respond-async, wait=20"}
    chat = "/v1/chat/completions"

    async def work(_call: Call, _sink: Sink) -> None:
        raise InvalidInputError("no such field", where="stop", fields=[{"field": "stop", "problem": "bad"}])

    async with platform(tmp_path, work) as (world, _http, carrier), edge(world.socket) as client:
        wanted: list[tuple[str, dict[str, Any], dict[str, str], int, str | None, str | None]] = [
            (chat, {"model": "nowhere"}, {}, 404, "model_not_found", "model"),
            ("/v1/embeddings", {"model": "embed"}, {}, 404, "model_not_found", "model"),
            (chat, {"model": "embed"}, {"authorization": "Bearer sd_wrong"}, 401, "invalid_api_key", None),
            (chat, {"model": "embed"}, {"snowdrop-webhook": "ftp://x"}, 400, None, None),
        ]
        for path, body, headers, status, code, param in wanted:
            async with client.post(path, json=body, headers={**prefer, **headers}) as answer:
                error = (await answer.json())["error"]
                assert (answer.status, error["code"], error["param"]) == (status, code, param)
                assert error["type"] == "invalid_request_error"
        assert carrier.calls == []
        async with client.post(chat, json={"model": "embed"}, headers=prefer) as answer:
            assert (answer.status, answer.headers["snowdrop-task-state"]) == (400, "failed")
            error = (await answer.json())["error"]
            assert (error["type"], error["param"]) == ("invalid_request_error", "stop")
            assert answer.headers["x-should-retry"] == "false"


async def test_without_control_a_submission_is_refused_with_the_time_to_come_back(tmp_path: Path) -> None:
    async with edge(tmp_path / "nobody.sock") as client:
        for path, headers in (("/v1/tasks", {}), ("/embed/x", {"prefer": "respond-async"})):
            async with client.post(path, json={"deployment": "embed"}, headers=headers) as answer:
                assert answer.status == 503
                assert answer.headers["retry-after"] == "1"
                assert (await answer.json())["error"]["kind"] == "platform_down"


async def test_an_answer_of_control_that_ends_early_does_not_look_complete(tmp_path: Path) -> None:
    async def cut(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        answer.content_length = 100
        await answer.prepare(request)
        await answer.write(b"half")
        assert request.transport is not None
        request.transport.close()
        return answer

    app = web.Application()
    app.router.add_get("/v1/tasks", cut)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "c.sock")).start()
    try:
        async with edge(tmp_path / "c.sock") as client:
            with pytest.raises(aiohttp.ClientError):
                async with client.get("/v1/tasks") as answer:
                    await answer.read()
    finally:
        await runner.cleanup()

"""The relay between a client and a replica on a unix socket, with slots from a broker that counts."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import anyio
import anyio.abc
import pytest
from aiohttp import web

from platform_helpers import replica_route
from snowdrop.domain.errors import QueueFullError
from snowdrop.domain.ids import ReceiptId, ReplicaId
from snowdrop.domain.receipt import CallerTimes, Span
from snowdrop.gateway.app import build_app
from snowdrop.gateway.broker import TakeNews
from snowdrop.gateway.call import Call
from snowdrop.gateway.carrier import Carrier
from snowdrop.gateway.edge.server import serving
from snowdrop.gateway.relay import Relay
from snowdrop.gateway.upstream.pool import Upstreams
from snowdrop.tenancy.keys import key_sha256
from snowdrop.wire.http import serving_unix
from snowdrop.wire.slots import Granted, Outcome

pytestmark = pytest.mark.anyio
WAIT_S_MAX = 10.0
BODY_BYTES_MAX = 1 << 19
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Broker:
    """Grants the sockets it is given in turn, and counts what comes back."""

    def __init__(self) -> None:
        self.sockets: list[str] = []
        self.out: dict[int, Granted] = {}
        self.asked: list[tuple[str | None, str]] = []
        self.unreached: list[str] = []
        self.callers: list[tuple[ReceiptId, CallerTimes]] = []
        self.request_s_max = 30.0
        self.cold = False
        self.refusal: Exception | None = None

    async def acquire(self, call: Call, news: TakeNews | None = None) -> Granted:
        arrived_unix_ns = call.arrived_unix_ns
        self.asked.append((call.caller.key_sha256, call.deployment))
        if self.refusal is not None:
            raise self.refusal
        number = len(self.asked)
        now = time.time_ns()
        spans = (Span(name="startup", start_unix_ns=arrived_unix_ns, end_unix_ns=now),)
        granted = Granted(
            ticket=number,
            lease=number,
            replica=ReplicaId(f"rep-{number}"),
            socket_path=self.sockets.pop(0) if len(self.sockets) > 1 else self.sockets[0],
            request_s_max=self.request_s_max,
            granted_unix_ns=now,
            receipt=replica_route().receipt if self.cold else None,
            spans=spans if self.cold else (),
            ordered_unix_ns=arrived_unix_ns,
            ready_unix_ns=now,
        )
        self.out[number] = granted
        return granted

    def release(self, granted: Granted, outcome: Outcome | None = None) -> None:
        del self.out[granted.lease]  # KeyError: given back twice

    def unreachable(self, granted: Granted, message: str, outcome: Outcome | None = None) -> None:
        del self.out[granted.lease]
        self.unreached.append(message)

    def served(self, receipt: ReceiptId, caller: CallerTimes) -> None:
        self.callers.append((receipt, caller))


class Bench:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broker = Broker()
        self.client: aiohttp.ClientSession
        self.upstreams = Upstreams()
        self.seen: list[web.Request] = []

    @asynccontextmanager
    async def replica(self, handler: Handler, name: str = "r.sock") -> AsyncIterator[None]:
        """A replica whose every path is answered by `handler`."""

        async def noted(request: web.Request) -> web.StreamResponse:
            self.seen.append(request)
            return await handler(request)

        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{tail:.*}", noted)
        self.broker.sockets.append(str(self.folder / name))
        async with serving_unix(app, self.folder / name):
            yield

    @asynccontextmanager
    async def raw_replica(
        self, serve: Callable[[anyio.abc.SocketStream], Awaitable[None]], name: str = "raw.sock"
    ) -> AsyncIterator[None]:
        """A replica that speaks bytes."""
        path = str(self.folder / name)
        self.broker.sockets.append(path)

        async def once(stream: anyio.abc.SocketStream) -> None:
            async with stream:
                await serve(stream)

        async with await anyio.create_unix_listener(path) as listener, anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, once)
            yield
            tasks.cancel_scope.cancel()

    async def all_back(self) -> None:
        with anyio.fail_after(WAIT_S_MAX):
            while self.broker.out:
                await anyio.sleep(0.001)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    upstreams = made.upstreams
    relay = Relay(Carrier(made.broker, upstreams), request_bytes_max=BODY_BYTES_MAX)
    app = build_app(relay, ready=lambda: True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "gw.sock"))
    async with serving(app, listener, shutdown_s_max=WAIT_S_MAX):
        connector = aiohttp.UnixConnector(path=str(tmp_path / "gw.sock"))
        timeout = aiohttp.ClientTimeout(total=WAIT_S_MAX)
        async with aiohttp.ClientSession("http://gw", connector=connector, timeout=timeout) as made.client:
            yield made
            await made.all_back()
    upstreams.close()
    await anyio.sleep(0)


async def read_head(stream: anyio.abc.SocketStream) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        data += await stream.receive()
    return data


async def test_a_request_goes_up_and_its_answer_comes_down(bench: Bench) -> None:
    async def echo(request: web.Request) -> web.Response:
        body = await request.read()
        return web.Response(
            status=201, body=body[::-1], headers={"x-own": "1", "Connection": "x-hop", "x-hop": "1"}
        )

    headers = {
        "Authorization": "Bearer sd_secret",
        "Connection": "keep-alive, x-private",
        "x-private": "1",
        "x-mine": "2",
        "TE": "trailers",
        "x-request-id": "req-7",
    }
    async with (
        bench.replica(echo),
        bench.client.post("/embed/a/b?q=1&q=2", data=b"abc", headers=headers) as answer,
    ):
        assert (answer.status, await answer.read()) == (201, b"cba")
        assert answer.headers["x-own"] == "1"
        assert "x-hop" not in answer.headers
        assert answer.headers["x-request-id"] == "req-7"
        assert "snowdrop-receipt" not in answer.headers
    (seen,) = bench.seen
    assert seen.raw_path == "/a/b?q=1&q=2"
    assert seen.headers["x-mine"] == "2"
    assert seen.headers["x-request-id"] == "req-7"
    assert seen.headers["x-forwarded-prefix"] == "/embed"
    assert not {"authorization", "x-private", "te"} & {name.lower() for name in seen.headers}
    assert "sd_secret" not in str(seen.headers)
    assert bench.broker.asked == [(key_sha256("sd_secret"), "embed")]


async def test_both_ways_stream(bench: Bench) -> None:
    """The replica answers each chunk before the next is sent: nothing may be held back on either way."""

    async def chat(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        async for chunk in request.content.iter_any():
            await answer.write(b"got " + chunk)
        return answer

    turns: asyncio.Queue[bytes] = asyncio.Queue()

    async def upload() -> AsyncIterator[bytes]:
        while chunk := await turns.get():
            yield chunk

    turns.put_nowait(b"one")
    async with bench.replica(chat), bench.client.post("/chat/x", data=upload()) as answer:
        assert await answer.content.readany() == b"got one"
        turns.put_nowait(b"two")
        assert await answer.content.readany() == b"got two"
        turns.put_nowait(b"")
        assert await answer.content.readany() == b""


async def test_a_large_body_and_a_large_answer_arrive_whole(bench: Bench) -> None:
    async def echo(request: web.Request) -> web.Response:
        return web.Response(body=await request.read())

    data = bytes(range(256)) * 1_500
    async with bench.replica(echo), bench.client.post("/e/x", data=data) as answer:
        assert await answer.read() == data
        assert answer.content_length == len(data)


async def test_a_refused_connection_goes_to_the_next_replica(bench: Bench) -> None:
    async def echo(request: web.Request) -> web.Response:
        return web.Response(body=await request.read())

    bench.broker.sockets.append(str(bench.folder / "nobody.sock"))
    async with bench.replica(echo), bench.client.post("/e/x", data=b"again") as answer:
        assert (answer.status, await answer.read()) == (200, b"again")
    assert len(bench.broker.asked) == 2
    assert len(bench.broker.unreached) == 1
    assert len(bench.seen) == 1


async def test_when_no_replica_can_be_reached_that_is_said(bench: Bench) -> None:
    bench.broker.sockets.append(str(bench.folder / "nobody.sock"))
    async with bench.client.get("/e/x") as answer:
        assert (answer.status, answer.headers["retry-after"]) == (503, "5")
        assert (await answer.json())["error"]["kind"] == "unavailable"
    assert len(bench.broker.unreached) == 5


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("kept_alive", [False, True])
async def test_death_before_headers_is_told_and_not_tried_again(
    bench: Bench, method: str, kept_alive: bool
) -> None:
    heads: list[bytes] = []

    async def die(stream: anyio.abc.SocketStream) -> None:
        if kept_alive:
            await read_head(stream)
            await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        heads.append(await read_head(stream))

    async with bench.raw_replica(die):
        if kept_alive:
            async with bench.client.get("/e/first") as answer:
                assert await answer.read() == b"ok"
        async with bench.client.request(method, "/e/second") as answer:
            assert answer.status == 502
            error = (await answer.json())["error"]
        assert error["kind"] == "replica_died"
        assert "not sent again" in error["message"]
        await anyio.sleep(0)
    assert len(heads) == 1
    assert len(bench.broker.unreached) == 1, "whoever waits is not sent to one that dies"


async def test_death_in_the_middle_of_an_event_stream_is_an_event(bench: Bench) -> None:
    async def die(stream: anyio.abc.SocketStream) -> None:
        await read_head(stream)
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        await stream.send(head + b"9\r\ndata: 1\n\n\r\n")

    async with bench.raw_replica(die), bench.client.get("/e/x") as answer:
        text = (await answer.read()).decode()
    first, last = text.strip().split("\n\n")
    assert first == "data: 1"
    event, data = last.split("\n")
    assert event == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["kind"] == "replica_died"


@pytest.mark.parametrize("head", [b"Transfer-Encoding: chunked", b"Content-Length: 200000"])
async def test_death_in_the_middle_of_another_body_cuts_it(bench: Bench, head: bytes) -> None:
    async def die(stream: anyio.abc.SocketStream) -> None:
        await read_head(stream)
        await stream.send(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n3\r\nabc\r\n")

    async with bench.raw_replica(die), bench.client.get("/e/x") as answer:
        with pytest.raises(aiohttp.ClientError):
            await answer.read()


async def test_the_bound_of_a_request_starts_with_its_turn(bench: Bench) -> None:
    async def never(_request: web.Request) -> web.Response:
        await anyio.sleep_forever()
        raise AssertionError

    bench.broker.request_s_max = 0.05
    async with bench.replica(never), bench.client.get("/e/x") as answer:
        assert answer.status == 504
        error = (await answer.json())["error"]
    assert (error["kind"], error["where"]) == ("timed_out", "queue.request_s_max=0.05")


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_above_the_bound_is_refused(bench: Bench, chunked: bool) -> None:
    async def echo(request: web.Request) -> web.Response:
        return web.Response(body=await request.read())

    async def upload() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield bytes(BODY_BYTES_MAX // 4)

    data = upload() if chunked else bytes(BODY_BYTES_MAX + 1)
    async with bench.replica(echo), bench.client.post("/e/x", data=data) as answer:
        assert answer.status == 413
        assert (await answer.json())["error"]["where"] == f"gateway.request_bytes_max={BODY_BYTES_MAX}"
    assert bool(bench.broker.asked) == chunked, "a body of known length needs no slot to be refused"


async def test_a_client_that_goes_away_cancels_the_work(bench: Bench) -> None:
    started, cancelled = anyio.Event(), anyio.Event()

    async def work(_request: web.Request) -> web.Response:
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.set()
        raise AssertionError

    async def ask() -> None:
        async with bench.client.get("/e/x"):
            raise AssertionError

    async with bench.replica(work):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await started.wait()
            assert len(bench.broker.out) == 1
            tasks.cancel_scope.cancel()
        with anyio.fail_after(WAIT_S_MAX):
            await cancelled.wait()
        await bench.all_back()


async def test_a_cold_request_learns_what_it_waited_for(bench: Bench) -> None:
    async def hello(_request: web.Request) -> web.Response:
        return web.Response(text="hello")

    bench.broker.cold = True
    async with bench.replica(hello), bench.client.get("/e/x", headers={"x-request-id": "req-1"}) as answer:
        assert answer.headers["snowdrop-receipt"] == "rcp-1"
        names = [part.split(";")[0] for part in answer.headers["server-timing"].split(", ")]
    assert names[0] == "startup"
    assert names[-1] == "answer"
    ((receipt, caller),) = bench.broker.callers
    assert (receipt, caller.request_id) == ("rcp-1", "req-1")
    assert caller.arrived_unix_ns <= caller.admitted_unix_ns <= caller.first_byte_unix_ns


async def test_refusals_are_typed_answers_with_a_time_to_come_back(bench: Bench) -> None:
    bench.broker.refusal = QueueFullError("full", where="queue", retry_after_s=7.0)
    async with bench.client.get("/e/x") as answer:
        assert (answer.status, answer.headers["retry-after"]) == (429, "7")
        error = (await answer.json())["error"]
    assert (error["kind"], error["request_id"]) == ("queue_full", answer.headers["x-request-id"])
    async with bench.client.get("/e/x", headers={"Authorization": "Basic abc"}) as answer:
        assert answer.status == 401


async def test_paths_that_nobody_serves(bench: Bench) -> None:
    async with bench.client.get("/") as answer:
        assert answer.status == 404
        assert "snowdrop ps" in (await answer.json())["error"]["next_step"]
    async with bench.client.get("/healthz") as answer:
        assert answer.status == 200
    async with bench.client.get("/readyz") as answer:
        assert await answer.json() == {"ready": True}
    assert not bench.broker.asked


async def test_an_old_client_gets_a_streamed_answer_too(bench: Bench) -> None:
    async def stream(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        await answer.write(b"old")
        return answer

    async with bench.replica(stream), await anyio.connect_unix(str(bench.folder / "gw.sock")) as client:
        await client.send(b"GET /e/x HTTP/1.0\r\n\r\n")
        data = b""
        with anyio.fail_after(WAIT_S_MAX):
            async for chunk in client:
                data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    assert b" 200 " in head
    assert b"chunked" not in head.lower()
    assert body == b"old"


async def test_a_body_that_never_comes_holds_no_slot(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a small one nor the start of a large one is waited for without bound, nor under a lease."""
    monkeypatch.setattr("snowdrop.gateway.bodies.BODY_STALL_S_MAX", 0.05)

    async def silent() -> AsyncIterator[bytes]:
        yield b"x"
        await anyio.sleep_forever()

    for length in ("100", "400000"):
        async with bench.client.post("/e/x", data=silent(), headers={"content-length": length}) as answer:
            assert answer.status == 504
            assert (await answer.json())["error"]["kind"] == "timed_out"
    assert not bench.broker.asked, "no slot was asked for"


async def test_a_connection_in_use_outlives_the_sweep(bench: Bench) -> None:
    """An answer may take longer than an idle connection is kept."""
    begun, go_on = anyio.Event(), anyio.Event()

    async def slow(_request: web.Request) -> web.Response:
        begun.set()
        await go_on.wait()
        return web.Response(text="done")

    async with bench.replica(slow), anyio.create_task_group() as tasks:

        async def sweep() -> None:
            await begun.wait()
            bench.upstreams.sweep(time.monotonic() + 10_000)
            go_on.set()

        tasks.start_soon(sweep)
        async with bench.client.get("/e/x") as answer:
            assert (answer.status, await answer.text()) == (200, "done")
    bench.upstreams.sweep(time.monotonic() + 10_000)
    assert not bench.upstreams.open_paths


async def test_a_client_that_goes_in_the_middle_of_an_answer_says_nothing_of_the_replica(bench: Bench) -> None:
    """It is the client's connection that broke: the replica is as good as before, and gets the next request."""
    gone = anyio.Event()

    async def stream(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        try:
            while True:
                await answer.write(b"x" * 65_536)
                await asyncio.sleep(0)
        finally:
            gone.set()

    async with bench.replica(stream):
        async with bench.client.get("/e/x") as answer:
            await answer.content.readexactly(1_000)
            answer.close()
        with anyio.fail_after(WAIT_S_MAX):
            await gone.wait()
        await bench.all_back()
    assert bench.broker.unreached == []

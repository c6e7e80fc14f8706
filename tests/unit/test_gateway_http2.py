"""The HTTP/2 listener before a worker and a replica: streams, flow control, resets, broken answers."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.abc
import h2.config
import h2.connection
import h2.errors
import h2.events
import httpx
import pytest
from aiohttp import web
from test_gateway_relay import Broker, read_head

from snowdrop.gateway.app import build_app
from snowdrop.gateway.carrier import Carrier
from snowdrop.gateway.edge.http2 import Front, serve_front
from snowdrop.gateway.edge.server import serving
from snowdrop.gateway.relay import Relay
from snowdrop.gateway.upstream.pool import Upstreams
from snowdrop.wire.http import serving_unix

pytestmark = pytest.mark.anyio
WAIT_S_MAX = 20.0
BODY_BYTES_MAX = 1 << 22
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Bench:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broker = Broker()
        self.client: httpx.AsyncClient
        self.port = 0

    @asynccontextmanager
    async def replica(self, handler: Handler) -> AsyncIterator[None]:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{tail:.*}", handler)
        self.broker.sockets.append(str(self.folder / "r.sock"))
        async with serving_unix(app, self.folder / "r.sock"):
            yield
            await self.all_back()

    @asynccontextmanager
    async def raw_replica(self, serve: Callable[[anyio.abc.SocketStream], Awaitable[None]]) -> AsyncIterator[None]:
        path = str(self.folder / "raw.sock")
        self.broker.sockets.append(path)

        async def once(stream: anyio.abc.SocketStream) -> None:
            async with stream:
                await serve(stream)

        async with await anyio.create_unix_listener(path) as listener, anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, once)
            yield
            tasks.cancel_scope.cancel()

    async def all_back(self) -> None:
        while self.broker.out:
            await anyio.sleep(0.001)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    upstreams, front_upstreams = Upstreams(), Upstreams()
    relay = Relay(Carrier(made.broker, upstreams), request_bytes_max=BODY_BYTES_MAX)
    edge = socket.socket(socket.AF_UNIX)
    edge.bind(str(tmp_path / "edge.sock"))
    listener = socket.create_server(("127.0.0.1", 0))
    port = made.port = listener.getsockname()[1]
    listening, stop = anyio.Event(), anyio.Event()

    async def until_stopped(scope: anyio.CancelScope) -> None:
        await stop.wait()

    with anyio.fail_after(WAIT_S_MAX):
        async with (
            serving(build_app(relay, ready=lambda: True), edge, shutdown_s_max=1.0),
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(
                lambda: serve_front(
                    Front(front_upstreams, str(tmp_path / "edge.sock")),
                    listener,
                    None,
                    shutdown_s_max=1.0,
                    until_stopped=until_stopped,
                    ready=listening.set,
                )
            )
            await listening.wait()
            async with httpx.AsyncClient(
                http1=False, http2=True, base_url=f"http://127.0.0.1:{port}", timeout=WAIT_S_MAX, trust_env=False
            ) as made.client:
                yield made
                await made.all_back()
            stop.set()
        upstreams.close()
        front_upstreams.close()
        await anyio.sleep(0)


async def test_many_streams_over_one_connection(bench: Bench) -> None:
    seen: list[dict[str, str]] = []
    together, all_there = 0, anyio.Event()

    async def echo(request: web.Request) -> web.Response:
        nonlocal together
        seen.append(dict(request.headers))
        together += 1
        if together == 20:
            all_there.set()
        await all_there.wait()
        return web.Response(body=(await request.read())[::-1], headers={"x-own": request.path_qs})

    answers: list[httpx.Response] = []

    async def ask(number: int) -> None:
        headers = {"x-request-id": f"req-{number}", "cookie": "a=1; b=2"}
        answers.append(await bench.client.post(f"/e/x?n={number}", content=b"abc%d" % number, headers=headers))

    async with bench.replica(echo), anyio.create_task_group() as tasks:
        for number in range(20):
            tasks.start_soon(ask, number)
    assert {answer.http_version for answer in answers} == {"HTTP/2"}
    assert {answer.content[::-1] for answer in answers} == {b"abc%d" % number for number in range(20)}
    assert {answer.headers["x-own"] for answer in answers} == {f"/x?n={number}" for number in range(20)}
    assert {"transfer-encoding", "connection", "keep-alive"}.isdisjoint(answers[0].headers)
    first = {name.lower(): value for name, value in seen[0].items()}
    assert first["x-forwarded-for"] == "127.0.0.1"
    assert first["x-forwarded-proto"] == "http"
    assert first["x-forwarded-host"].startswith("127.0.0.1:")
    assert first["cookie"] == "a=1; b=2"


async def test_events_come_one_by_one_and_a_reset_cancels_the_work(bench: Bench) -> None:
    heard, cancelled = anyio.Event(), anyio.Event()

    async def events(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        try:
            await answer.write(b"data: 1\n\n")
            await heard.wait()
            await answer.write(b"data: 2\n\n")
            await anyio.sleep_forever()
        finally:
            cancelled.set()
        return answer

    async with bench.replica(events), await anyio.connect_tcp("127.0.0.1", bench.port) as raw:
        # By hand: httpx never resets a stream.
        client = h2.connection.H2Connection()
        client.initiate_connection()
        head = [(":method", "GET"), (":path", "/e/x"), (":scheme", "http"), (":authority", "gw")]
        client.send_headers(1, head, end_stream=True)

        async def data() -> bytes:
            while True:
                await raw.send(client.data_to_send())
                for event in client.receive_data(await raw.receive()):
                    if isinstance(event, h2.events.DataReceived):
                        return event.data

        assert await data() == b"data: 1\n\n"
        heard.set()
        assert await data() == b"data: 2\n\n"
        client.reset_stream(1)
        await raw.send(client.data_to_send())
        await cancelled.wait()
        await bench.all_back()
        # The connection goes on.
        client.send_headers(3, [*head[:1], (":path", "/healthz"), *head[2:]], end_stream=True)
        assert b"true" in await data()


async def test_a_slow_reader_holds_the_replica_back(bench: Bench) -> None:
    total, sent = 48 << 20, 0

    async def download(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        answer = web.StreamResponse()
        answer.content_length = total
        await answer.prepare(request)
        while sent < total:
            await answer.write(bytes(1 << 16))
            sent += 1 << 16
        return answer

    async with bench.replica(download), bench.client.stream("GET", "/e/x") as answer:
        chunks = answer.aiter_raw()
        taken = len(await anext(chunks))
        before = -1
        while sent != before:
            before = sent
            await anyio.sleep(0.05)
        # Windows of the client (httpx takes 16 MiB a stream), and what every hop may hold.
        assert sent < 32 << 20
        async for chunk in chunks:
            taken += len(chunk)
        assert taken == total


async def test_an_upload_is_streamed_and_bounded(bench: Bench) -> None:
    async def count(request: web.Request) -> web.Response:
        return web.Response(text=str(len(await request.read())))

    async def body(size: int) -> AsyncIterator[bytes]:
        for _ in range(size >> 16):
            yield bytes(1 << 16)

    async with bench.replica(count):
        answer = await bench.client.post("/e/x", content=body(2 << 20))
        assert (answer.status_code, answer.text) == (200, str(2 << 20))
        answer = await bench.client.post("/e/x", content=bytes(BODY_BYTES_MAX + 1))
        assert answer.status_code == 413
        answer = await bench.client.post("/e/x", content=b"after")
        assert answer.text == "5"


async def test_an_answer_that_breaks_off_does_not_look_whole(bench: Bench) -> None:
    async def die(stream: anyio.abc.SocketStream) -> None:
        await read_head(stream)
        await stream.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")

    async with bench.raw_replica(die):
        with pytest.raises(httpx.RemoteProtocolError):
            await bench.client.get("/e/x")


async def test_bytes_that_are_no_ascii_in_path_or_method_concern_their_own_stream_alone(bench: Bench) -> None:
    async def echo(request: web.Request) -> web.Response:
        return web.Response(text=request.path)

    statuses: dict[int, bytes] = {}
    bodies: dict[int, bytes] = {}
    resets: dict[int, int] = {}
    client = h2.connection.H2Connection(h2.config.H2Configuration(validate_outbound_headers=False))
    client.initiate_connection()
    requests = ((1, b"POST", "/e/Jürgen".encode()), (3, b"P\xff", b"/e/x"), (5, b"POST", b"/e/plain"))
    async with bench.replica(echo), await anyio.connect_tcp("127.0.0.1", bench.port) as stream:
        for number, method, path in requests:
            head = [(b":method", method), (b":path", path), (b":scheme", b"http"), (b":authority", b"a")]
            client.send_headers(number, head)
            client.send_data(number, b"body", end_stream=True)
        await stream.send(client.data_to_send())
        while len(bodies) + len(resets) < len(requests):
            for event in client.receive_data(await stream.receive()):
                if isinstance(event, h2.events.ResponseReceived):
                    statuses[event.stream_id] = dict(event.headers)[b":status"]
                elif isinstance(event, h2.events.DataReceived) and event.data:
                    bodies[event.stream_id] = event.data
                elif isinstance(event, h2.events.StreamReset):
                    resets[event.stream_id] = event.error_code
    assert statuses == {1: b"200", 5: b"200"}
    assert bodies == {1: "/Jürgen".encode(), 5: b"/plain"}
    assert resets == {3: h2.errors.ErrorCodes.PROTOCOL_ERROR}


async def test_errors_and_heads_are_as_on_the_other_port(bench: Bench) -> None:
    async def hello(_request: web.Request) -> web.Response:
        return web.Response(text="hello")

    assert (await bench.client.get("/healthz")).json() == {"ok": True}
    assert (await bench.client.get("/")).json()["error"]["kind"] == "not_found"
    async with bench.replica(hello):
        answer = await bench.client.head("/e/x")
        assert (answer.status_code, answer.headers["content-length"], answer.content) == (200, "5", b"")


async def test_workers_that_are_away_are_a_typed_error(bench: Bench) -> None:
    (bench.folder / "edge.sock").unlink()
    answer = await bench.client.get("/e/x")
    assert answer.status_code == 503
    assert answer.json()["error"]["kind"] == "platform_down"

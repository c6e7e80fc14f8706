"""Websockets through the relay: real clients and servers, raw replicas, bounds, ends of every kind."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import anyio
import anyio.abc
import pytest
import websockets.asyncio.client
import websockets.asyncio.server
from hypothesis import given
from hypothesis import strategies as st
from test_gateway_relay import Broker
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Close, Frame, Opcode

from snowdrop.gateway.app import build_app
from snowdrop.gateway.carrier import Carrier
from snowdrop.gateway.edge import websocket as websocket_module
from snowdrop.gateway.edge.server import serving
from snowdrop.gateway.edge.websocket import Frames, close_frame
from snowdrop.gateway.relay import Relay
from snowdrop.gateway.upstream.pool import Upstreams

pytestmark = pytest.mark.anyio
WAIT_S_MAX = 10.0
KERNEL_BYTES_MAX = 4 << 20
Serve = Callable[[websockets.asyncio.server.ServerConnection], Awaitable[None]]


class Bench:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broker = Broker()
        self.ended: list[tuple[int, str]] = []
        self.received = 0

    @asynccontextmanager
    async def gateway(self, *, idle_s_max: float = 60.0, shutdown_s_max: float = 1.0) -> AsyncIterator[None]:
        upstreams = Upstreams()

        def finished(call: object, error: object) -> None:
            self.ended.append((call.status, type(error).__name__))  # type: ignore[attr-defined]
            self.received += call.body.received_bytes  # type: ignore[attr-defined]

        carrier = Carrier(self.broker, upstreams, finished=finished)
        relay = Relay(carrier, request_bytes_max=1 << 20, websocket_idle_s_max=idle_s_max)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.folder / "gw.sock"))
        with anyio.fail_after(WAIT_S_MAX * 3):
            async with serving(
                build_app(relay, ready=lambda: True), listener, shutdown_s_max=shutdown_s_max, cut=relay.cut
            ):
                yield
                if shutdown_s_max:
                    await self.all_back()
            await self.all_back()
        upstreams.close()
        await anyio.sleep(0)

    @asynccontextmanager
    async def replica(self, serve: Serve, **options: object) -> AsyncIterator[None]:
        path = str(self.folder / "r.sock")
        self.broker.sockets.append(path)
        async with websockets.asyncio.server.unix_serve(serve, path, **options):  # type: ignore[arg-type]
            yield

    @asynccontextmanager
    async def raw_replica(self, serve: Callable[[anyio.abc.SocketStream], Awaitable[None]]) -> AsyncIterator[None]:
        path = str(self.folder / "r.sock")
        self.broker.sockets.append(path)

        async def once(stream: anyio.abc.SocketStream) -> None:
            async with stream:
                data = b""
                while b"\r\n\r\n" not in data:
                    data += await stream.receive()
                await serve(stream)

        async with await anyio.create_unix_listener(path) as listener, anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, once)
            yield
            tasks.cancel_scope.cancel()

    def connect(self, path: str = "/e/ws", **options: object) -> websockets.asyncio.client.unix_connect:
        return websockets.asyncio.client.unix_connect(
            str(self.folder / "gw.sock"),
            f"ws://gw{path}",
            **options,  # type: ignore[arg-type]
        )

    async def raw_client(self) -> anyio.abc.SocketStream:
        return await anyio.connect_unix(self.folder / "gw.sock")

    async def all_back(self) -> None:
        while self.broker.out:
            await anyio.sleep(0.001)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


UPGRADED = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
)
HANDSHAKE = (
    b"GET /e/ws HTTP/1.1\r\nHost: gw\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


async def test_messages_pings_subprotocols_and_close_codes_pass(bench: Bench) -> None:
    seen: list[object] = []

    async def serve(connection: websockets.asyncio.server.ServerConnection) -> None:
        assert connection.request is not None
        seen.append((connection.request.path, connection.request.headers["x-request-id"], connection.subprotocol))
        async for message in connection:
            if message == "bye":
                await connection.close(4321, "as asked")
                return
            await connection.send(message[::-1])

    async with (
        bench.gateway(),
        bench.replica(serve, subprotocols=["chat"]),
        bench.connect(
            "/e/ws/a?b=1", subprotocols=["other", "chat"], additional_headers={"x-request-id": "req-1"}
        ) as client,
    ):
        assert client.subprotocol == "chat"
        assert client.response is not None
        assert client.response.headers["x-request-id"] == "req-1"
        assert len(bench.broker.out) == 1, "an open websocket holds its slot"
        await client.send("abc")
        assert await client.recv() == "cba"
        big = bytes(range(256)) * 4_096
        await client.send(big)
        assert await client.recv() == big[::-1]
        await (await client.ping(b"are you there"))
        await client.send("bye")
        with pytest.raises(ConnectionClosed) as closed:
            await client.recv()
        assert closed.value.rcvd == Close(4321, "as asked")
        await bench.all_back()
    assert seen == [("/ws/a?b=1", "req-1", "chat")]
    assert bench.ended == [(101, "NoneType")]
    assert bench.received > 3, "compressed, but counted"


async def test_the_clients_close_code_reaches_the_replica(bench: Bench) -> None:
    codes: list[object] = []
    done = anyio.Event()

    async def serve(connection: websockets.asyncio.server.ServerConnection) -> None:
        with pytest.raises(ConnectionClosed) as closed:
            await connection.recv()
        codes.append(closed.value.rcvd)
        done.set()

    async with bench.gateway(), bench.replica(serve):
        async with bench.connect() as client:
            await client.close(4000, "enough")
        await done.wait()
    assert codes == [Close(4000, "enough")]


async def test_a_client_that_vanishes_frees_its_slot(bench: Bench) -> None:
    gone = anyio.Event()

    async def serve(connection: websockets.asyncio.server.ServerConnection) -> None:
        with pytest.raises(ConnectionClosed):
            await connection.recv()
        gone.set()

    async with bench.gateway(), bench.replica(serve):
        client = await bench.connect()
        client.transport.abort()
        await gone.wait()
        await bench.all_back()
        await client.wait_closed()


async def test_what_the_replica_declines_is_its_own_answer(bench: Bench) -> None:
    async def decline(stream: anyio.abc.SocketStream) -> None:
        await stream.send(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\nx-why: no\r\n\r\nno")

    async with bench.gateway(), bench.raw_replica(decline):
        with pytest.raises(InvalidStatus) as refused:
            await bench.connect()
        answer = refused.value.response
        assert (answer.status_code, answer.headers["x-why"], answer.body) == (403, "no", b"no")


async def test_a_replica_that_dies_is_told_by_a_close_frame(bench: Bench) -> None:
    """Behind a whole frame: a client sees 1014 instead of a connection that just ends."""

    async def die(stream: anyio.abc.SocketStream) -> None:
        await stream.send(UPGRADED + Frame(Opcode.TEXT, b"hi").serialize(mask=False))

    async with (
        bench.gateway(),
        bench.raw_replica(die),
        await bench.raw_client() as client,
    ):
        await client.send(HANDSHAKE)
        data = b""
        async for chunk in client:
            data += chunk
    assert data.partition(b"\r\n\r\n")[2].startswith(b"\x81\x02hi\x88")
    assert b"\x03\xf6" in data  # 1014


async def test_no_close_frame_is_put_into_the_middle_of_another(bench: Bench) -> None:
    async def die(stream: anyio.abc.SocketStream) -> None:
        await stream.send(UPGRADED + b"\x81\x05he")

    async with (
        bench.gateway(),
        bench.raw_replica(die),
        await bench.raw_client() as client,
    ):
        await client.send(HANDSHAKE)
        data = b""
        async for chunk in client:
            data += chunk
    assert data.partition(b"\r\n\r\n")[2] == b"\x81\x05he"


async def test_one_that_nobody_uses_is_closed(bench: Bench) -> None:
    async def serve(connection: websockets.asyncio.server.ServerConnection) -> None:
        await connection.wait_closed()

    async with bench.gateway(idle_s_max=0.05), bench.replica(serve), bench.connect() as client:
        with pytest.raises(ConnectionClosed) as closed:
            await client.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1001
        assert "websocket_idle_s_max" in closed.value.rcvd.reason
    assert bench.ended == [(101, "TimedOutError")]


async def test_a_gateway_that_stops_says_so(bench: Bench) -> None:
    async def serve(connection: websockets.asyncio.server.ServerConnection) -> None:
        await connection.wait_closed()

    async with bench.replica(serve):
        async with bench.gateway(shutdown_s_max=0.0):
            client = await bench.connect()
        with pytest.raises(ConnectionClosed) as closed:
            await client.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1012


@pytest.mark.parametrize("upward", [True, False])
async def test_a_slow_end_holds_the_other_one_back(bench: Bench, upward: bool) -> None:
    frame = Frame(Opcode.BINARY, bytes(60_000)).serialize(mask=False)
    total, sent = 500, 0
    stalled, go_on = anyio.Event(), anyio.Event()

    async def send(stream: anyio.abc.SocketStream) -> None:
        nonlocal sent
        while sent < total:
            with anyio.move_on_after(0.2) as waited:
                await stream.send(frame)
                sent += 1
            if waited.cancelled_caught:
                stalled.set()
                return

    async def serve(stream: anyio.abc.SocketStream) -> None:
        await stream.send(UPGRADED)
        if upward:
            await go_on.wait()
            return
        await send(stream)
        await go_on.wait()

    async with (
        bench.gateway(),
        bench.raw_replica(serve),
        await bench.raw_client() as client,
    ):
        await client.send(HANDSHAKE)
        assert b" 101 " in await client.receive(1_000)
        if upward:
            await send(client)
        await stalled.wait()
        assert sent * len(frame) < 2 * websocket_module.BUFFER_BYTES_HIGH + KERNEL_BYTES_MAX
        go_on.set()


async def test_a_slot_that_cannot_be_had_is_an_ordinary_error(bench: Bench) -> None:
    bench.broker.sockets.append(str(bench.folder / "nobody.sock"))
    async with bench.gateway():
        with pytest.raises(InvalidStatus) as refused:
            await bench.connect()
        assert refused.value.response.status_code == 503
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(bench.folder / "gw.sock"))) as http,
            http.post("http://gw/e/ws", headers={"upgrade": "websocket", "connection": "upgrade"}) as answer,
        ):
            assert answer.status == 422


@given(st.lists(st.binary(max_size=70_000), max_size=5), st.integers(1, 5_000), st.booleans())
def test_frames_are_followed_however_they_are_cut(payloads: list[bytes], cut: int, masked: bool) -> None:
    stream = b"".join(Frame(Opcode.BINARY, payload).serialize(mask=masked) for payload in payloads)
    frames = Frames()
    for at in range(0, len(stream), cut):
        frames.feed(stream[at : at + cut])
    assert frames.between
    assert not frames.closed
    last = close_frame(1001, "x" * 500)
    frames.feed(last[:1])
    assert not frames.between
    frames.feed(last[1:])
    assert frames.between
    assert frames.closed

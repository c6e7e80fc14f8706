"""The client that speaks to replicas: bodies both ways, bounds, and answers that are not what they should be."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.abc
import pytest
from multidict import CIMultiDict

from snowdrop.domain.errors import InvalidInputError
from snowdrop.gateway.upstream import connection as connection_module
from snowdrop.gateway.upstream.connection import BUFFER_BYTES_HIGH, BrokenError, UnconnectedError
from snowdrop.gateway.upstream.pool import IDLE_S_MAX, Upstreams

pytestmark = pytest.mark.anyio
WAIT_S_MAX = 10.0
KERNEL_BYTES_MAX = 2 << 20
"""What socket buffers on both sides may hold beside ours."""
Serve = Callable[[anyio.abc.SocketStream], Awaitable[None]]
HEADERS: CIMultiDict[str] = CIMultiDict({"x-a": "1"})


@asynccontextmanager
async def replica(path: Path, serve: Serve) -> AsyncIterator[str]:
    async def once(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await serve(stream)

    async with await anyio.create_unix_listener(path) as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, once)
        with anyio.fail_after(WAIT_S_MAX):
            yield str(path)
        tasks.cancel_scope.cancel()


@pytest.fixture
async def pool() -> AsyncIterator[Upstreams]:
    made = Upstreams()
    yield made
    made.close()
    await anyio.sleep(0)


async def read_head(stream: anyio.abc.SocketStream) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        data += await stream.receive()
    return data


def saying(*pieces: bytes) -> Serve:
    """Reads a request's head and says these, then closes."""

    async def serve(stream: anyio.abc.SocketStream) -> None:
        await read_head(stream)
        for piece in pieces:
            await stream.send(piece)

    return serve


async def test_a_connection_is_used_again_and_swept_when_idle(tmp_path: Path, pool: Upstreams) -> None:
    made: list[int] = []
    heads: list[bytes] = []

    async def serve(stream: anyio.abc.SocketStream) -> None:
        made.append(1)
        try:
            while True:
                heads.append(await read_head(stream))
                await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-B: 2\r\n\r\nok")
        except anyio.EndOfStream:
            return

    async with replica(tmp_path / "r", serve) as path:
        for number in range(3):
            async with pool.exchange(path, "POST", "/a?b=1", HEADERS, b"body") as answer:
                assert (answer.status, answer.content_length, answer.headers["x-b"]) == (200, 2, "2")
                assert await answer.read() == b"ok", number
        assert made == [1]
        assert heads[0] == (b"POST /a?b=1 HTTP/1.1\r\nhost: replica\r\nx-a: 1\r\ncontent-length: 4\r\n\r\nbody")
        assert pool.open_paths == {path}
        pool.sweep(0.0)
        assert pool.open_paths == {path}
        connection = await pool.take(path)
        pool.give_back(path, connection)
        pool.sweep(connection.idle_since_s + IDLE_S_MAX + 1)
        assert not pool.open_paths


@pytest.mark.parametrize(
    ("pieces", "status", "body"),
    [
        (
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", b"1\r\nd\r\n0\r\n\r\n"),
            200,
            b"abcd",
        ),
        ((b"HTTP/1.1 200 OK\r\n\r\nab", b"cd"), 200, b"abcd"),
        ((b"HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\nab", b"cd"), 200, b"abcd"),
        ((b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 201 Made\r\nContent-Length: 1\r\n\r\nx"), 201, b"x"),
        ((b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 204 No\r\n\r\n",), 204, b""),
        (
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: t\r\n\r\n1\r\nx\r\n0\r\nt: 1\r\n\r\n",),
            200,
            b"x",
        ),
    ],
)
async def test_every_form_of_a_body(
    tmp_path: Path, pool: Upstreams, pieces: tuple[bytes, ...], status: int, body: bytes
) -> None:
    async with (
        replica(tmp_path / "r", saying(*pieces)) as path,
        pool.exchange(path, "GET", "/", HEADERS, b"") as answer,
    ):
        assert answer.status == status
        assert "link" not in answer.headers
        assert await answer.read() == body
        assert "t" not in answer.headers, "trailers are dropped"


async def test_a_head_answer_has_no_body(tmp_path: Path, pool: Upstreams) -> None:
    async with (
        replica(tmp_path / "r", saying(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")) as path,
        pool.exchange(path, "HEAD", "/", HEADERS, b"") as answer,
    ):
        assert (answer.content_length, await answer.read()) == (1000, b"")


@pytest.mark.parametrize(
    "pieces",
    [
        (),
        (b"HTTP/1.1 200 OK\r\nContent-Le",),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n",),
        (b"SSH-2.0-OpenSSH\r\n\r\n",),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n",),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 300_000 + b"\r\n\r\n",),
    ],
)
async def test_what_is_no_whole_answer_breaks(tmp_path: Path, pool: Upstreams, pieces: tuple[bytes, ...]) -> None:
    async with replica(tmp_path / "r", saying(*pieces)) as path:
        with pytest.raises(BrokenError):
            async with pool.exchange(path, "GET", "/", HEADERS, b"") as answer:
                await answer.read()
        assert not pool.open_paths


async def test_an_answer_that_nobody_asked_for_is_given_to_nobody(tmp_path: Path, pool: Upstreams) -> None:
    """A second answer on a kept connection would be read as that of the next caller."""
    answers = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nother"
    async with replica(tmp_path / "r", saying(answers)) as path:
        async with pool.exchange(path, "GET", "/", HEADERS, b"") as answer:
            assert answer.status == 200
            assert await answer.read() == b"ok"
        assert not pool.open_paths


async def test_nobody_listens(tmp_path: Path, pool: Upstreams) -> None:
    with pytest.raises(UnconnectedError):
        async with pool.exchange(str(tmp_path / "nobody"), "GET", "/", HEADERS, b""):
            raise AssertionError


async def test_a_line_break_in_a_header_is_refused(pool: Upstreams) -> None:
    for value in ("a\r\nx-evil: 1", "a\nb", "a\rb"):
        with pytest.raises(InvalidInputError):
            pool.exchange("/nowhere", "GET", "/", CIMultiDict({"x": value}), b"")


async def test_a_slow_reader_holds_the_replica_back(tmp_path: Path, pool: Upstreams) -> None:
    total, sent = 64 << 20, 0

    async def serve(stream: anyio.abc.SocketStream) -> None:
        nonlocal sent
        await read_head(stream)
        await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        while sent < total:
            await stream.send(bytes(1 << 16))
            sent += 1 << 16

    async with (
        replica(tmp_path / "r", serve) as path,
        pool.exchange(path, "GET", "/", HEADERS, b"") as answer,
    ):
        before = -1
        while sent != before or not sent:  # until the replica can send no more
            before = sent
            for _ in range(200):
                await anyio.lowlevel.checkpoint()
        assert sent < BUFFER_BYTES_HIGH + KERNEL_BYTES_MAX
        assert sum([len(chunk) async for chunk in answer]) == total


async def test_a_slow_replica_holds_the_sender_back(tmp_path: Path, pool: Upstreams) -> None:
    total, made = 64 << 20, 0
    go_on = anyio.Event()
    got = 0

    async def serve(stream: anyio.abc.SocketStream) -> None:
        nonlocal got
        data = await read_head(stream)
        assert b"transfer-encoding: chunked" in data
        await go_on.wait()
        got = len(data)
        while not data.endswith(b"\r\n0\r\n\r\n"):
            more = await stream.receive()
            got += len(more)
            data = data[-10:] + more
        await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async def body() -> AsyncIterator[bytes]:
        nonlocal made
        while made < total:
            made += 1 << 16
            yield bytes(1 << 16)

    async with replica(tmp_path / "r", serve) as path, anyio.create_task_group() as tasks:

        async def watch() -> None:
            before = -1
            while made != before or not made:
                before = made
                for _ in range(200):
                    await anyio.lowlevel.checkpoint()
            assert made < connection_module.WRITE_BYTES_HIGH + KERNEL_BYTES_MAX
            go_on.set()

        tasks.start_soon(watch)
        async with pool.exchange(path, "POST", "/", HEADERS, body()) as answer:
            assert answer.status == 200
        assert got > total


async def test_a_body_of_known_length_is_sent_as_it_is(tmp_path: Path, pool: Upstreams) -> None:
    heads: list[bytes] = []

    async def serve(stream: anyio.abc.SocketStream) -> None:
        data = await read_head(stream)
        while not data.endswith(b"abcdef"):
            data += await stream.receive()
        heads.append(data)
        await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async def body() -> AsyncIterator[bytes]:
        yield b"abc"
        yield b"def"

    headers: CIMultiDict[str] = CIMultiDict({"Content-Length": "6"})
    async with (
        replica(tmp_path / "r", serve) as path,
        pool.exchange(path, "PUT", "/", headers, body()) as answer,
    ):
        assert answer.status == 200
    assert heads == [b"PUT / HTTP/1.1\r\nhost: replica\r\nContent-Length: 6\r\n\r\nabcdef"]


async def test_an_answer_may_come_before_the_body_has_gone(tmp_path: Path, pool: Upstreams) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"start"
        await anyio.sleep_forever()

    async with replica(tmp_path / "r", saying(b"HTTP/1.1 413 No\r\nContent-Length: 2\r\n\r\nno")) as path:
        async with pool.exchange(path, "POST", "/", HEADERS, body()) as answer:
            assert (answer.status, await answer.read()) == (413, b"no")
        assert not pool.open_paths, "half a request is on it"


async def test_leaving_early_tells_the_replica(tmp_path: Path, pool: Upstreams) -> None:
    gone = anyio.Event()

    async def serve(stream: anyio.abc.SocketStream) -> None:
        await read_head(stream)
        await stream.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
        with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
            await stream.receive()
        gone.set()

    async with replica(tmp_path / "r", serve) as path:
        async with pool.exchange(path, "GET", "/", HEADERS, b"") as answer:
            assert answer.status == 200
        await gone.wait()


async def test_after_a_101_bytes_go_both_ways(tmp_path: Path, pool: Upstreams) -> None:
    async def serve(stream: anyio.abc.SocketStream) -> None:
        await read_head(stream)
        await stream.send(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\nhi"
        )
        async for data in stream:
            await stream.send(data[::-1])

    headers: CIMultiDict[str] = CIMultiDict({"connection": "upgrade", "upgrade": "websocket"})
    async with (
        replica(tmp_path / "r", serve) as path,
        pool.exchange(path, "GET", "/", headers, b"") as answer,
    ):
        assert answer.status == 101
        tunnel = answer.connection
        assert await tunnel.chunk() == b"hi"
        await tunnel.write(b"abc")
        assert await tunnel.chunk() == b"cba"
        tunnel.write_eof()
        assert await tunnel.chunk() == b""
    assert not pool.open_paths

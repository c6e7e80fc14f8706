"""The fast channel between worker and owner: frames however they are cut, order, ends, bounds."""

import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from snowdrop.domain.errors import ProtocolError
from snowdrop.wire import pipe as pipe_module
from snowdrop.wire.codec import FRAME_BYTES_MAX, PROTOCOL_VERSION
from snowdrop.wire.pipe import MessagePipe
from snowdrop.wire.slots import FROM_WORKER, CancelWait, FromWorker, WorkerHello

pytestmark = pytest.mark.anyio
WAIT_S_MAX = 10.0
HELLO = WorkerHello(version=PROTOCOL_VERSION, worker="w")


def frame(message: FromWorker) -> bytes:
    data = FROM_WORKER.encode(message)
    return struct.pack("<I", len(data)) + data


@pytest.fixture
async def ends(tmp_path: Path) -> AsyncIterator[tuple[MessagePipe[FromWorker], socket.socket]]:
    path = str(tmp_path / "s")
    made: list[MessagePipe[FromWorker]] = []
    async with await anyio.create_unix_listener(path) as listener:
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(path)
            with anyio.fail_after(WAIT_S_MAX):
                pipe: MessagePipe[FromWorker] = MessagePipe(FROM_WORKER)
                await pipe.open(await listener.accept())
                made.append(pipe)
                yield pipe, raw
                pipe.close()
                await anyio.sleep(0.01)


@pytest.mark.parametrize("cut", [1, 3, 1_000_000])
async def test_frames_arrive_in_order_however_they_are_cut(
    ends: tuple[MessagePipe[FromWorker], socket.socket], cut: int
) -> None:
    pipe, raw = ends
    data = frame(HELLO) + b"".join(frame(CancelWait(ticket=number)) for number in range(50))
    for at in range(0, len(data), cut):
        raw.sendall(data[at : at + cut])
        if cut < 10 and at % 30 == 0:
            await anyio.lowlevel.checkpoint()
    raw.shutdown(socket.SHUT_WR)
    assert await pipe.first() == HELLO
    seen: list[FromWorker] = []
    await pipe.run(seen.append)
    assert seen == [CancelWait(ticket=number) for number in range(50)]


async def test_what_is_said_before_the_end_is_sent(ends: tuple[MessagePipe[FromWorker], socket.socket]) -> None:
    pipe, raw = ends
    for number in range(3):
        pipe.send(CancelWait(ticket=number))
    pipe.close()
    pipe.send(CancelWait(ticket=9))
    data = await anyio.to_thread.run_sync(lambda: _read_all(raw))
    assert data == b"".join(frame(CancelWait(ticket=number)) for number in range(3))


@pytest.mark.parametrize("junk", [struct.pack("<I", FRAME_BYTES_MAX + 1), struct.pack("<I", 3) + b"abc"])
async def test_a_broken_frame_is_told(ends: tuple[MessagePipe[FromWorker], socket.socket], junk: bytes) -> None:
    pipe, raw = ends
    raw.sendall(junk)
    with pytest.raises(ProtocolError):
        await pipe.first()


async def test_a_peer_that_goes_before_its_hello(ends: tuple[MessagePipe[FromWorker], socket.socket]) -> None:
    pipe, raw = ends
    raw.sendall(frame(HELLO)[:5])
    raw.close()
    with pytest.raises(anyio.EndOfStream):
        await pipe.first()


async def test_what_a_handler_raises_ends_the_run(ends: tuple[MessagePipe[FromWorker], socket.socket]) -> None:
    pipe, raw = ends

    def handle(_message: FromWorker) -> None:
        raise LookupError("a bug must not be silent")

    raw.sendall(frame(HELLO))
    with pytest.raises(LookupError):
        await pipe.run(handle)


async def test_a_peer_that_takes_nothing_is_treated_as_gone(
    ends: tuple[MessagePipe[FromWorker], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe_module, "SEND_S_MAX", 0.05)
    pipe, _raw = ends
    big = WorkerHello(version=1, worker="x" * 1_000_000)
    for _ in range(10):
        pipe.send(big)
    await pipe.run(lambda _message: None)


def _read_all(raw: socket.socket) -> bytes:
    data = b""
    while chunk := raw.recv(1 << 16):
        data += chunk
    return data

"""Small pieces of an answer close behind each other: what is held, until when, and what is never held."""

import asyncio
from collections.abc import AsyncIterator, Callable
from unittest.mock import Mock

import anyio
import pytest

from snowdrop.gateway.upstream import connection as connection_module
from snowdrop.gateway.upstream.connection import BrokenError, Connection
from snowdrop.gateway.upstream.pulse import HELD_BYTES_MAX, Pulse

pytestmark = pytest.mark.anyio
WAIT_S_MAX = 5.0
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


class HandPulse(Pulse):
    """Beats when it is told to."""

    def hold(self, let_go: Callable[[], None]) -> None:
        self._holding.append(let_go)

    def beat(self) -> None:
        self._beat()


@pytest.fixture
def pulse() -> HandPulse:
    return HandPulse()


@pytest.fixture
async def connection(pulse: HandPulse, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Connection]:
    monkeypatch.setattr(connection_module, "PULSE_S", 1e6)  # whatever comes after a piece comes close behind it
    made = Connection(pulse)
    made.connection_made(Mock(spec=asyncio.Transport))
    with anyio.fail_after(WAIT_S_MAX):
        yield made


def piece(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def streaming(connection: Connection, *, whole: bool = True) -> None:
    """The head and a first piece have come, and the piece was taken."""
    connection.begin(b"", method="POST", whole=whole)
    connection.data_received(CHUNKED + piece(b"first"))
    assert await connection.chunk() == b"first"


async def settled() -> None:
    """Whoever was woken has run."""
    for _ in range(5):
        await asyncio.sleep(0)


async def is_held(connection: Connection) -> bool:
    """Whether somebody who asks for the next piece waits."""
    taken: list[bytes] = []

    async def take() -> None:
        taken.append(await connection.chunk())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take)
        await settled()
        tasks.cancel_scope.cancel()
    return not taken


async def test_what_follows_close_behind_waits_for_the_beat_and_goes_on_together(
    connection: Connection, pulse: HandPulse
) -> None:
    await streaming(connection)
    connection.data_received(piece(b"second"))
    connection.data_received(piece(b"third"))
    assert await is_held(connection)
    pulse.beat()
    assert await connection.chunk() == b"secondthird"


async def test_whoever_waits_already_is_woken_by_the_beat(connection: Connection, pulse: HandPulse) -> None:
    await streaming(connection)
    taken: list[bytes] = []

    async def take() -> None:
        taken.append(await connection.chunk())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take)
        await settled()
        connection.data_received(piece(b"second"))
        await settled()
        assert taken == []
        pulse.beat()
    assert taken == [b"second"]


async def test_the_end_of_the_answer_waits_for_no_beat(connection: Connection) -> None:
    await streaming(connection)
    connection.data_received(piece(b"last"))
    connection.data_received(b"0\r\n\r\n")
    assert await connection.chunk() == b"last"
    assert await connection.chunk() == b""


async def test_what_came_before_the_replica_died_is_given_out_at_once(connection: Connection) -> None:
    await streaming(connection)
    connection.data_received(piece(b"last"))
    connection.connection_lost(None)
    assert await connection.chunk() == b"last"
    with pytest.raises(BrokenError):
        await connection.chunk()


async def test_much_is_not_held(connection: Connection) -> None:
    await streaming(connection)
    connection.data_received(piece(b"x"))
    connection.data_received(piece(b"y" * HELD_BYTES_MAX))
    assert len(await connection.chunk()) == HELD_BYTES_MAX + 1


async def test_nothing_is_held_where_both_sides_may_speak_in_turns(connection: Connection) -> None:
    await streaming(connection, whole=False)
    connection.data_received(piece(b"second"))
    assert await connection.chunk() == b"second"


async def test_nothing_is_held_in_a_tunnel(connection: Connection) -> None:
    connection.begin(b"", method="GET", whole=True)
    connection.data_received(b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nfirst")
    assert await connection.chunk() == b"first"
    connection.data_received(b"second")
    assert await connection.chunk() == b"second"


async def test_the_next_answer_begins_anew(connection: Connection) -> None:
    await streaming(connection)
    connection.data_received(b"0\r\n\r\n")
    assert await connection.chunk() == b""
    await streaming(connection)


async def test_the_beat_comes_by_itself() -> None:
    beaten = anyio.Event()
    Pulse().hold(beaten.set)
    with anyio.fail_after(WAIT_S_MAX):
        await beaten.wait()

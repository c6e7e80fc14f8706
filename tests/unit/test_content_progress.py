import mmap
import os
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from snowdrop.content import progress as progress_module
from snowdrop.content.progress import (
    WANTS_MAX,
    FillState,
    ProgressReader,
    ProgressWriter,
    decode_wants,
)
from snowdrop.domain.errors import (
    ErrorBody,
    IntegrityError,
    PlatformDownError,
    ProtocolError,
    SnowdropError,
    TimedOutError,
)
from snowdrop.wire.packet import packet_pair

EXTENTS = [(0, 100, 0), (100, 50, 1), (4096, 100, 0), (4196, 10, 2)]
"""Chunk 0 lies in two places."""
JOIN_S_MAX = 10.0


class Ends:
    def __init__(self, extents: list[tuple[int, int, int]] = EXTENTS, chunks: int = 3) -> None:
        self.writer = ProgressWriter(extents, chunks, sum(extent[1] for extent in extents))
        self.theirs, ours = packet_pair()
        self.theirs.setblocking(False)
        self.reader = ProgressReader(self.writer.fileno(), ours)

    def close(self) -> None:
        self.reader.close()
        self.theirs.close()
        self.writer.close()

    def wants(self) -> list[int]:
        """Of the next packet; empty if there is none."""
        try:
            return decode_wants(self.theirs.recv(1 << 16), 1 << 31)
        except BlockingIOError:
            return []

    def waiting(self, wait: Callable[[], None]) -> tuple[threading.Thread, list[SnowdropError]]:
        errors: list[SnowdropError] = []

        def run() -> None:
            try:
                wait()
            except SnowdropError as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread, errors


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


def ended(thread: threading.Thread) -> bool:
    thread.join(JOIN_S_MAX)
    return not thread.is_alive()


def test_a_stretch_is_filled_when_all_that_touch_it_are(ends: Ends) -> None:
    assert ends.reader.total_bytes == 260
    assert ends.reader.is_filled(150, 3000), "padding between files waits for nothing"
    ends.writer.mark(0, 200)
    ends.writer.mark(0, 200)
    assert ends.reader.filled_bytes == 200
    assert ends.reader.is_filled(0, 100)
    assert ends.reader.is_filled(4096, 100)
    assert not ends.reader.is_filled(99, 2)
    assert not ends.reader.is_filled(0, 101)
    ends.writer.unmark(0, 200)
    assert not ends.reader.is_filled(0, 1)
    assert ends.reader.filled_bytes == 0


def test_a_reader_gets_a_map_that_it_cannot_write(ends: Ends) -> None:
    fd = ends.writer.fileno()
    with pytest.raises(PermissionError):
        mmap.mmap(fd, 0)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"\1", 64)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 1)


def test_a_wait_asks_first_and_ends_when_the_bytes_are_there(ends: Ends) -> None:
    thread, errors = ends.waiting(lambda: ends.reader.wait(90, 20, JOIN_S_MAX))
    ends.theirs.setblocking(True)
    assert ends.wants() == [0, 1]
    ends.writer.mark(1, 50)
    ends.theirs.send(b"\0")
    ends.writer.mark(0, 200)
    ends.theirs.send(b"\0")
    assert ended(thread)
    assert errors == []


def test_many_threads_wait_on_one_socket(ends: Ends) -> None:
    waits = [
        ends.waiting(lambda offset=offset: ends.reader.wait(offset, 1, JOIN_S_MAX))  # type: ignore[misc]
        for offset in (0, 100, 4196, 4100, 0)
    ]
    for chunk in (2, 0, 1):
        ends.writer.mark(chunk, 10)
        ends.theirs.send(b"\0")
    assert all(ended(thread) for thread, _ in waits)
    assert all(errors == [] for _, errors in waits)


def test_without_wake_ups_the_map_is_looked_at_anyway(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "POLL_S_MAX", 0.001)
    thread, errors = ends.waiting(lambda: ends.reader.wait_all(JOIN_S_MAX))
    for chunk in range(3):
        ends.writer.mark(chunk, 1)
    assert ended(thread)
    assert errors == []


def test_waiting_for_all_asks_only_when_told_to(ends: Ends) -> None:
    with pytest.raises(TimedOutError, match="0 of 260") as caught:
        ends.reader.wait_all(0)
    assert "timeout_s=0" in caught.value.where
    assert ends.wants() == []
    with pytest.raises(TimedOutError):
        ends.reader.wait_all(0, wants=True)
    assert ends.wants() == [0, 1, 0, 2]


def test_a_long_stretch_is_asked_for_in_bounded_packets(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 3 * WANTS_MAX
    ends = Ends([(index * 10, 10, index) for index in range(count)], count)
    try:
        thread, errors = ends.waiting(lambda: ends.reader.wait(0, count * 10, JOIN_S_MAX))
        ends.theirs.setblocking(True)
        asked: list[int] = []
        while len(set(asked)) < count:
            wants = ends.wants()
            assert 0 < len(wants) <= WANTS_MAX
            asked += wants
            for chunk in wants:
                ends.writer.mark(chunk, 10)
            ends.theirs.send(b"\0")
        assert ended(thread)
        assert errors == []
        assert asked[0] == 0
    finally:
        ends.close()


def test_a_failed_fill_gives_its_error_to_all_but_what_is_there_is_there(ends: Ends) -> None:
    ends.writer.mark(1, 50)
    ends.writer.set_state(FillState.FAILED, IntegrityError("chunk 2 is wrong", where="pack").body())
    ends.reader.wait(100, 50, 0)
    with pytest.raises(IntegrityError, match="chunk 2 is wrong"):
        ends.reader.wait(0, 1, JOIN_S_MAX)
    assert ends.reader.state is FillState.FAILED
    ends.writer.set_state(FillState.FILLING)
    with pytest.raises(TimedOutError):
        ends.reader.wait(0, 1, 0)


def test_an_error_of_any_length_fits(ends: Ends) -> None:
    ends.writer.set_state(FillState.FAILED, ErrorBody(kind="integrity", message="x" * 100_000, where="y" * 9000))
    with pytest.raises(IntegrityError, match="xxx"):
        ends.reader.wait(0, 1, JOIN_S_MAX)


def test_a_data_plane_that_goes_away_ends_the_wait(ends: Ends) -> None:
    ends.writer.mark(0, 200)
    thread, errors = ends.waiting(lambda: ends.reader.wait(0, 150, JOIN_S_MAX))
    ends.theirs.close()
    assert ended(thread)
    assert [type(error) for error in errors] == [PlatformDownError]
    ends.reader.wait(0, 100, 0)


def test_closing_ends_the_waits_of_other_threads(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "POLL_S_MAX", 0.001)
    thread, errors = ends.waiting(lambda: ends.reader.wait(0, 1, JOIN_S_MAX))
    ends.reader.close()
    assert ended(thread)
    assert [type(error) for error in errors] == [PlatformDownError]


def test_what_is_no_progress_map_is_refused() -> None:
    with socket.socket() as wake:
        for data in (b"", b"SDPROG\0\1", b"x" * 10_000):
            fd = os.memfd_create("junk")
            os.write(fd, data)
            with pytest.raises(ProtocolError):
                ProgressReader(fd, wake)
            os.close(fd)


@pytest.mark.parametrize(
    ("packet", "wanted"),
    [(b"", []), (b"\1", []), (b"\1\0\0\0\2", [1]), (b"\1\0\0\0\377\377\377\377\0\0\0\0", [1, 0])],
)
def test_wants_that_name_no_chunk_are_left_out(packet: bytes, wanted: list[int]) -> None:
    assert decode_wants(packet, 3) == wanted
    assert len(decode_wants(bytes(4 * WANTS_MAX + 400), 1)) == WANTS_MAX

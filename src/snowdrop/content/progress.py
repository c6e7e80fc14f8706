"""How far a landing area is filled, as its readers see it: a small memfd, and a socket that wakes them.

The data plane writes the map and never waits for a reader; a reader maps it read-only. A chunk's byte is set only
when verified bytes are in place everywhere in the area, so a reader that finds the byte set may read at once.

    header     64 bytes: magic, counts, state, bytes of the error, filled bytes, total bytes
    extents    one record (area offset u64, length u32, chunk u32) per stretch of the area, ascending
    chunks     one byte each: 0 missing, 1 filled
    error      the ErrorBody as JSON, if the state is FAILED; room for ERROR_BYTES_MAX

All numbers are little-endian. The other direction of the socket carries wants: chunk numbers that a reader waits
for, as u32, most urgent first.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import socket
import struct
import threading
import time
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from contextlib import suppress
from enum import IntEnum

import msgspec

from snowdrop.domain.errors import ErrorBody, PlatformDownError, ProtocolError, TimedOutError, error_from_body

MAGIC = b"SDPROG\0\1"
WANTS_MAX = 1024
"""Chunks in one want packet."""
POLL_S_MAX = 0.25
"""A reader looks at the map at least so often: another process may have taken the wake-up of a shared socket."""
ERROR_BYTES_MAX = 4096
DRAIN_PACKETS_MAX = 4096

F_SEAL_FUTURE_WRITE = 0x10
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
"""After these, only mappings made before can write; whoever gets the descriptor can read."""

_HEADER = struct.Struct("<8s4I2Q")
_HEADER_BYTES = 64
_EXTENT = struct.Struct("<QII")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_STATE_AT, _ERROR_AT, _FILLED_AT = 16, 20, 24


class FillState(IntEnum):
    """What the data plane does with the area. FILLING includes lazy areas in which nobody wants anything."""

    FILLING = 0
    COMPLETE = 1
    FAILED = 2


class ProgressWriter:
    """The data plane's side. `filled` is the chunk map itself; methods may be called from any thread."""

    def __init__(self, extents: Sequence[tuple[int, int, int]], chunk_count: int, total_bytes: int) -> None:
        """`extents` are (area offset, length, chunk) in ascending order of offset."""
        map_at = _HEADER_BYTES + len(extents) * _EXTENT.size
        self._error_at = map_at + chunk_count
        size = self._error_at + ERROR_BYTES_MAX
        self._fd = os.memfd_create("snowdrop-progress", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, size)
            self._map = mmap.mmap(self._fd, size)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, SEALS)
        except OSError:
            os.close(self._fd)
            raise
        _HEADER.pack_into(self._map, 0, MAGIC, len(extents), chunk_count, FillState.FILLING, 0, 0, total_bytes)
        at = _HEADER_BYTES
        for extent in extents:
            _EXTENT.pack_into(self._map, at, *extent)
            at += _EXTENT.size
        self._view = memoryview(self._map)
        self.filled = self._view[map_at : self._error_at]
        self.total_bytes = total_bytes
        self.filled_bytes = 0
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """The memfd, sealed: duplicate it to keep it."""
        return self._fd

    @property
    def state(self) -> FillState:
        return FillState(_U32.unpack_from(self._map, _STATE_AT)[0])

    def mark(self, chunk: int, area_bytes: int) -> None:
        """The chunk is in place everywhere in the area, where it takes `area_bytes` in all."""
        with self._lock:
            if not self.filled[chunk]:
                self.filled[chunk] = 1
                self._add(area_bytes)

    def unmark(self, chunk: int, area_bytes: int) -> None:
        """The chunk's bytes are no longer believed."""
        with self._lock:
            if self.filled[chunk]:
                self.filled[chunk] = 0
                self._add(-area_bytes)

    def set_state(self, state: FillState, error: ErrorBody | None = None) -> None:
        """Goes to `state`; FAILED carries why, for every reader that waits now or comes later."""
        text = b"" if error is None else _encoded(error)
        with self._lock:
            self._map[self._error_at : self._error_at + len(text)] = text
            _U32.pack_into(self._map, _ERROR_AT, len(text))
            _U32.pack_into(self._map, _STATE_AT, state)

    def close(self) -> None:
        """Readers keep their mappings. Whoever still looks at `filled` finds nothing there."""
        # Not released by hand: another thread may be looking. The mapping goes with the last reference.
        self.filled = memoryview(bytes(len(self.filled)))
        self._view = memoryview(b"")
        self._map = mmap.mmap(-1, len(self._map))
        os.close(self._fd)

    def _add(self, area_bytes: int) -> None:
        self.filled_bytes += area_bytes
        _U64.pack_into(self._map, _FILLED_AT, self.filled_bytes)


def _encoded(error: ErrorBody) -> bytes:
    text = msgspec.json.encode(error)
    if len(text) > ERROR_BYTES_MAX:
        short = msgspec.structs.replace(error, message=error.message[:500], where=error.where[:200], fields=[])
        text = msgspec.json.encode(short)
    return text if len(text) <= ERROR_BYTES_MAX else msgspec.json.encode(ErrorBody(kind=error.kind, message=""))


class ProgressReader:
    """A reader's side, for any number of its threads. `close` ends the waits of the others."""

    def __init__(self, progress_fd: int, wake: socket.socket) -> None:
        """`progress_fd` stays the caller's, who may close it at once; `wake` is taken over.

        Raises ProtocolError if the descriptor is not a progress map.
        """
        size = os.fstat(progress_fd).st_size
        if size < _HEADER_BYTES + ERROR_BYTES_MAX:
            raise ProtocolError("the progress map is cut short", where=f"{size} bytes")
        self._map = mmap.mmap(progress_fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        magic, extents, chunks, _, _, _, self.total_bytes = _HEADER.unpack_from(self._map, 0)
        self._map_at = _HEADER_BYTES + extents * _EXTENT.size
        self._error_at = self._map_at + chunks
        if magic != MAGIC or self._error_at + ERROR_BYTES_MAX != size:
            self._map.close()
            raise ProtocolError("not a progress map of this version", where=repr(magic))
        self._extents = [_EXTENT.unpack_from(self._map, _HEADER_BYTES + i * _EXTENT.size) for i in range(extents)]
        self._starts = [extent[0] for extent in self._extents]
        self._wake = wake
        self._wake.setblocking(False)
        self._turn = threading.Condition()
        self._is_receiving = False
        self._is_gone = False
        self._is_closed = False

    @property
    def state(self) -> FillState:
        return FillState(_U32.unpack_from(self._map, _STATE_AT)[0])

    @property
    def filled_bytes(self) -> int:
        filled: int = _U64.unpack_from(self._map, _FILLED_AT)[0]
        return filled

    def is_filled(self, offset: int, length: int) -> bool:
        """Whether every byte of this stretch of the area is in place."""
        return not self._missing(self._first(offset), offset, offset + length)

    def wait(self, offset: int, length: int, timeout_s: float) -> None:
        """Blocks until the stretch is in place, having asked for it first.

        Raises TimedOutError, PlatformDownError if the data plane is gone and the bytes are not there, or why the
        area cannot be filled.
        """
        self._wait(offset, length, timeout_s, wants=True)

    def wait_all(self, timeout_s: float, *, wants: bool = False) -> None:
        """Blocks until the whole area is in place; `wants` asks for it, as a lazy area needs. Raises as `wait`."""
        if self._starts:
            end = self._starts[-1] + self._extents[-1][1]
            self._wait(0, end, timeout_s, wants=wants)

    def ask(self, stretches: Iterable[tuple[int, int]]) -> None:
        """Says in one packet what will be waited for: (offset, length), most urgent first, as far as it misses."""
        chunks: dict[int, None] = {}
        for offset, length in stretches:
            room = WANTS_MAX - len(chunks)
            if room == 0:
                break
            missing = self._missing(self._first(offset), offset, offset + length, room)
            chunks.update(dict.fromkeys(self._extents[index][2] for index in missing))
        if chunks:
            self.want(chunks)

    def want(self, chunks: Iterable[int]) -> bool:
        """Asks for chunks, most urgent first, at most WANTS_MAX; False if the packet could not be sent now."""
        packet = b"".join(_U32.pack(chunk) for chunk in chunks)
        try:
            self._wake.send(packet)
        except BlockingIOError:
            return False
        except OSError:
            self._is_gone = True
        return True

    def close(self) -> None:
        """Waits of other threads end with an error within POLL_S_MAX."""
        with self._turn:
            if self._is_closed:
                return
            self._is_closed = True
            self._turn.notify_all()
            # A thread that listens closes the socket when it comes back: its number must not go to another file
            # meanwhile. The map is not closed by hand either, as a wait may just begin: it goes with the reader.
            if not self._is_receiving:
                self._wake.close()

    def _first(self, offset: int) -> int:
        return max(0, bisect_right(self._starts, offset) - 1)

    def _missing(self, first: int, offset: int, end: int, at_most: int = 1) -> list[int]:
        """The first extents, from `first` on, that touch the stretch and are not in place."""
        missing: list[int] = []
        for index in range(first, len(self._starts)):
            start, size, chunk = self._extents[index]
            if start >= end or len(missing) == at_most:
                break
            if start + size > offset and not self._map[self._map_at + chunk]:
                missing.append(index)
        return missing

    def _wait(self, offset: int, length: int, timeout_s: float, *, wants: bool) -> None:
        first, end = self._first(offset), offset + length
        if not self._missing(first, offset, end):
            return
        deadline_s = time.monotonic() + timeout_s
        asked: set[int] = set()
        with self._turn:
            while True:
                self._check_open()
                missing = self._missing(first, offset, end, WANTS_MAX if wants else 1)
                if not missing:
                    return
                first = missing[0]  # what lies before is in place and stays so
                self._check_hope()
                if wants:
                    self._ask([self._extents[index][2] for index in missing], asked)
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise TimedOutError(
                        f"the model's bytes are not there: {self.filled_bytes} of {self.total_bytes} are",
                        where=f"timeout_s={timeout_s:g}",
                        next_step="raise the bound, or see the origin's speed in the receipt",
                    )
                self._rest(min(left_s, POLL_S_MAX))

    def _ask(self, missing: list[int], asked: set[int]) -> None:
        """Keeps between half a packet and a packet and a half of wants with the data plane."""
        open_wants = sum(chunk in asked for chunk in missing)
        if open_wants < len(missing) and open_wants <= WANTS_MAX // 2 and self.want(missing):
            asked.update(missing)

    def _rest(self, s_max: float) -> None:
        """One thread listens for all; the others wait for it. Called with `_turn` held."""
        if self._is_receiving:
            self._turn.wait(s_max)
            return
        self._is_receiving = True
        self._turn.release()
        try:
            poller = select.poll()
            poller.register(self._wake, select.POLLIN)
            if poller.poll(s_max * 1000):
                self._drain()
        finally:
            self._turn.acquire()
            self._is_receiving = False
            if self._is_closed:
                self._wake.close()
            self._turn.notify_all()

    def _drain(self) -> None:
        with suppress(BlockingIOError):
            for _ in range(DRAIN_PACKETS_MAX):
                try:
                    if not self._wake.recv(16):
                        self._is_gone = True
                        return
                except ConnectionError:
                    self._is_gone = True
                    return

    def _check_open(self) -> None:
        if self._is_closed:
            raise PlatformDownError("the model was closed while it was waited for", where="progress")

    def _check_hope(self) -> None:
        if self.state is FillState.FAILED:
            (size,) = _U32.unpack_from(self._map, _ERROR_AT)
            text = self._map[self._error_at : self._error_at + size]
            raise error_from_body(msgspec.json.decode(text, type=ErrorBody))
        if self._is_gone:
            raise PlatformDownError(
                "the node's data plane ended while the model was loaded",
                where="data plane",
                next_step="the agent restarts it; ask for the model again",
            )


def decode_wants(packet: bytes, chunk_count: int) -> list[int]:
    """The chunks of one want packet, from a reader that is not trusted: what is no chunk is left out."""
    whole = packet[: min(len(packet), 4 * WANTS_MAX) & ~3]
    return [chunk for (chunk,) in _U32.iter_unpack(whole) if chunk < chunk_count]

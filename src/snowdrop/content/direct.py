"""Reading a file past the page cache, straight to where the bytes belong.

O_DIRECT wants file offset, length and memory aligned. A landing area lies so that a file's offset and the address
of its bytes are congruent: the middle of a read goes in place, only a page at each end takes a detour. Reads into
any other memory go through aligned scratch memory.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ALIGNMENT = 4096
"""Enough for every disk that is sold; a file system that wants more answers EINVAL and is read buffered."""

SCRATCH_BYTES = 4 << 20
SCRATCHES_MAX = 4
"""Scratch buffers that are kept for the next read; more readers at once make and drop their own."""


def address_of(view: memoryview) -> int:
    """Where writable `view` lies in memory."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) if len(view) else 0


def is_congruent(view: memoryview, offset: int) -> bool:
    return (address_of(view) - offset) % ALIGNMENT == 0


def read_direct(fd: int, offset: int, into: memoryview) -> bool:
    """Fills `into` from `offset` of a file opened with O_DIRECT; False if the file ends before.

    Touches no byte outside of `into`. Raises OSError, EINVAL where the file system refuses.
    """
    begin = offset + -offset % ALIGNMENT
    end = (offset + len(into)) // ALIGNMENT * ALIGNMENT
    if end <= begin or not is_congruent(into, offset):
        return _read_aside(fd, offset, into)
    head, tail = begin - offset, offset + len(into) - end
    with _scratches.taken() as scratch:
        buffers = [into[head : head + end - begin]]
        if head:
            buffers.insert(0, scratch[:ALIGNMENT])
        if tail:
            buffers.append(scratch[ALIGNMENT : 2 * ALIGNMENT])
        got = os.preadv(fd, buffers, begin - ALIGNMENT if head else begin)
        got -= ALIGNMENT - head if head else 0
        if head and got > 0:
            into[: min(head, got)] = scratch[ALIGNMENT - head : ALIGNMENT - head + min(head, got)]
        if tail and got >= len(into):
            into[-tail:] = scratch[ALIGNMENT : ALIGNMENT + tail]
    if got >= len(into):
        return True
    # Either the end of the file or a read that was cut short: asking for the rest tells which.
    done = max(0, min(got, head + end - begin))
    return _read_aside(fd, offset + done, into[done:])


def read_buffered(fd: int, offset: int, into: memoryview) -> bool:
    """Fills `into` from `offset` through the page cache; False if the file ends before."""
    done = 0
    while done < len(into):
        count = os.preadv(fd, [into[done:]], offset + done)
        if count == 0:
            return False
        done += count
    return True


def _read_aside(fd: int, offset: int, into: memoryview) -> bool:
    done = 0
    with _scratches.taken() as scratch:
        while done < len(into):
            skip = (offset + done) % ALIGNMENT
            want = min(len(into) - done + skip, SCRATCH_BYTES)
            window = scratch[: -(-want // ALIGNMENT) * ALIGNMENT]
            got = min(os.preadv(fd, [window], offset + done - skip), want) - skip
            if got <= 0:
                return False
            into[done : done + got] = window[skip : skip + got]
            done += got
    return True


class _Scratches:
    """Page-aligned buffers. Anonymous maps: they cost memory only where they were touched."""

    def __init__(self) -> None:
        self._free: list[memoryview] = []
        self._lock = threading.Lock()

    @contextmanager
    def taken(self) -> Iterator[memoryview]:
        with self._lock:
            scratch = self._free.pop() if self._free else None
        if scratch is None:
            scratch = memoryview(mmap.mmap(-1, SCRATCH_BYTES))
        try:
            yield scratch
        finally:
            with self._lock:
                if len(self._free) < SCRATCHES_MAX:
                    self._free.append(scratch)


_scratches = _Scratches()

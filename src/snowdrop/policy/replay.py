"""What a start read of an image, and what to fetch ahead for the next one. Pure: reads in, extents out.

Nothing here can make a start wrong: what is fetched ahead in vain costs time, and what is missing is fetched when
it is read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from snowdrop.domain.image import ALIGN_BYTES
from snowdrop.domain.imagetrace import TRACE_EXTENTS_MAX, Stretch

UNITS_MAX = 1 << 22
"""A record takes one byte for each unit of `data`: 16 GiB are kept in blocks of 4 KiB, more in larger ones."""
WINDOW_BYTES = 16 << 20
WINDOWS_MAX = 4
"""Fetched ahead at once. More than a link of 10 Gbit/s and 50 ms holds; a start that ends early wastes no more."""
CHANGED_SHARE = 0.1
"""A trace is replaced by the next one if they differ in more than so much of it."""


class Place(NamedTuple):
    """Where a chunk lies in `data`."""

    offset: int
    length: int
    chunk: int


class ReadRecord:
    """Takes the reads of one start. Each byte counts once; what is beyond TRACE_EXTENTS_MAX is left out."""

    def __init__(self, data_bytes: int) -> None:
        self._data_bytes = data_bytes
        self._unit = ALIGN_BYTES
        while data_bytes > self._unit * UNITS_MAX:
            self._unit *= 2
        self._seen = bytearray(-(-data_bytes // self._unit))
        self._found: list[tuple[int, int]] = []
        self.is_cut = False

    def seen(self, offset: int, length: int) -> None:
        """A read of `length` bytes at `offset`."""
        at = max(0, offset) // self._unit
        end = min(-(-(offset + length) // self._unit), len(self._seen))
        at = self._seen.find(0, at, end)
        while at >= 0:
            stop = self._seen.find(1, at, end)
            stop = end if stop < 0 else stop
            self._seen[at:stop] = b"\1" * (stop - at)
            self._add(at, stop)
            at = self._seen.find(0, stop, end)

    def extents(self) -> tuple[Stretch, ...]:
        """What was read so far, in the order of the first reads."""
        unit = self._unit
        return tuple((at * unit, min(end * unit, self._data_bytes) - at * unit) for at, end in self._found)

    def _add(self, at: int, end: int) -> None:
        if self._found and self._found[-1][1] == at:
            self._found[-1] = self._found[-1][0], end
        elif len(self._found) < TRACE_EXTENTS_MAX:
            self._found.append((at, end))
        else:
            self.is_cut = True


def replay_order(extents: Iterable[Stretch], places: Sequence[Place]) -> list[int]:
    """The chunks that `extents` touch, each once, in their order. `places` ascend by offset."""
    found: dict[int, None] = {}
    for offset, length in extents:
        at = max(0, bisect_right(places, offset, key=lambda place: place.offset) - 1)
        while at < len(places) and places[at].offset < offset + length:
            if places[at].offset + places[at].length > offset:
                found[places[at].chunk] = None
            at += 1
    return list(found)


def windows(chunks: Iterable[int], bytes_of: Callable[[int], int]) -> Iterator[list[int]]:
    """`chunks` in their order, cut into windows of about WINDOW_BYTES: at least one chunk in each."""
    window: list[int] = []
    size = 0
    for chunk in chunks:
        if window and size + bytes_of(chunk) > WINDOW_BYTES:
            yield window
            window, size = [], 0
        window.append(chunk)
        size += bytes_of(chunk)
    if window:
        yield window


def merged(extents: Iterable[Stretch]) -> list[Stretch]:
    """The same bytes, ascending and each once."""
    found: list[Stretch] = []
    for offset, length in sorted(extents):
        if found and offset <= found[-1][0] + found[-1][1]:
            begin, before = found[-1]
            found[-1] = begin, max(before, offset + length - begin)
        elif length > 0:
            found.append((offset, length))
    return found


def covered_bytes(ascending: Sequence[Stretch], offset: int, length: int) -> int:
    """How many bytes of a stretch are in `ascending`, which `merged` has made."""
    at = max(0, bisect_right(ascending, offset, key=lambda stretch: stretch[0]) - 1)
    total = 0
    while at < len(ascending) and ascending[at][0] < offset + length:
        begin, size = ascending[at]
        total += max(0, min(begin + size, offset + length) - max(begin, offset))
        at += 1
    return total


def has_changed(old: Iterable[Stretch], new: Iterable[Stretch]) -> bool:
    """Whether a start reads something else than it did, so that its trace is worth replacing."""
    before, after = merged(old), merged(new)
    before_bytes, after_bytes = (sum(length for _, length in each) for each in (before, after))
    shared = sum(covered_bytes(before, offset, length) for offset, length in after)
    return before_bytes + after_bytes - 2 * shared > CHANGED_SHARE * before_bytes

"""A simulated CUDA device of limited bandwidth, in virtual time, that is strict about what real ones forgive.

Copies take time on a queue of their own; a tensor holds POISON until a stream is ordered behind its copies. A
source that is neither registered nor pinned, or that changes before its copy is done, is an error.
"""

from __future__ import annotations

import ctypes
import weakref
import zlib
from typing import NamedTuple

import torch

from snowdrop.weights.feeds import Region

POISON = 0xA5


class SimClock:
    """Virtual time, in seconds. Whatever makes the host wait moves it forward."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def advance_to(self, time_s: float) -> None:
        self.now_s = max(self.now_s, time_s)


class SimEvent(NamedTuple):
    copies: int
    done_s: float


class _Copy(NamedTuple):
    target: torch.Tensor
    source: memoryview
    checksum: int
    done_s: float


class SimCudaRuntime:
    """What it saw is in its attributes: `in_flight_bytes_most`, `pinned_bytes`, `registered`, `ready_s`."""

    def __init__(
        self,
        clock: SimClock,
        *,
        bytes_per_s: float,
        memory_bytes: int = 1 << 40,
        can_register: bool = True,
        failing_copy: int | None = None,
    ) -> None:
        self._clock = clock
        self._bytes_per_s = bytes_per_s
        self._memory_left = memory_bytes
        self._can_register = can_register
        self._failing_copy = failing_copy
        self._copies: list[_Copy | None] = []
        """None for what is done, landed and forgotten with its source."""
        self._last_done_s = 0.0
        self._landed = 0
        self._checked = 0
        self._free_s = 0.0
        self._pinned: list[tuple[int, int]] = []
        self.registered: set[Region] = set()
        self.registrations = 0
        self.in_flight_bytes_most = 0
        self.pinned_bytes = 0
        self.ready_s = 0.0
        """When what the caller's stream was ordered behind is done."""

    name = "cuda:sim"

    def register(self, region: Region) -> bool:
        if not self._can_register:
            return False
        if any(_overlap(region, other) for other in self.registered):
            raise RuntimeError("this memory is registered already")
        self.registered.add(region)
        self.registrations += 1
        return True

    def unregister(self, region: Region) -> None:
        self._settle()
        if self._last_done_s > self._clock.now_s:
            raise RuntimeError("memory is unregistered while a copy is under way")
        self.registered.remove(region)

    def pinned(self, length: int) -> memoryview:
        view = memoryview(bytearray(length))
        self._pinned.append((_address(view), length))
        self.pinned_bytes += length
        return view

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        made = torch.empty(shape, dtype=dtype)
        if made.nbytes > self._memory_left:
            raise torch.OutOfMemoryError(f"{made.nbytes} bytes asked, {self._memory_left} left")
        self._memory_left -= made.nbytes
        weakref.finalize(made, self._give_back, made.nbytes)
        if made.nbytes:
            made.reshape(-1).view(torch.uint8).fill_(POISON)
        return made

    def copy(self, target: torch.Tensor, offset: int, source: memoryview) -> None:
        if self._failing_copy == len(self._copies):
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nsee the log")
        begin, length = _address(source), len(source)
        regions = [*self.registered, *(Region(*pinned) for pinned in self._pinned)]
        if not any(at <= begin and begin + length <= at + size for at, size in regions):
            raise RuntimeError("the source lies in no single registered or pinned stretch")
        self._settle()
        self._free_s = max(self._free_s, self._clock.now_s) + length / self._bytes_per_s
        flat = target.reshape(-1).view(torch.uint8)[offset : offset + length]
        self._copies.append(_Copy(flat, source, zlib.crc32(source), self._free_s))
        self._last_done_s = self._free_s
        flying = sum(len(copy.source) for copy in self._copies[self._checked :] if copy is not None)
        self.in_flight_bytes_most = max(self.in_flight_bytes_most, flying)

    def record(self) -> SimEvent:
        return SimEvent(len(self._copies), self._last_done_s)

    def is_done(self, event: SimEvent) -> bool:
        self._settle()
        return event.done_s <= self._clock.now_s

    def synchronise(self, event: SimEvent) -> None:
        self._clock.advance_to(event.done_s)
        self._settle()
        self._land(event.copies)

    def order(self, event: SimEvent) -> None:
        self._land(event.copies)
        self.ready_s = max(self.ready_s, event.done_s)

    def _land(self, copies: int) -> None:
        """Bytes become visible to whoever is ordered behind them; when they are there in time is `ready_s`."""
        for copy in self._copies[self._landed : copies]:
            assert copy is not None, "forgotten only when landed"
            copy.target.copy_(torch.frombuffer(copy.source, dtype=torch.uint8))
        self._landed = max(self._landed, copies)
        self._forget()

    def _settle(self) -> None:
        """Looks at the sources of the copies that are done by now."""
        for copy in self._copies[self._checked :]:
            assert copy is not None, "forgotten only when looked at"
            if copy.done_s > self._clock.now_s:
                break
            self._checked += 1
            if zlib.crc32(copy.source) != copy.checksum:
                raise RuntimeError("a source was written to before its copy was done")

        self._forget()

    def _forget(self) -> None:
        done = min(self._landed, self._checked)
        self._copies[:done] = [None] * done

    def _give_back(self, length: int) -> None:
        self._memory_left += length


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def _overlap(one: Region, other: Region) -> bool:
    return one.address < other.address + other.length and other.address < one.address + one.length

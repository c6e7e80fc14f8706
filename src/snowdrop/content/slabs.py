"""Slabs: the memory of landing areas, made once, touched in advance and used again.

A slab is a memfd of one of two sizes, mapped for writing here and sealed against any later writable mapping. The
slabs of one area are moved side by side in this process's address space, so that an area is one stretch of memory
here as it is in its readers. A slab that comes back is zeroed before anyone else gets it: areas are handed out
before they are filled, and nobody may find another artefact's bytes there.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from errno import ENOMEM, ENOSPC
from itertools import pairwise
from pathlib import Path

from snowdrop.content.mapping import HUGE_PAGE_BYTES, move_mapping, reserve, unmap
from snowdrop.content.progress import SEALS
from snowdrop.domain.errors import SnowdropError, StorageFullError
from snowdrop.policy.pool import PoolState

BIG_SLAB_BYTES = 1 << 30
SLAB_BYTES = 64 << 20
SLABS_MAX = 200
"""In one area: their descriptors travel in one packet, beside those of the replica's other models."""
TOUCH_STEP_BYTES = 16 << 20
TOUCH_STEP_S = 0.04
"""Rest between two steps of touching: at most 400 MB/s, so that a start of the node leaves room for work."""

_MADV_HUGEPAGE = 14
MADV_POPULATE_WRITE = 23
MADV_COLLAPSE = 25


class Slab:
    """`size` bytes at `address`. Its owner is an area or the pool."""

    __slots__ = ("address", "fd", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.fd = os.memfd_create("snowdrop-slab", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, size)
            self.address = reserve(size, self.fd)
            madvise(self.address, size, _MADV_HUGEPAGE)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS)
        except (OSError, SnowdropError):
            os.close(self.fd)
            raise

    def touch(self, offset: int, length: int) -> None:
        """Makes the kernel give the pages now, as zeros if they are new: huge ones where it can."""
        for address in range(self.address + offset, self.address + offset + length, HUGE_PAGE_BYTES):
            # Collapsing gives a huge page whatever the machine's setting is (shmem_enabled is "never" by default,
            # and MADV_HUGEPAGE void then), but refuses a stretch that has no page at all.
            ctypes.memset(address, 0, 1)
            if madvise(address, HUGE_PAGE_BYTES, MADV_COLLAPSE) == 0:
                continue
            if madvise(address, HUGE_PAGE_BYTES, MADV_POPULATE_WRITE) != 0:
                # Kernels before 5.14. The pages are zeros already, or will be zeroed.
                ctypes.memset(address, 0, HUGE_PAGE_BYTES)

    def zero(self) -> None:
        """Through the mapping: the pages stay, which is what a pool is for."""
        ctypes.memset(self.address, 0, self.size)

    def close(self) -> None:
        unmap(self.address, self.size)
        os.close(self.fd)


class SlabPool:
    """All slabs of a node that no area has. Methods block and may be called from any thread."""

    def __init__(self, *, big_bytes: int = BIG_SLAB_BYTES, small_bytes: int = SLAB_BYTES) -> None:
        """Sizes are multiples of 2 MiB, the big one of the small one; tests use small ones."""
        if small_bytes % HUGE_PAGE_BYTES or big_bytes % small_bytes:
            raise ValueError(f"slab sizes {big_bytes} and {small_bytes}")
        self.big_bytes = big_bytes
        self.small_bytes = small_bytes
        self._lock = threading.Lock()
        self._free: list[Slab] = []
        self._dirty: list[Slab] = []
        self._area_bytes = 0
        self._closed = threading.Event()

    @property
    def idle_bytes(self) -> int:
        """Zeroed or yet to be zeroed, of no area."""
        with self._lock:
            return sum(slab.size for slab in (*self._free, *self._dirty))

    @property
    def area_bytes(self) -> int:
        """Of slabs that areas have."""
        return self._area_bytes

    def rounded(self, size: int) -> int:
        """What an area of `size` bytes takes."""
        return -(-size // self.small_bytes) * self.small_bytes

    def take(self, size: int) -> list[Slab]:
        """Slabs of zeros for an area of `size` bytes, side by side. Raises StorageFullError, having taken none."""
        slabs: list[Slab] = []
        try:
            left = self.rounded(size)
            while left:
                slab = self._take_one(left, SLABS_MAX - len(slabs))
                slabs.append(slab)
                left -= slab.size
            _lay_side_by_side(slabs)
        except (OSError, SnowdropError) as error:
            self._put_back(slabs)
            if isinstance(error, SnowdropError) or error.errno not in {ENOMEM, ENOSPC}:
                raise
            raise no_memory(size) from error
        return slabs

    def give_back(self, slabs: Sequence[Slab]) -> None:
        """Nobody outside maps them any more, nobody here writes to them. They are zeroed before they are used."""
        with self._lock:
            self._area_bytes -= sum(slab.size for slab in slabs)
            self._dirty += slabs

    def clean(self) -> bool:
        """Zeroes one slab that came back; False if there is none."""
        with self._lock:
            if not self._dirty:
                return False
            slab = self._dirty.pop()
        slab.zero()
        self._keep(slab)
        return True

    def grow(self, size: int) -> None:
        """Makes a slab of `size` bytes and touches it, slowly. Ends early when the pool is closed."""
        slab = Slab(size)
        for offset in range(0, size, TOUCH_STEP_BYTES):
            if self._closed.is_set():
                slab.close()
                return
            slab.touch(offset, min(TOUCH_STEP_BYTES, size - offset))
            self._closed.wait(TOUCH_STEP_S)
        self._keep(slab)

    def shrink(self, size: int) -> None:
        """Gives idle slabs of together at most `size` bytes back to the machine; at least one if any is idle."""
        with self._lock:
            doomed: list[Slab] = []
            for slabs in (self._dirty, self._free):
                for slab in sorted(slabs, key=lambda slab: slab.size):
                    if not doomed or size >= slab.size:
                        slabs.remove(slab)
                        doomed.append(slab)
                        size -= slab.size
        for slab in doomed:
            slab.close()

    def state(self, *, target_bytes: int, limit_bytes: int, is_busy: bool) -> PoolState:
        """The pool and the machine as they are, for the decider."""
        machine, available = machine_memory()
        idle = self.idle_bytes
        # Small slabs first: any model can use them. Big ones spare descriptors.
        smalls = idle < min(target_bytes, self.big_bytes)
        return PoolState(
            target_bytes=target_bytes,
            idle_bytes=idle,
            area_bytes=self._area_bytes,
            limit_bytes=limit_bytes,
            step_bytes=self.small_bytes if smalls else self.big_bytes,
            machine_bytes=machine,
            available_bytes=available,
            pressure_share=memory_pressure(),
            is_busy=is_busy,
        )

    def close(self) -> None:
        """Ends growing, gives back all that is idle."""
        self._closed.set()
        with self._lock:
            slabs = [*self._free, *self._dirty]
            self._free.clear()
            self._dirty.clear()
        for slab in slabs:
            slab.close()

    def _keep(self, slab: Slab) -> None:
        with self._lock:
            is_late = self._closed.is_set()
            if not is_late:
                self._free.append(slab)
        if is_late:
            slab.close()

    def _take_one(self, left: int, slots: int) -> Slab:
        """Of those that are idle the largest that fits; zeroed here if none is clean; new if none is idle."""
        if slots <= 0:
            raise StorageFullError(
                "the model has too many parts for one landing area",
                where=f"slabs_max={SLABS_MAX}",
                next_step="split it, or use its files by `LoadedModel.path`",
            )
        want = self.big_bytes if left >= self.big_bytes else self.small_bytes
        # Small ones instead of a big one only while descriptors suffice for all that is left.
        pieces_spared = slots - 1 - (left // self.big_bytes + left % self.big_bytes // self.small_bytes + 1)
        may_be_small = want == self.small_bytes or pieces_spared >= self.big_bytes // self.small_bytes
        with self._lock:
            slab, is_dirty = self._pick(want, may_be_small=may_be_small)
            self._area_bytes += want if slab is None else slab.size
        if slab is None:
            try:
                return Slab(want)
            except (OSError, SnowdropError):
                self._area_bytes -= want
                raise
        if is_dirty:
            slab.zero()
        return slab

    def _pick(self, want: int, *, may_be_small: bool) -> tuple[Slab | None, bool]:
        sizes = [want, self.small_bytes] if may_be_small else [want]
        for size in sizes:
            for slabs in (self._free, self._dirty):
                for index in range(len(slabs) - 1, -1, -1):
                    if slabs[index].size == size:
                        return slabs.pop(index), slabs is self._dirty
        return None, False

    def _put_back(self, slabs: list[Slab]) -> None:
        with self._lock:
            self._area_bytes -= sum(slab.size for slab in slabs)
            self._free += slabs


def _lay_side_by_side(slabs: Sequence[Slab]) -> None:
    if all(left.address + left.size == right.address for left, right in pairwise(slabs)):
        return
    at = reserve(sum(slab.size for slab in slabs))
    for index, slab in enumerate(slabs):
        try:
            move_mapping(slab.address, slab.size, at)
        except OSError:
            unmap(at, sum(slab.size for slab in slabs[index:]))
            raise
        slab.address = at
        at += slab.size


def no_memory(size: int, place: str = "memory") -> StorageFullError:
    """The error of an area that has no room."""
    return StorageFullError(
        f"no room for a landing area of {size} bytes",
        where=place,
        next_step="scale another deployment down, or raise ram_bytes_max",
    )


def machine_memory() -> tuple[int, int]:
    """The machine's memory and what of it could be used without swapping, in bytes."""
    found = {"MemTotal": 0, "MemAvailable": 0}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in found:
            found[name] = int(value.split()[0]) << 10
    return found["MemTotal"], found["MemAvailable"]


def memory_pressure() -> float:
    """The part of the last ten seconds in which some task waited for memory; 0 if the kernel does not say."""
    with suppress(OSError, ValueError, IndexError):
        first = Path("/proc/pressure/memory").read_text().split()
        return float(first[1].removeprefix("avg10=")) / 100
    return 0.0


def madvise(address: int, length: int, advice: int) -> int:
    return int(_LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), advice))


_LIBC = ctypes.CDLL(None, use_errno=True)

"""What processes and the system hold in memory, and what of a file is in the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

MIB = 1 << 20
PAGE_BYTES = 4096
SAMPLE_S = 0.02
RESIDENT_MAX = 0.01
"""A file is cold if less than this share of it is in the page cache: a page may come back by itself."""
_READ_BYTES = 4 << 20


def private_bytes(pid: int | str = "self") -> int:
    """Private_Clean and Private_Dirty of a process (proc(5): smaps_rollup)."""
    with open(f"/proc/{pid}/smaps_rollup") as lines:
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_"))


def anonymous_bytes(pid: int) -> int:
    """Resident anonymous memory of a process: its heap, its stacks, its copies of pages that it wrote to."""
    with open(f"/proc/{pid}/status") as lines:
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def shared_memory_bytes(pid: int) -> int:
    """Resident shared memory of a process, such as slabs."""
    with open(f"/proc/{pid}/status") as lines:
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssShmem:"))


def system_shared_and_cached_bytes() -> int:
    """Shmem and Cached of the system. Cached includes Shmem, so growth of shared memory counts twice."""
    with open("/proc/meminfo") as lines:
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("Shmem:", "Cached:")))


class PeakSampler:
    """The most anonymous memory that some processes had together while the block ran."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self.before_bytes = self._now()
        self.peak_bytes = self.before_bytes

    def __enter__(self) -> PeakSampler:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, self._now())

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_S):
            self.peak_bytes = max(self.peak_bytes, self._now())

    def _now(self) -> int:
        total = 0
        for pid in self._pids:
            with suppress(FileNotFoundError, ProcessLookupError):
                total += anonymous_bytes(pid)
        return total


def warm(files: Iterable[Path]) -> None:
    """Reads files into the page cache."""
    for path in files:
        with path.open("rb", buffering=0) as source:
            buffer = bytearray(_READ_BYTES)
            while source.readinto(buffer):
                pass


def evict(files: Iterable[Path]) -> None:
    """Drops files from the page cache; raises RuntimeError for one that does not go, as one that is mapped."""
    for path in files:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            share = _resident_share(fd)
        finally:
            os.close(fd)
        if share > RESIDENT_MAX:
            raise RuntimeError(f"{path} is not cold: {share:.0%} of it is in the page cache")


def _resident_share(fd: int) -> float:
    size = os.fstat(fd).st_size
    if size == 0:
        return 0.0
    pages = -(-size // PAGE_BYTES)
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        held = (ctypes.c_ubyte * pages)()
        start = ctypes.c_char.from_buffer(mapped)
        done = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), held)
        del start
        if done != 0:
            raise OSError(ctypes.get_errno(), "mincore")
        return sum(entry & 1 for entry in bytes(held)) / pages

"""Slabs as their readers see them: mapped side by side, so that an area is one stretch of memory.

A private mapping shares the slabs' pages until it is written to; a page written to becomes this process's own.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence

from snowdrop.domain.errors import CorruptContentError, StorageFullError

HUGE_PAGE_BYTES = 2 << 20
"""The mapping begins at a multiple of this, so that huge pages of a slab are mapped as such."""

_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_FAILED = ctypes.c_void_p(-1).value


def map_slabs(fds: Sequence[int], sizes: Sequence[int], *, is_private: bool = True) -> memoryview:
    """The bytes of all slabs, one after the other: writable, private to this process (copy-on-write).

    With `is_private` false, the slabs' own pages, for reading alone: writing to the view ends the process.

    Whatever views the memory keeps it mapped; it is unmapped when the last view is gone. The caller keeps the
    descriptors and may close them at once. `sizes` are multiples of the page size. Raises CorruptContentError if
    a descriptor is smaller than its size, StorageFullError if there is no room in the address space.
    """
    total = sum(sizes)
    for fd, size in zip(fds, sizes, strict=True):
        if size <= 0 or size % mmap.PAGESIZE or os.fstat(fd).st_size < size:
            raise CorruptContentError("a slab does not have its size", where=f"{size} bytes")
    if total == 0:
        return memoryview(bytearray())
    try:
        # The object that owns the reservation unmaps all of it at its end, with what was mapped over it.
        owner = mmap.mmap(
            -1, total + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        )
    except OSError as error:
        raise _no_room(total) from error
    base = ctypes.addressof(ctypes.c_char.from_buffer(owner))
    skipped = -base % HUGE_PAGE_BYTES
    done = skipped
    for fd, size in zip(fds, sizes, strict=True):
        _map_over(base + done, fd, size, is_private=is_private)
        done += size
    return memoryview(owner)[skipped:done]


def _map_over(address: int, fd: int, size: int, *, is_private: bool) -> None:
    access = mmap.PROT_READ | mmap.PROT_WRITE if is_private else mmap.PROT_READ
    kind = mmap.MAP_PRIVATE if is_private else mmap.MAP_SHARED
    got = _mmap(address, size, access, kind | _MAP_FIXED | _MAP_NORESERVE, fd, 0)
    if got == _FAILED:
        raise _no_room(size) from OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _no_room(size: int) -> StorageFullError:
    return StorageFullError(
        f"{size} bytes of a landing area cannot be mapped",
        where="address space",
        next_step="raise the process's limit of memory or of mappings",
    )


_mmap = ctypes.CDLL(None, use_errno=True).mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]

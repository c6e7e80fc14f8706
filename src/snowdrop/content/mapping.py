"""Mappings side by side: how slabs become one stretch of memory, for their readers and for their writer.

A private mapping shares the slabs' pages until it is written to; a page written to becomes this process's own.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence

from snowdrop.domain.errors import CorruptContentError, StorageFullError

HUGE_PAGE_BYTES = 2 << 20
"""Mappings begin at a multiple of this, so that huge pages of a slab are mapped as such."""

_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
_MREMAP_TO = 3  # MREMAP_MAYMOVE | MREMAP_FIXED
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
        # What is only read is reserved as shared, which does not count into RLIMIT_DATA.
        kind = mmap.MAP_PRIVATE if is_private else mmap.MAP_SHARED
        owner = mmap.mmap(-1, total + HUGE_PAGE_BYTES, flags=kind | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    except OSError as error:
        raise _no_room(total) from error
    base = ctypes.addressof(ctypes.c_char.from_buffer(owner))
    skipped = -base % HUGE_PAGE_BYTES
    done = skipped
    for fd, size in zip(fds, sizes, strict=True):
        if is_private:
            _map(base + done, size, mmap.MAP_PRIVATE | _MAP_FIXED | _MAP_NORESERVE, fd)
        else:
            _map(base + done, size, mmap.MAP_SHARED | _MAP_FIXED | _MAP_NORESERVE, fd, prot=mmap.PROT_READ)
        done += size
    return memoryview(owner)[skipped:done]


def map_file(fd: int, size: int) -> memoryview:
    """The first `size` bytes of a file: writable, private to this process (copy-on-write).

    As with `map_slabs` views keep it mapped, and the caller keeps the descriptor; `mmap.mmap` would keep a second
    one for as long as the mapping lasts. `size` is above 0. Raises StorageFullError if it cannot be mapped.
    """
    try:
        owner = mmap.mmap(-1, size, flags=_RESERVED)
    except OSError as error:
        raise _no_room(size) from error
    base = ctypes.addressof(ctypes.c_char.from_buffer(owner))
    _map(base, size, mmap.MAP_PRIVATE | _MAP_FIXED | _MAP_NORESERVE, fd)
    return memoryview(owner)


def reserve(size: int, fd: int = -1) -> int:
    """The address of `size` bytes of address space, aligned to HUGE_PAGE_BYTES; `size` is a multiple of it.

    With `fd` the memory is that file's, shared and writable; without, it cannot be used before something is moved
    there. The caller unmaps it. Raises StorageFullError.
    """
    found = _map(None, size + HUGE_PAGE_BYTES, _RESERVED, -1, prot=0)
    at = found + -found % HUGE_PAGE_BYTES
    if at > found:
        unmap(found, at - found)
    unmap(at + size, found + HUGE_PAGE_BYTES - at)
    if fd >= 0:
        try:
            _map(at, size, mmap.MAP_SHARED | _MAP_FIXED, fd)
        except StorageFullError:
            unmap(at, size)
            raise
    return at


def move_mapping(address: int, size: int, to: int) -> None:
    """Moves a mapping with its pages over reserved address space. Seals do not matter: it is the same mapping."""
    if _mremap(address, size, size, _MREMAP_TO, to) == _FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def unmap(address: int, size: int) -> None:
    if size and _munmap(address, size) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def memory_at(address: int, size: int) -> memoryview:
    """Writable bytes of this process. They do not keep the mapping: the caller does."""
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")


def _map(
    address: int | None, size: int, flags: int, fd: int, *, prot: int = mmap.PROT_READ | mmap.PROT_WRITE
) -> int:
    got = _mmap(address, size, prot, flags, fd, 0)
    if got == _FAILED:
        raise _no_room(size) from OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(got)


def _no_room(size: int) -> StorageFullError:
    return StorageFullError(
        f"{size} bytes cannot be mapped",
        where="address space",
        next_step="raise the process's limit of memory or of mappings",
    )


_LIBC = ctypes.CDLL(None, use_errno=True)
_mmap = _LIBC.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_mremap = _LIBC.mremap
_mremap.restype = ctypes.c_void_p
_mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
_munmap = _LIBC.munmap
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

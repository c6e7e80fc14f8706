"""How much of a file is in the page cache: what decides between mapping it and reading past the cache."""

from __future__ import annotations

import ctypes
import errno
import os
import sys

SAMPLES = 32
_SYS_CACHESTAT = 451
"""The same on every architecture; Linux 6.5 or later."""


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Cachestat(ctypes.Structure):
    _fields_ = (
        ("cached", ctypes.c_uint64),
        ("dirty", ctypes.c_uint64),
        ("writeback", ctypes.c_uint64),
        ("evicted", ctypes.c_uint64),
        ("recently_evicted", ctypes.c_uint64),
    )


def cached_fraction(fd: int, size: int) -> float:
    """0 to 1. A file system that cannot tell (memory file systems among them) counts as cached."""
    if size == 0:
        return 1.0
    try:
        pages = _cached_pages(fd)
    except OSError:
        return sampled_fraction(fd, size)
    if pages == 0:
        # Stacked file systems (overlayfs, FUSE with passthrough) keep them elsewhere: only a read finds them.
        return sampled_fraction(fd, size)
    return min(1.0, pages * os.sysconf("SC_PAGE_SIZE") / size)


def sampled_fraction(fd: int, size: int) -> float:
    """The same by reading single bytes that must not wait, for kernels and sandboxes without cachestat."""
    byte = bytearray(1)
    found = 0
    for i in range(SAMPLES):
        try:
            found += os.preadv(fd, [byte], size * i // SAMPLES, os.RWF_NOWAIT)
        except BlockingIOError:
            continue
        except OSError as error:
            if error.errno in {errno.EOPNOTSUPP, errno.EINVAL}:
                return 1.0
            raise
    return found / SAMPLES


def _cached_pages(fd: int) -> int:
    if not sys.platform.startswith("linux"):
        raise OSError(errno.ENOSYS, "cachestat is Linux")
    stretch, told = _Range(0, 0), _Cachestat()  # a length of 0 is up to the end
    if _syscall(_SYS_CACHESTAT, fd, ctypes.byref(stretch), ctypes.byref(told), 0) != 0:
        raise OSError(ctypes.get_errno(), "cachestat")
    return int(told.cached)


_syscall = ctypes.CDLL(None, use_errno=True).syscall

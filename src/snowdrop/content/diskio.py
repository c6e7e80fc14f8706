"""The calls by which the disk tier changes the disk, all of them, in one place.

Tests put a subclass here: one that fails with ENOSPC, or one that records every call, from which any state that a
power cut could leave is then made.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from errno import EDQUOT, ENOSPC
from pathlib import Path

from snowdrop.domain.errors import SnowdropError, StorageFullError, UnavailableError

_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class DiskIo:
    """Descriptors are opened and closed by the caller. All calls block; errors are OSError."""

    def make_directory(self, path: Path) -> None:
        """Makes sure of a directory at `path`; its parent exists."""
        path.mkdir(exist_ok=True)

    def create(self, path: Path, size: int, mode: int) -> None:
        """Makes sure of a file of exactly `size` bytes at `path`; new bytes are a hole."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.ftruncate(fd, size)
            os.fchmod(fd, mode)
        finally:
            os.close(fd)

    def open(self, path: Path, flags: int) -> int:
        """A descriptor of a file that exists; EINVAL if `flags` has O_DIRECT and the file system has not."""
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)

    def write(self, fd: int, view: memoryview, offset: int) -> None:
        """Writes all of `view` at `offset`. For a descriptor with O_DIRECT all three are aligned."""
        while view:
            count = os.pwrite(fd, view, offset)
            view, offset = view[count:], offset + count

    def begin_write_back(self, fd: int, offset: int, length: int) -> None:
        """Has the kernel begin to write what lies dirty there; nothing is durable for that. Never fails."""
        if _sync_file_range is not None:
            _sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE)

    def sync_data(self, fd: int) -> None:
        os.fdatasync(fd)

    def sync_directory(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def replace(self, source: Path, target: Path) -> None:
        """Renames a file or a directory; a file at `target` goes."""
        source.replace(target)

    def unlink(self, path: Path) -> None:
        """Removes a file if it is there."""
        path.unlink(missing_ok=True)

    def touch(self, path: Path) -> None:
        """Sets the times to now."""
        os.utime(path)

    def remove_tree(self, path: Path) -> None:
        """Removes a directory with all that is in it, as far as that goes: what is left is tried again later."""
        shutil.rmtree(path, ignore_errors=True)


def translated(error: OSError, place: Path) -> SnowdropError:
    """`error` of the cache disk as a typed one."""
    if error.errno in {ENOSPC, EDQUOT}:
        return StorageFullError(
            "the node's cache disk is full",
            where=str(place),
            next_step="free space there, or lower disk_bytes_max so that unused artefacts are dropped earlier",
        )
    return UnavailableError(
        f"the node's cache disk: {error.strerror}",
        where=str(place),
        next_step="check the disk and its permissions",
    )

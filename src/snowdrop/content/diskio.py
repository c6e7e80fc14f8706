"""The few calls by which the disk tier changes the disk, in one place.

Tests put a subclass here: one that fails with ENOSPC, or one that records and drops what was not yet synced.
"""

from __future__ import annotations

import os
from pathlib import Path


class DiskIo:
    """Descriptors are opened and closed by the caller. All calls block; errors are OSError."""

    def create(self, path: Path, size: int, mode: int) -> None:
        """Makes sure of a file of exactly `size` bytes at `path`; new bytes are a hole."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.ftruncate(fd, size)
            os.fchmod(fd, mode)
        finally:
            os.close(fd)

    def write(self, fd: int, view: memoryview, offset: int) -> None:
        """Writes all of `view` at `offset`."""
        while view:
            count = os.pwrite(fd, view, offset)
            view, offset = view[count:], offset + count

    def sync_data(self, fd: int) -> None:
        os.fdatasync(fd)

    def sync_directory(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def replace(self, source: Path, target: Path) -> None:
        source.replace(target)

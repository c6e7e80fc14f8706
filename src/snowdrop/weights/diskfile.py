"""A safetensors file on disk, of which every later look must find the same bytes as the first."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from stat import S_ISDIR
from typing import NamedTuple

from snowdrop.domain.errors import CorruptContentError


class DiskFile(NamedTuple):
    """`name` is for errors: the path as its user gave it, or relative to the model's directory."""

    name: str
    path: Path
    size: int
    identity: tuple[int, int, int, int]

    @classmethod
    def look(cls, path: Path, name: str) -> DiskFile:
        """Raises OSError as `open` does, CorruptContentError if it is empty."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            stat = os.fstat(fd)
        finally:
            os.close(fd)
        if S_ISDIR(stat.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if stat.st_size == 0:
            raise CorruptContentError(
                "file is empty", where=name, next_step="fetch the file again from where it came"
            )
        return cls(name, path, stat.st_size, _identity(stat))

    def open(self, flags: int = 0) -> int:
        """A descriptor for reading, the caller's. Raises CorruptContentError if it is another file by now."""
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | flags)
        if _identity(os.fstat(fd)) != self.identity:
            os.close(fd)
            raise CorruptContentError(
                "the file was changed or replaced while it was read",
                where=self.name,
                next_step="load it again when nobody writes to it",
            )
        return fd


def _identity(stat: os.stat_result) -> tuple[int, int, int, int]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns

"""The origin: the region's object store, where packs and manifests are.

Objects are at most 64 MiB by the format, so they are put whole. Calls block and are made from threads; whoever
cancels a load does so between two ranges.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import suppress
from errno import EDQUOT, EISDIR, ENOENT, ENOSPC, ENOTDIR
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from snowdrop.content.paths import parse_tree_path
from snowdrop.domain.errors import (
    IntegrityError,
    InvalidInputError,
    NotFoundError,
    SnowdropError,
    StorageFullError,
    UnavailableError,
)
from snowdrop.domain.ids import fresh_id

_TEMPORARY = ".tmp"


class Origin(Protocol):
    """Keys are tree paths. Every method may be called from several threads at once.

    Missing objects raise NotFoundError, a full store StorageFullError, anything else that may pass
    UnavailableError.
    """

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Stores an object, durable when this returns; a reader sees all of it or nothing."""

    def exists(self, key: str) -> bool: ...

    def size(self, key: str) -> int:
        """The object's length in bytes."""

    def read_range(self, key: str, offset: int, into: memoryview) -> None:
        """Fills `into` with the bytes from `offset`; raises IntegrityError if the object ends before."""

    def list(self, prefix: str) -> Iterator[str]:
        """Keys that begin with `prefix`, in no particular order."""

    def delete(self, key: str) -> None:
        """Removes an object; does nothing if there is none."""


def open_origin(url: str) -> Origin:
    """The origin at `url`; raises InvalidInputError that says which schemes are served."""
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.scheme != "file" or parts.netloc not in {"", "localhost"} or not path.startswith("/") or "\0" in path:
        raise InvalidInputError(
            f"origin {url!r} cannot be opened",
            where="origin_url",
            next_step="this version serves directories only: file:///absolute/path",
        )
    return DirectoryOrigin(Path(path))


def _missing(key: str) -> NotFoundError:
    return NotFoundError("the origin has no such object", where=key, next_step="push the artefact again")


def _cut_short(key: str, wanted: int, got: int) -> IntegrityError:
    return IntegrityError(
        f"object has {got} of the {wanted} bytes wanted from it", where=key, next_step="push the artefact again"
    )


class MemoryOrigin:
    """An origin in memory, for tests and for running without a disk."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def put(self, key: str, data: bytes | memoryview) -> None:
        with self._lock:
            self.objects[parse_tree_path(key, error=InvalidInputError)] = bytes(data)

    def exists(self, key: str) -> bool:
        return key in self.objects

    def size(self, key: str) -> int:
        return len(self._get(key))

    def read_range(self, key: str, offset: int, into: memoryview) -> None:
        piece = self._get(key)[offset : offset + len(into)]
        if len(piece) != len(into):
            raise _cut_short(key, len(into), len(piece))
        into[:] = piece

    def list(self, prefix: str) -> Iterator[str]:
        with self._lock:
            keys = list(self.objects)
        return (key for key in keys if key.startswith(prefix))

    def delete(self, key: str) -> None:
        with self._lock:
            self.objects.pop(key, None)

    def _get(self, key: str) -> bytes:
        try:
            return self.objects[key]
        except KeyError:
            raise _missing(key) from None


class DirectoryOrigin:
    """An origin in a directory of a local or shared file system. An object is a file at its key."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, key: str, data: bytes | memoryview) -> None:
        path = self._path(key)
        temporary = path.with_name(f"{path.name}.{fresh_id('put')}{_TEMPORARY}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write_durably(temporary, data)
            temporary.rename(path)
            # The shard directory may be new too: make its own entry durable with that of the object.
            for directory in (path.parent, path.parent.parent):
                _sync_directory(directory)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise self._translated(error, key) from error

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def size(self, key: str) -> int:
        try:
            status = self._path(key).stat()
        except OSError as error:
            raise self._translated(error, key) from error
        if not stat.S_ISREG(status.st_mode):
            raise _missing(key)
        return status.st_size

    def read_range(self, key: str, offset: int, into: memoryview) -> None:
        try:
            fd = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC)
            try:
                done = 0
                while done < len(into):
                    count = os.preadv(fd, [into[done:]], offset + done)
                    if count == 0:
                        raise _cut_short(key, len(into), done)
                    done += count
            finally:
                os.close(fd)
        except OSError as error:
            raise self._translated(error, key) from error

    def list(self, prefix: str) -> Iterator[str]:
        for directory, _, names in os.walk(self._root):
            base = Path(directory).relative_to(self._root)
            for name in names:
                key = (base / name).as_posix()
                if key.startswith(prefix) and not name.endswith(_TEMPORARY):
                    yield key

    def delete(self, key: str) -> None:
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError as error:
            raise self._translated(error, key) from error

    def _path(self, key: str) -> Path:
        return self._root / parse_tree_path(key, error=InvalidInputError)

    @staticmethod
    def _write_durably(path: Path, data: bytes | memoryview) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)

    def _translated(self, error: OSError, key: str) -> SnowdropError:
        if error.errno in {ENOENT, ENOTDIR, EISDIR}:
            return _missing(key)
        if error.errno in {ENOSPC, EDQUOT}:
            return StorageFullError(
                "the origin is full", where=str(self._root), next_step="free space there or move the origin"
            )
        return UnavailableError(
            f"origin: {error.strerror}", where=str(self._path(key)), next_step="check the origin's directory"
        )


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

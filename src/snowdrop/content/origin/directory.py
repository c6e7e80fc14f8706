"""An origin in a directory of a local or shared file system. An object is a file at its key."""

from __future__ import annotations

import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EDQUOT, EISDIR, ENOENT, ENOSPC, ENOTDIR
from pathlib import Path

from snowdrop.content.origin.port import ObjectInfo, cut_short, missing
from snowdrop.content.origin.steer import Steer
from snowdrop.content.paths import parse_tree_path
from snowdrop.domain.errors import (
    InvalidInputError,
    SnowdropError,
    StorageFullError,
    UnavailableError,
)
from snowdrop.domain.ids import fresh_id

_TEMPORARY = ".tmp"
OPEN_FILES_MAX = 32
"""Descriptors that are kept open for the next range of the same object."""


class DirectoryOrigin:
    """Objects are put by a rename, so a reader sees all of one or nothing."""

    def __init__(self, root: Path, *, steer: Steer | None = None) -> None:
        self._root = root
        self._steer = steer
        self._files = _OpenFiles()

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
        self._files.forget(path)

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def size(self, key: str) -> int:
        try:
            status = self._path(key).stat()
        except OSError as error:
            raise self._translated(error, key) from error
        if not stat.S_ISREG(status.st_mode):
            raise missing(key)
        return status.st_size

    def read_start(self, key: str, into: memoryview) -> int:
        size = self.size(key)
        self.read_range(key, 0, into[:size])
        return size

    def read_range(self, key: str, offset: int, into: memoryview) -> None:
        if self._steer is None:
            self._read_range(key, offset, into)
            return
        self._steer.began()
        done = 0
        try:
            self._read_range(key, offset, into)
            done = len(into)
        finally:
            self._steer.ended(done, 0.0)

    def _read_range(self, key: str, offset: int, into: memoryview) -> None:
        try:
            with self._files.opened(self._path(key)) as fd:
                done = 0
                while done < len(into):
                    count = os.preadv(fd, [into[done:]], offset + done)
                    if count == 0:
                        raise cut_short(key, len(into), done)
                    done += count
        except OSError as error:
            raise self._translated(error, key) from error

    def list(self, prefix: str) -> Iterator[str]:
        for path, name in self._walk(prefix):
            if not name.endswith(_TEMPORARY):
                yield path

    def entries(self, prefix: str) -> Iterator[ObjectInfo]:
        for key in self.list(prefix):
            with suppress(FileNotFoundError):  # deleted since
                status = (self._root / key).stat()
                yield ObjectInfo(key, status.st_size, status.st_mtime_ns)

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise self._translated(error, key) from error
        self._files.forget(path)

    def sweep(self, before_unix_ns: int, *, dry_run: bool = False) -> tuple[int, int]:
        count = total = 0
        for key, name in self._walk(""):
            if not name.endswith(_TEMPORARY):
                continue
            with suppress(FileNotFoundError):  # that put has ended after all
                path = self._root / key
                status = path.stat()
                if status.st_mtime_ns >= before_unix_ns:
                    continue
                if not dry_run:
                    path.unlink()
                count, total = count + 1, total + status.st_size
        return count, total

    def close(self) -> None:
        self._files.close()

    def _path(self, key: str) -> Path:
        return self._root / parse_tree_path(key, error=InvalidInputError)

    def _walk(self, prefix: str) -> Iterator[tuple[str, str]]:
        """(key, file name) of every file below the deepest directory that `prefix` names whole."""
        top = self._root / prefix.rpartition("/")[0]
        for directory, _, names in os.walk(top):
            base = Path(directory).relative_to(self._root)
            for name in names:
                key = (base / name).as_posix()
                if key.startswith(prefix):
                    yield key, name

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
            return missing(key)
        if error.errno in {ENOSPC, EDQUOT}:
            return StorageFullError(
                "the origin is full", where=str(self._root), next_step="free space there or move the origin"
            )
        return UnavailableError(
            f"origin: {error.strerror}", where=str(self._path(key)), next_step="check the origin's directory"
        )


class _OpenFiles:
    """The last few files that were read stay open: a pack is read in many ranges, by several threads.

    A file that was replaced or deleted under its name is noticed by its inode, so that a deleted object is missing
    at once and not only when its descriptor leaves the cache.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: OrderedDict[Path, _OpenFile] = OrderedDict()

    @contextmanager
    def opened(self, path: Path) -> Iterator[int]:
        file = self._take(path)
        try:
            yield file.fd
        finally:
            with self._lock:
                file.users -= 1
                file.close_if_unused()

    def forget(self, path: Path) -> None:
        with self._lock:
            file = self._idle.pop(path, None)
            if file is not None:
                file.drop()

    def close(self) -> None:
        with self._lock:
            files = list(self._idle.values())
            self._idle.clear()
            for file in files:
                file.drop()

    def _take(self, path: Path) -> _OpenFile:
        status = path.stat()
        with self._lock:
            file = self._idle.get(path)
            if file is not None and file.identity == (status.st_dev, status.st_ino):
                self._idle.move_to_end(path)
                file.users += 1
                return file
        fresh = _OpenFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        with self._lock:
            stale = self._idle.pop(path, None)
            if stale is not None:
                stale.drop()
            self._idle[path] = fresh
            fresh.users += 1
            while len(self._idle) > OPEN_FILES_MAX:
                _, oldest = self._idle.popitem(last=False)
                oldest.drop()
        return fresh


class _OpenFile:
    """A descriptor that closes when it has left the cache and nobody reads from it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.users = 0
        self.kept = True
        status = os.fstat(fd)
        self.identity = (status.st_dev, status.st_ino)
        # Ranges are read in load order: the kernel may read far ahead.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def drop(self) -> None:
        self.kept = False
        self.close_if_unused()

    def close_if_unused(self) -> None:
        if not self.kept and self.users == 0 and self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.drop()


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

"""Where the files of a landing directory lie: in partial/, or in tree/ once they are complete and proven."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from snowdrop.content.diskio import DiskIo
from snowdrop.content.proof import FileMark, mark_of, read_proof, write_proof
from snowdrop.domain.manifest import Manifest

MODE_MASK = 0o755
"""Landing files carry no set-id or sticky bits and nobody but the platform writes to them."""


class LandingTree:
    """`lock` is that of the landing: whoever calls holds it, but for `keep_manifest` and `sync_directories`.

    Errors are OSError.
    """

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        *,
        encoded: bytes,
        lock: threading.RLock,
        io: DiskIo,
        boot_id: str,
    ) -> None:
        self.tree = directory / "tree"
        self.is_complete = [False] * len(manifest.files)
        self._directory = directory
        self._partial = directory / "partial"
        self._manifest = manifest
        self._unkept_manifest = encoded
        self._lock = lock
        self._io = io
        self._boot_id = boot_id
        self._proven: dict[str, FileMark] = {}
        self._removed: set[int] = set()
        self._unsynced = {directory, directory.parent}

    def path(self, index: int) -> Path:
        base = self.tree if self.is_complete[index] else self._partial
        found = base / self._manifest.files[index].path
        if index in self._removed:
            self._create(found, index)
            self._removed.discard(index)
        return found

    def open(self) -> None:
        """Makes the directories, and reads what an earlier process of this boot has proven."""
        wanted = {self.tree, self._partial}
        for entry in self._manifest.files:
            for parent in Path(entry.path).parents:
                wanted |= {self.tree / parent, self._partial / parent}
        for path in sorted(wanted):
            if not path.is_dir():
                self._io.make_directory(path)
                self._unsynced.add(path.parent)
        with suppress(FileNotFoundError):
            if (self._directory / "manifest").read_bytes() == self._unkept_manifest:
                self._unkept_manifest = b""
        self._proven = read_proof(self._directory / "proof", self._boot_id)

    def take_over(self, index: int, *, is_durable: bool) -> int:
        """Finds or makes a file; returns how many of its bytes were there already.

        It stays in the tree only if it is proven. `is_durable` says whether the bits of all of its chunks are set.
        """
        entry = self._manifest.files[index]
        inside, outside = self.tree / entry.path, self._partial / entry.path
        mark = mark_of(inside)
        proven = self._proven.pop(entry.path, None)
        if mark is not None and mark == proven and mark.size == entry.size and is_durable:
            self._proven[entry.path] = mark
            self.is_complete[index] = True
            return entry.size
        if mark is not None:
            self._move(inside, outside)
        elif inside.is_symlink():
            self._io.unlink(inside)
        found = mark_of(outside)
        if found is None or found.size != entry.size:
            self._create(outside, index)
        return min(found.size, entry.size) if found is not None else 0

    def publish(self, index: int) -> None:
        source = self.path(index)
        self._move(source, self.tree / self._manifest.files[index].path)
        self.is_complete[index] = True

    def hide(self, index: int) -> bool:
        """Takes a file out of the tree: false if that cost its bytes, as it could only be removed."""
        if not self.is_complete[index]:
            return True
        entry = self._manifest.files[index]
        inside, outside = self.tree / entry.path, self._partial / entry.path
        self._proven.pop(entry.path, None)
        try:
            self._move(inside, outside)
        except OSError:
            # Better no file than one that is wrong: whoever opens it now must not find it.
            self._io.unlink(inside)
            self.is_complete[index] = False
            self._unsynced.add(inside.parent)
            self._removed.add(index)  # made anew when it is next used: now there may be no room for it
            return False
        self.is_complete[index] = False
        return True

    def keep_manifest(self) -> None:
        """Makes sure of the manifest beside the files; durable with the directories."""
        if not self._unkept_manifest:
            return
        temporary = self._directory / "manifest.tmp"
        self._io.create(temporary, len(self._unkept_manifest), 0o600)
        fd = self._io.open(temporary, os.O_WRONLY)
        try:
            self._io.write(fd, memoryview(self._unkept_manifest), 0)
            self._io.sync_data(fd)
        finally:
            os.close(fd)
        with self._lock:
            self._move(temporary, self._directory / "manifest")
        self._unkept_manifest = b""

    def sync_directories(self) -> None:
        """Makes names durable: those of files and directories that were made or moved since the last call."""
        with self._lock:
            directories, self._unsynced = self._unsynced, set()
        try:
            for directory in sorted(directories):
                self._io.sync_directory(directory)
        except OSError:
            with self._lock:
                self._unsynced |= directories
            raise

    def keep_proof(self, durable: Iterable[int]) -> None:
        """Records those of the files `durable` that are in the tree, if they are others than before."""
        paths = [self._manifest.files[index].path for index in durable if self.is_complete[index]]
        if set(paths) == set(self._proven):
            return
        found = ((path, self._proven.get(path) or mark_of(self.tree / path)) for path in paths)
        self._proven = {path: mark for path, mark in found if mark is not None}
        # A record less costs a verification after a restart, no more.
        with suppress(OSError):
            write_proof(self._directory / "proof", self._boot_id, self._proven, self._io)

    def _create(self, path: Path, index: int) -> None:
        entry = self._manifest.files[index]
        self._io.create(path, entry.size, (entry.mode & MODE_MASK) | 0o600)
        self._unsynced.add(path.parent)

    def _move(self, source: Path, target: Path) -> None:
        self._io.replace(source, target)
        self._unsynced |= {source.parent, target.parent}

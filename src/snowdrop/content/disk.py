"""Disk tier of a node: all landing directories under one byte limit.

lock                    held by the one process that uses the cache
artefacts/<digest>/     landing directories; the modification time says when it was last used
trash/                  directories on their way out: renamed first, so that no half-deleted one is believed
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from pathlib import Path
from typing import NamedTuple

from snowdrop.content.diskio import DiskIo
from snowdrop.content.landing import Landing, translated
from snowdrop.content.manifest import decode_manifest, encode_manifest
from snowdrop.domain.errors import ConflictError, SnowdropError, StorageFullError
from snowdrop.domain.ids import Digest, fresh_id
from snowdrop.domain.manifest import Manifest

LOCK_S_MAX = 5.0
"""A data plane that was killed is gone within this time; one that runs keeps the lock for ever."""


class _Kept(NamedTuple):
    size: int
    used_ns: int


class Reservation(NamedTuple):
    """`has_room` is False if only the small files fit: tensor files then pass through to the landing area."""

    victims: list[Digest]
    has_room: bool


class DiskTier:
    """The books (`has`, `reserve`, `touch`) are kept by one event loop; what blocks belongs in threads."""

    def __init__(self, directory: Path, bytes_max: int, io: DiskIo | None = None) -> None:
        self._directory = directory
        self._artefacts = directory / "artefacts"
        self._trash = directory / "trash"
        self._bytes_max = bytes_max
        self._io = io or DiskIo()
        self._kept: dict[str, _Kept] = {}
        self._lock_fd = -1

    def open(self) -> None:
        """Takes the cache directory; raises ConflictError if another process keeps it for LOCK_S_MAX."""
        try:
            for directory in (self._artefacts, self._trash):
                directory.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            shutil.rmtree(self._trash, ignore_errors=True)
            self._trash.mkdir(exist_ok=True)
            for path in sorted(self._artefacts.iterdir()):
                self._kept[path.name] = self._measure(path)
        except OSError as error:
            raise translated(error, self._directory) from error

    def close(self) -> None:
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    @property
    def used_bytes(self) -> int:
        return sum(kept.size for kept in self._kept.values())

    def cached_manifest(self, digest: Digest) -> Manifest | None:
        """The manifest as an earlier fetch left it; None if there is none or it is not what its digest says."""
        try:
            return decode_manifest((self._path(digest) / "manifest").read_bytes(), expected=digest)
        except (OSError, SnowdropError):
            # Whatever is wrong with the copy, the origin's is the one to judge.
            return None

    def has(self, digest: Digest) -> bool:
        return self._path(digest).name in self._kept

    def reserve(self, digest: Digest, manifest: Manifest, pinned: set[Digest]) -> Reservation:
        """Sets the artefact's bytes aside; the victims are forgotten at once and then to be given to `evict`.

        The least recently used unpinned artefacts go first. Raises StorageFullError if not even the small files
        fit.
        """
        small = sum(entry.size for entry in manifest.files if not entry.tensors)
        own = self._path(digest).name
        others = sorted((kept.used_ns, name) for name, kept in self._kept.items() if name != own)
        taken = sum(kept.size for name, kept in self._kept.items() if name != own)
        loose = [(name, self._kept[name].size) for _, name in others if Digest("blake3:" + name) not in pinned]
        firm = taken - sum(size for _, size in loose)
        has_room = firm + manifest.total_bytes <= self._bytes_max
        wanted = manifest.total_bytes if has_room else small
        if firm + wanted > self._bytes_max:
            raise StorageFullError(
                f"no room for {wanted} bytes in the node's cache",
                where=f"disk_bytes_max={self._bytes_max}, in use {firm}",
                next_step="raise disk_bytes_max, or scale another deployment down",
            )
        victims: list[Digest] = []
        for name, size in loose:
            if taken + wanted <= self._bytes_max:
                break
            del self._kept[name]
            victims.append(Digest("blake3:" + name))
            taken -= size
        self._kept[own] = _Kept(wanted, time.time_ns())
        return Reservation(victims, has_room)

    def open_landing(self, digest: Digest, manifest: Manifest) -> Landing:
        """The artefact's landing directory, made or taken over. Blocks."""
        path = self._path(digest)
        try:
            path.mkdir(exist_ok=True)
            if not (path / "manifest").exists():
                self._write_manifest(path, manifest)
            os.utime(path)
        except OSError as error:
            raise translated(error, path) from error
        landing = Landing(path, manifest, self._io)
        landing.open()
        return landing

    def touch(self, digest: Digest) -> None:
        """Marks an artefact as used now."""
        path = self._path(digest)
        kept = self._kept.get(path.name)
        if kept is not None:
            self._kept[path.name] = kept._replace(used_ns=time.time_ns())
            os.utime(path)

    def evict(self, digest: Digest) -> None:
        """Drops a landing directory. Whoever has one of its files open keeps that file. Blocks."""
        path = self._path(digest)
        doomed = self._trash / fresh_id(path.name)
        try:
            path.rename(doomed)
        except FileNotFoundError:
            return
        except OSError as error:
            raise translated(error, path) from error
        shutil.rmtree(doomed, ignore_errors=True)

    def _path(self, digest: Digest) -> Path:
        return self._artefacts / digest.removeprefix("blake3:")

    def _take_lock(self) -> None:
        self._lock_fd = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + LOCK_S_MAX
        while True:
            try:
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self.close()
                    raise ConflictError(
                        "another data plane uses this cache directory",
                        where=str(self._directory),
                        next_step="`snowdrop down` first, or give this node a cache directory of its own",
                    ) from None
                time.sleep(0.02)

    def _measure(self, path: Path) -> _Kept:
        # What the files really take, not what they claim: tensor files may be holes that were never filled.
        size = 0
        for directory, _, names in os.walk(path):
            size += sum((Path(directory) / name).lstat().st_blocks * 512 for name in names)
        return _Kept(size, path.stat().st_mtime_ns)

    def _write_manifest(self, path: Path, manifest: Manifest) -> None:
        temporary = path / "manifest.tmp"
        data = encode_manifest(manifest)
        self._io.create(temporary, len(data), 0o600)
        fd = os.open(temporary, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            self._io.write(fd, memoryview(data), 0)
            self._io.sync_data(fd)
        finally:
            os.close(fd)
        self._io.replace(temporary, path / "manifest")
        self._io.sync_directory(path)

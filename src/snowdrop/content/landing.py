"""Disk tier, one artefact: its landing directory.

    tree/        the files that are complete: what replicas see, a directory that can be bind-mounted
    partial/     the same files while chunks are missing
    manifest     the encoded manifest
    chunks.map   one bit per chunk: its bytes in the files are durable

Write ordering: data, then fdatasync of the data, then the bit, then fdatasync of the bit. A crash at any point
leaves bits only for chunks whose bytes were durable. Bits are a claim, not a proof: a new process reads and
hashes a chunk before it believes it. A file with a missing or unproven-wrong chunk is never in tree/.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EDQUOT, ENOSPC
from pathlib import Path

from snowdrop.content.diskio import DiskIo
from snowdrop.content.placement import FilePlace, file_places
from snowdrop.content.source import Tier
from snowdrop.domain.errors import IntegrityError, SnowdropError, StorageFullError, UnavailableError
from snowdrop.domain.manifest import Manifest

_MAGIC = b"SDMAP\0\0\1"
MODE_MASK = 0o755
"""Landing files carry no set-id or sticky bits and nobody but the platform writes to them."""


class Landing:
    """One landing directory. A ChunkSource of the chunks that are on disk; calls block and belong in threads.

    `verified` chunks were hashed by this process, on arrival or when read back. Every method may be called
    from any thread; OSError becomes StorageFullError or UnavailableError.
    """

    tier: Tier = "disk"

    def __init__(self, directory: Path, manifest: Manifest, io: DiskIo) -> None:
        count = len(manifest.chunks)
        self.directory = directory
        self.tree = directory / "tree"
        self._partial = directory / "partial"
        self._manifest = manifest
        self._io = io
        self._places = file_places(manifest)
        self._durable = bytearray(count)
        self._written = bytearray(count)
        self._verified = bytearray(count)
        self._left = [len({extent.chunk for extent in entry.extents}) for entry in manifest.files]
        self._complete = [False] * len(manifest.files)
        self._lock = threading.RLock()
        self._dirty: set[int] = set()
        self._dirty_directories: set[Path] = set()

    def open(self) -> None:
        """Makes the directories and files, or takes over what an earlier process left."""
        with self._translated():
            self._read_map()
            for chunk, durable in enumerate(self._durable):
                if durable:
                    self._count(chunk, -1)
            for directory in sorted({str(Path(entry.path).parent) for entry in self._manifest.files}):
                for base in (self.tree, self._partial):
                    (base / directory).mkdir(parents=True, exist_ok=True)
            for index in range(len(self._manifest.files)):
                self._open_file(index)

    @property
    def is_complete(self) -> bool:
        """Whether every file is in the tree, proven by this process and durable."""
        return all(self._complete) and all(self._verified) and all(self._durable)

    def holds(self, chunk: int) -> bool:
        return bool(self._durable[chunk] or self._written[chunk]) and self._whole(chunk) is not None

    def is_verified(self, chunk: int) -> bool:
        """Whether this process knows that the files hold the right bytes of this chunk."""
        return bool(self._verified[chunk])

    def confirm(self, chunk: int) -> None:
        """The chunk was read back and its hash is right."""
        self._verified[chunk] = 1

    def read(self, first: int, count: int, into: memoryview) -> None:
        done = 0
        with self._translated():
            for chunk in range(first, first + count):
                place = self._whole(chunk)
                size = self._manifest.chunks[chunk].plain_bytes
                if place is None or not self._read_place(place, into[done : done + size]):
                    raise IntegrityError("landing file is cut short", where=f"{self.directory}: chunk {chunk}")
                done += size

    def write(self, chunk: int, data: memoryview) -> None:
        """Writes a verified chunk to every place it has; a file that has all of its chunks enters the tree."""
        if self._verified[chunk]:
            return
        with self._translated():
            for place in self._places[chunk]:
                with self._opened(place.file, os.O_WRONLY) as fd:
                    self._io.write(
                        fd, data[place.chunk_offset : place.chunk_offset + place.length], place.file_offset
                    )
            with self._lock:
                # Only now: a sync that runs beside must not count these files as done before they are.
                self._dirty.update(place.file for place in self._places[chunk])
                if not (self._durable[chunk] or self._written[chunk]):
                    self._count(chunk, -1)
                self._written[chunk] = self._verified[chunk] = 1
                for index in {place.file for place in self._places[chunk]}:
                    self._publish(index)

    def sync(self) -> None:
        """Makes what was written durable, and only then claims it."""
        with self._lock:
            claimed = [chunk for chunk, written in enumerate(self._written) if written]
            dirty, self._dirty = self._dirty, set()
            directories, self._dirty_directories = self._dirty_directories, set()
        try:
            with self._translated():
                for index in sorted(dirty):
                    self._sync_file(index)
                for directory in sorted(directories):
                    self._io.sync_directory(directory)
                with self._lock:
                    for chunk in claimed:
                        self._durable[chunk] |= self._written[chunk]
                        self._written[chunk] = 0
                    self._write_map()
        except SnowdropError:
            with self._lock:
                self._dirty |= dirty
                self._dirty_directories |= directories
            raise

    def quarantine(self, chunk: int) -> None:
        """Drops the claim on a chunk whose bytes were wrong and takes its files out of the tree."""
        with self._lock, self._translated():
            if self._durable[chunk] or self._written[chunk]:
                self._count(chunk, 1)
            self._durable[chunk] = self._written[chunk] = self._verified[chunk] = 0
            for index in {place.file for place in self._places[chunk]}:
                self._hide(index)
            self._write_map()

    def _whole(self, chunk: int) -> FilePlace | None:
        size = self._manifest.chunks[chunk].plain_bytes
        return next((place for place in self._places[chunk] if place.length == size), None)

    def _count(self, chunk: int, step: int) -> None:
        for index in {place.file for place in self._places[chunk]}:
            self._left[index] += step

    def _path(self, index: int) -> Path:
        base = self.tree if self._complete[index] else self._partial
        return base / self._manifest.files[index].path

    def _open_file(self, index: int) -> None:
        entry = self._manifest.files[index]
        inside, outside = self.tree / entry.path, self._partial / entry.path
        self._complete[index] = inside.is_file() and inside.stat().st_size == entry.size
        if self._complete[index] and self._left[index]:
            self._hide(index)
        if not self._complete[index]:
            inside.unlink(missing_ok=True)
            self._io.create(outside, entry.size, (entry.mode & MODE_MASK) | 0o600)
            self._publish(index)

    def _publish(self, index: int) -> None:
        if self._left[index] or self._complete[index]:
            return
        self._io.replace(self._path(index), self.tree / self._manifest.files[index].path)
        self._complete[index] = True
        self._dirty_directories.add(self._path(index).parent)

    def _hide(self, index: int) -> None:
        if self._complete[index]:
            self._io.replace(self._path(index), self._partial / self._manifest.files[index].path)
            self._dirty_directories.add(self._path(index).parent)
            self._complete[index] = False

    @contextmanager
    def _opened(self, index: int, flags: int) -> Iterator[int]:
        with self._lock:
            fd = os.open(self._path(index), flags | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            yield fd
        finally:
            os.close(fd)

    def _read_place(self, place: FilePlace, into: memoryview) -> bool:
        with self._opened(place.file, os.O_RDONLY) as fd:
            done = 0
            while done < len(into):
                count = os.preadv(fd, [into[done:]], place.file_offset + done)
                if count == 0:
                    return False
                done += count
        return True

    def _sync_file(self, index: int) -> None:
        with self._opened(index, os.O_WRONLY) as fd:
            self._io.sync_data(fd)
            if self._manifest.files[index].tensors:
                # Replicas read tensors from the landing area: the page cache need not hold them twice.
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def _read_map(self) -> None:
        path = self.directory / "chunks.map"
        count = len(self._durable)
        size = len(_MAGIC) + -(-count // 8)
        raw = path.read_bytes() if path.is_file() else b""
        if len(raw) != size or not raw.startswith(_MAGIC):
            self._io.create(path, size, 0o600)
            self._write_map()
            return
        bits = int.from_bytes(raw[len(_MAGIC) :], "little")
        for chunk in range(count):
            self._durable[chunk] = (bits >> chunk) & 1

    def _write_map(self) -> None:
        packed = bytearray(-(-len(self._durable) // 8))
        for chunk, durable in enumerate(self._durable):
            packed[chunk >> 3] |= durable << (chunk & 7)
        fd = os.open(self.directory / "chunks.map", os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            self._io.write(fd, memoryview(_MAGIC + packed), 0)
            self._io.sync_data(fd)
        finally:
            os.close(fd)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise translated(error, self.directory) from error


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

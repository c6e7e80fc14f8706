"""Disk tier, one artefact: its landing directory.

    tree/        the files that are complete and proven: what replicas see, a directory that can be bind-mounted
    partial/     the same files while chunks are missing or unproven
    manifest     the encoded manifest
    chunks.map   one bit per chunk: its bytes in the files are durable; how they are checked (`chunkmap.py`)
    proof        which files of the tree need not be read again before the machine restarts (`proof.py`)

Write ordering: data, then fdatasync of the data, then the directories, then the bit, then fdatasync of the bit. A
crash at any point leaves bits only for chunks whose bytes were durable. Bits are a claim, not a proof: a new
process reads and checks a chunk before it believes it. A file with a missing or unproven chunk is never in tree/.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from errno import EIO, ENOENT
from pathlib import Path

from blake3 import blake3

from snowdrop.content.behind import Behind, FilledArea
from snowdrop.content.chunkmap import ChunkMap
from snowdrop.content.descriptors import Descriptors
from snowdrop.content.diskio import DiskIo, translated
from snowdrop.content.events import EventKind, SeenBy
from snowdrop.content.landfiles import LandingFiles
from snowdrop.content.landtree import LandingTree
from snowdrop.content.manifest import encode_valid
from snowdrop.content.placement import FilePlace, file_places, joined
from snowdrop.content.proof import current_boot_id
from snowdrop.content.source import Tier
from snowdrop.domain.errors import IntegrityError
from snowdrop.domain.manifest import Manifest

Notice = Callable[[EventKind, int, SeenBy], None]
"""(what, chunk, who saw it)"""


class Landing:
    """One landing directory. A ChunkSource of the chunks that are on disk; calls block and belong in threads.

    `verified` chunks are right in every place of the files: hashed by this process, on arrival or when read back,
    or proven within this boot. Every method may be called from any thread; OSError becomes StorageFullError or
    UnavailableError.
    """

    tier: Tier = "disk"

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        io: DiskIo,
        *,
        descriptors: Descriptors | None = None,
        boot_id: str | None = None,
        notice: Notice = lambda kind, chunk, seen_by: None,
    ) -> None:
        count = len(manifest.chunks)
        self.directory = directory
        self.manifest = manifest
        self._io = io
        self._notice = notice
        encoded = encode_valid(manifest)
        self._map = ChunkMap(directory / "chunks.map", count, blake3(encoded).digest(), io)
        self._places = file_places(manifest)
        self._chunks_of = [frozenset(extent.chunk for extent in entry.extents) for entry in manifest.files]
        self._durable = bytearray(count)
        self._written = bytearray(count)
        self._verified = bytearray(count)
        self._suspect: dict[int, SeenBy] = {}
        self._left = [len(chunks) for chunks in self._chunks_of]
        self._is_closed = False
        self._lock = threading.RLock()
        self._tree = LandingTree(
            directory, manifest, encoded=encoded, lock=self._lock, io=io, boot_id=boot_id or current_boot_id()
        )
        self._files = LandingFiles(manifest, self._present_path, self._lock, io, descriptors or Descriptors())
        self._sync_lock = threading.Lock()
        self._behind_lock = threading.Lock()
        self._behind: Behind | None = None
        self._dirty: set[int] = set()
        self._is_map_dirty = False
        self._are_checks_dirty = False
        self._sync_failures = 0

    def open(self) -> None:
        """Makes the directories and files, or takes over what an earlier process left."""
        with self._translated(), self._lock:
            self._durable = self._map.read()
            self._tree.open()
            for index in range(len(self.manifest.files)):
                self._take_over(index)
            for chunk, places in enumerate(self._places):
                if self._durable[chunk] and all(self._tree.is_complete[place.file] for place in places):
                    self._settle(chunk, written=False)
            self._publish_rest()

    def close(self) -> None:
        """Closes its files; what is tried afterwards fails with UnavailableError."""
        self._is_closed = True
        self._files.close()

    @property
    def tree(self) -> Path:
        return self._tree.tree

    @property
    def is_complete(self) -> bool:
        """Whether every file is in the tree, proven and durable, and its bits are, too."""
        is_whole = all(self._tree.is_complete) and not self._is_map_dirty
        return is_whole and all(self._verified[c] and self._durable[c] for c, at in enumerate(self._places) if at)

    @property
    def is_undurable(self) -> bool:
        return not self._is_closed and (any(self._written) or self._is_map_dirty or self._are_checks_dirty)

    def holds(self, chunk: int) -> bool:
        return bool(self._durable[chunk] or self._written[chunk]) and self._whole(chunk) is not None

    def is_verified(self, chunk: int) -> bool:
        """Whether the files are known to hold the right bytes of this chunk."""
        return bool(self._verified[chunk])

    def held_chunks(self) -> list[int]:
        """The chunks that are claimed to be on disk, ascending."""
        return list(filter(self.holds, range(len(self._places))))

    def confirm(self, chunk: int, data: memoryview) -> None:
        """The chunk was read from here and `data` is what it must be.

        A place of it that was not read is compared, and written if it differs.
        """
        if self._verified[chunk]:
            return
        with self._translated():
            places, mended = self._places[chunk], False
            for place in places if len(places) > 1 else ():
                mended |= self._mend(place, data[place.chunk_offset : place.chunk_offset + place.length])
            with self._lock:
                if self._durable[chunk] or self._written[chunk]:
                    self._settle(chunk, written=mended)

    def learn(self, chunk: int, data: memoryview) -> None:
        """`data` has just been verified by its digest: what is read back of this chunk is compared with it."""
        # Saved with the next bits. Where those are there already, somebody who comes by saves it.
        if self._map.checks.learn(chunk, data) and self._durable[chunk]:
            self._are_checks_dirty = True

    def unchecked(self, first: int, count: int, view: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Those of the chunks, read from here into `view`, that do not pass their fast check or have none."""
        done = 0
        for chunk in range(first, first + count):
            data = view[done : done + self.manifest.chunks[chunk].plain_bytes]
            done += len(data)
            if not self._map.checks.is_right(chunk, data):
                yield chunk, data

    def read(self, first: int, count: int, into: memoryview) -> None:
        done = 0
        with self._translated():
            for place in joined(self._place_to_read(chunk) for chunk in range(first, first + count)):
                if not self._files.read(place, into[done : done + place.length]):
                    raise IntegrityError("landing file is cut short", where=str(self._tree.path(place.file)))
                done += place.length

    def places_of(self, chunk: int) -> list[FilePlace]:
        return list(self._places[chunk])

    def read_place(self, place: FilePlace, into: memoryview) -> bool:
        """Fills `into` from the disk itself, not from the page cache; False if the file ends before."""
        with self._translated():
            return self._files.read(place, into, from_disk=True)

    def write(self, chunk: int, data: memoryview) -> None:
        """Writes a verified chunk to every place it has; a file that has all of its chunks enters the tree."""
        if self._verified[chunk]:
            return
        with self._translated():
            failures = self._sync_failures
            for place in self._places[chunk]:
                if not self._tree.is_complete[place.file]:
                    self._files.write(place, data[place.chunk_offset : place.chunk_offset + place.length])
            self._settle_written([chunk], failures)

    def write_behind(self, area: FilledArea, budget_bytes: int) -> int:
        """Writes blocks of tensor files that are filled in `area` and not on disk yet, past the page cache.

        At most `budget_bytes`, but at least one block if there is any; returns the bytes written, 0 if there is
        nothing to do now. One caller at a time; others wait. Nothing is durable before `sync`.
        """
        written = 0
        with self._translated(), self._behind_lock:
            failures = self._sync_failures
            with self._lock:
                behind = self._behind = self._behind or Behind(self.manifest, area.layout)
                blocks = behind.ready(area, self.is_verified, budget_bytes)
            for block in blocks:
                self._files.write_from(block, area)
                written += block.length
                with self._lock:
                    self._dirty.add(block.file)
                    done = behind.wrote(block, area) if failures == self._sync_failures else []
                    done = [chunk for chunk in done if not self._verified[chunk]]
                self._settle_written([chunk for chunk in done if self._write_small(chunk, area)], failures)
        return written

    def sync(self) -> None:
        """Makes what was written durable, and only then claims it."""
        with self._translated(), self._sync_lock:
            self._tree.keep_manifest()
            with self._lock:
                claimed = [chunk for chunk, written in enumerate(self._written) if written]
                dirty = sorted(self._dirty)
            for index in dirty:
                self._sync_file(index)
            self._publish_rest()
            self._tree.sync_directories()
            with self._lock:
                for chunk in claimed:
                    self._durable[chunk] |= self._written[chunk]
                    self._written[chunk] = 0
                self._is_map_dirty |= bool(claimed)
            self._write_map()
            with self._lock:
                self._tree.keep_proof(
                    index
                    for index, chunks in enumerate(self._chunks_of)
                    if all(self._durable[chunk] for chunk in chunks)
                )

    def quarantine(self, chunk: int, seen_by: SeenBy = "load") -> None:
        """Drops the claim on a chunk whose bytes were wrong and takes its files out of the tree.

        Its bit goes with the next `sync`: until then it is what all bits are, a claim that is checked.
        """
        with self._lock, self._translated():
            if not (self._durable[chunk] or self._written[chunk]):
                return
            self._unsettle(chunk)
            self._map.checks.forget(chunk)  # taken anew when it comes again, in case that it was what is wrong
            self._suspect[chunk] = seen_by
        self._notice("quarantined", chunk, seen_by)

    def _settle_written(self, chunks: Sequence[int], failures: int) -> None:
        replaced: list[tuple[int, SeenBy]] = []
        with self._lock:
            if failures != self._sync_failures:
                raise OSError(EIO, "the disk lost writes")
            for chunk in chunks:
                # Only now: a sync that runs beside must not count these files as done before they are.
                self._dirty.update(self._files_of(chunk))
                if chunk in self._suspect:
                    replaced.append((chunk, self._suspect.pop(chunk)))
                self._settle(chunk, written=True)
        for chunk, seen_by in replaced:
            self._notice("replaced", chunk, seen_by)

    def _settle(self, chunk: int, *, written: bool) -> None:
        if written:
            self._durable[chunk], self._written[chunk] = 0, 1
        if self._verified[chunk]:
            return
        self._count(chunk, verified=True)
        for index in self._files_of(chunk):
            try:
                self._publish(index)
            except OSError:
                # A tensor file is read from the landing area: the next sync tries again, and says so if it fails.
                # Any other file is wanted in the tree now.
                if not self.manifest.files[index].tensors:
                    self._count(chunk, verified=False)
                    raise

    def _count(self, chunk: int, *, verified: bool) -> None:
        if self._verified[chunk] != verified:
            self._verified[chunk] = verified
            for index in self._files_of(chunk):
                self._left[index] += -1 if verified else 1

    def _forget(self, chunk: int) -> None:
        self._count(chunk, verified=False)
        self._durable[chunk] = self._written[chunk] = 0
        self._is_map_dirty = True
        if self._behind is not None:
            self._behind.reopen(chunk)

    def _unsettle(self, chunk: int) -> None:
        self._forget(chunk)
        for index in self._files_of(chunk):
            for other in () if self._tree.hide(index) else self._chunks_of[index]:
                self._forget(other)

    def _mend(self, place: FilePlace, data: memoryview) -> bool:
        """Makes sure that a place that may be unproven holds `data`; returns whether it had to be written."""
        with self._lock:
            if self._tree.is_complete[place.file]:
                return False
        if self._files.read(place, found := memoryview(bytearray(place.length))) and found == data:
            return False
        self._files.write(place, data)
        with self._lock:
            self._dirty.add(place.file)
        return True

    def _write_small(self, chunk: int, area: FilledArea) -> bool:
        """Writes a chunk to its places in small files; False if the area does not have it in one piece."""
        small = [place for place in self._places[chunk] if not self.manifest.files[place.file].tensors]
        at = area.layout.whole.get(chunk)
        if small and at is None:
            return False
        for place in small:
            # What is in the tree is right, and is not to look as if it had been changed.
            done = place.length if self._tree.is_complete[place.file] else 0
            while at is not None and done < place.length:
                begin = at + place.chunk_offset + done
                length = area.stretch(begin, place.length - done)
                part = place._replace(file_offset=place.file_offset + done, length=length)
                self._files.write(part, area.window(begin, length))
                done += length
        return True

    def _files_of(self, chunk: int) -> set[int]:
        return {place.file for place in self._places[chunk]}

    def _whole(self, chunk: int) -> FilePlace | None:
        size = self.manifest.chunks[chunk].plain_bytes
        whole = [place for place in self._places[chunk] if place.length == size]
        return next((place for place in whole if self._tree.is_complete[place.file]), whole[0] if whole else None)

    def _place_to_read(self, chunk: int) -> FilePlace:
        if (place := self._whole(chunk)) is None:
            raise IntegrityError("chunk lies nowhere in one piece", where=f"{self.directory}: chunk {chunk}")
        return place

    def _take_over(self, index: int) -> None:
        is_durable = all(self._durable[chunk] for chunk in self._chunks_of[index])
        size = self._tree.take_over(index, is_durable=is_durable)
        entry = self.manifest.files[index]
        if size < entry.size:
            self._dirty.add(index)
        for extent in entry.extents:
            if extent.file_offset + extent.length > size and self._durable[extent.chunk]:
                # The file is shorter than its bits say: no damage, only a crash before it was durable.
                self._durable[extent.chunk] = 0
                self._is_map_dirty = True

    def _publish(self, index: int) -> None:
        if not self._left[index] and not self._tree.is_complete[index]:
            self._files.end_writing(index)
            self._tree.publish(index)

    def _publish_rest(self) -> None:
        with self._lock:
            for index in range(len(self._left)):
                self._publish(index)

    def _present_path(self, index: int) -> Path:
        if self._is_closed:
            raise OSError(ENOENT, "the artefact was dropped from this node")
        return self._tree.path(index)

    def _sync_file(self, index: int) -> None:
        with self._lock:
            self._dirty.discard(index)
        try:
            self._files.sync(index)
        except OSError:
            with self._lock:
                # The kernel may have dropped the pages that it could not write, and says so only once: what was
                # not durable yet is not there any more, even if the next sync succeeds.
                self._sync_failures += 1
                self._dirty.add(index)
                for chunk in self._chunks_of[index]:
                    if not self._durable[chunk]:
                        self._unsettle(chunk)
            raise

    def _write_map(self) -> None:
        with self._lock:
            if not (self._is_map_dirty or self._are_checks_dirty):
                return
            self._is_map_dirty = self._are_checks_dirty = False
            durable = bytearray(self._durable)
        try:
            self._map.write(durable)
        except OSError:
            self._is_map_dirty = True
            raise

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise translated(error, self.directory) from error

"""A mount's content from the node's store: landing files where they are proven, the store for what is missing.

Bytes are read from the landing files through the page cache, because what has just been brought lies there and
must not wait for the disk. The mount has a page cache of its own, so large files are dropped from the landing
file's at once: the mount's copy wins. A complete file that the kernel reads by itself has only the landing
file's.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

import anyio
import anyio.abc
import anyio.lowlevel

from snowdrop.content.descriptors import Descriptors
from snowdrop.content.diskio import translated
from snowdrop.content.landing import Landing
from snowdrop.content.placement import stretch_chunks
from snowdrop.domain.errors import IntegrityError, SnowdropError
from snowdrop.domain.ids import Digest
from snowdrop.policy.readahead import Ahead, ReadState, decide

KEPT_BYTES_MAX = 1 << 20
"""Files up to this size may lie in both page caches."""
THROUGH_BYTES = 4 << 20
"""Where the disk has no room: what is fetched at a time, because chunks are fetched whole and reads are
smaller."""
THROUGH_KEPT_MAX = 8

log = logging.getLogger("snowdrop.fuse")


class FileStore(Protocol):
    """What is asked of the content store."""

    async def read_file(self, digest: Digest, file: int, offset: int, length: int) -> bytes | None:
        """Has verified bytes brought to the landing file; returns them if the disk has no room."""


class StoredFiles:
    """A FileSource. `tasks` carries what is fetched ahead; the artefact stays pinned while this is in use."""

    def __init__(self, store: FileStore, digest: Digest, landing: Landing, tasks: anyio.abc.TaskGroup) -> None:
        self._store = store
        self._digest = digest
        self._landing = landing
        self._tasks = tasks
        self._descriptors = Descriptors()
        self._passes: dict[int, ReadState] = {}
        self._is_through = False
        self._through: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._through_lock = anyio.Lock()

    def close(self) -> None:
        """Closes what is open; nothing may be read any more."""
        self._descriptors.close()

    def read(self, file: int, offset: int, into: memoryview) -> bool:
        chunks = stretch_chunks(self._landing.manifest.files[file].extents, offset, len(into))
        if not all(self._landing.is_verified(chunk) for chunk in chunks):
            return False
        try:
            self._read(file, offset, into)
        except OSError as error:
            raise translated(error, self._landing.directory) from error
        # Again: a chunk that was found wrong while it was read is not served.
        return all(self._landing.is_verified(chunk) for chunk in chunks)

    async def bring(self, file: int, offset: int, length: int) -> bytes | None:
        if self._is_through:
            return await self._read_through(file, offset, length)
        size = self._landing.manifest.files[file].size
        ahead = decide(self._passes.get(file, ReadState()), offset, length, size)
        self._passes[file] = ahead.state
        if ahead.length:
            # Asked for first, because the store serves its latest request first.
            self._tasks.start_soon(self._fetch_ahead, file, ahead)
            await anyio.lowlevel.checkpoint()
        data = await self._store.read_file(self._digest, file, offset, length)
        self._is_through = data is not None
        return data

    def backing(self, file: int) -> int | None:
        try:
            return os.open(self._tree_path(file), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None  # a file is in the tree only when all of it is there and proven
        except OSError as error:
            raise translated(error, self._landing.directory) from error

    def _read(self, file: int, offset: int, into: memoryview) -> None:
        entry = self._landing.manifest.files[file]
        borrowed = self._descriptors.borrow((id(self), file, os.O_RDONLY), lambda: self._open(file))
        try:
            done = 0
            while done < len(into):
                count = os.preadv(borrowed.fd, [into[done:]], offset + done)
                if count == 0:
                    where = f"{self._landing.directory}: {entry.path}"
                    raise IntegrityError("landing file is cut short", where=where)
                done += count
            if entry.size > KEPT_BYTES_MAX:
                os.posix_fadvise(borrowed.fd, offset, len(into), os.POSIX_FADV_DONTNEED)
        finally:
            self._descriptors.give_back(borrowed)

    async def _read_through(self, file: int, offset: int, length: int) -> bytes | None:
        """From memory: a stretch at a time, one after the other, the last few kept for the reads that follow."""
        size = self._landing.manifest.files[file].size
        found = bytearray()
        async with self._through_lock:
            for begin in range(offset // THROUGH_BYTES * THROUGH_BYTES, offset + length, THROUGH_BYTES):
                data = self._through.get((file, begin))
                if data is None:
                    stretch = min(THROUGH_BYTES, size - begin)
                    data = await self._store.read_file(self._digest, file, begin, stretch)
                    if data is None:
                        self._is_through = False  # there is room again
                        self._through.clear()
                        return await self._store.read_file(self._digest, file, offset, length)
                    self._through[file, begin] = data
                    if len(self._through) > THROUGH_KEPT_MAX:
                        self._through.popitem(last=False)
                found += data[max(0, offset - begin) : offset + length - begin]
        return bytes(found)

    async def _fetch_ahead(self, file: int, ahead: Ahead) -> None:
        try:
            await self._store.read_file(self._digest, file, ahead.offset, ahead.length)
        except SnowdropError as error:
            # Whoever reads these bytes asks again, and is told.
            log.info("fetching ahead: %s", error)
        except Exception:  # a fault of ours that would end this mount, and all others with it
            log.exception("fetching ahead")

    def _open(self, file: int) -> int:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        partial = self._landing.directory / "partial" / self._landing.manifest.files[file].path
        # It may move from one place to the other meanwhile, but it is the same file.
        for path in (self._tree_path(file), partial):
            try:
                return os.open(path, flags)
            except FileNotFoundError:
                continue
        return os.open(self._tree_path(file), flags)

    def _tree_path(self, file: int) -> Path:
        return self._landing.tree / self._landing.manifest.files[file].path

"""The files of one landing directory: reads and writes at places in them, past the page cache for tensor files.

Tensor files are read by replicas from the landing area in memory, so the page cache is not to hold them a second
time. Other files are what replicas read through the page cache, and go through it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EINVAL
from pathlib import Path

from snowdrop.content.behind import Block, FilledArea
from snowdrop.content.descriptors import Descriptors
from snowdrop.content.direct import ALIGNMENT, is_congruent, read_buffered, read_direct
from snowdrop.content.diskio import DiskIo
from snowdrop.content.placement import FilePlace
from snowdrop.domain.manifest import Manifest

WRITE_BACK_BYTES_MIN = 256 << 10


class LandingFiles:
    """`path_of` says where a file lies now and raises OSError if it is gone; it is called under `lock`.

    All calls block and may come from any thread; errors are OSError.
    """

    def __init__(
        self,
        manifest: Manifest,
        path_of: Callable[[int], Path],
        lock: threading.RLock,
        io: DiskIo,
        descriptors: Descriptors,
    ) -> None:
        self._path_of = path_of
        self._lock = lock
        self._io = io
        self._descriptors = descriptors
        self._is_direct = True
        # A write that goes through the page cache reads the rest of its page: not while a block is written beside
        # it.
        self._tensor_locks = {i: threading.Lock() for i, entry in enumerate(manifest.files) if entry.tensors}

    def close(self) -> None:
        self._descriptors.forget(id(self))

    def end_writing(self, index: int) -> None:
        """Closes what is open for writing: such a file cannot be executed."""
        for flags in (os.O_WRONLY, os.O_WRONLY | os.O_DIRECT):
            self._descriptors.forget(id(self), index, flags)

    def read(self, place: FilePlace, into: memoryview, *, from_disk: bool = False) -> bool:
        """Fills `into` from `place`; False if the file ends before. `from_disk` leaves out the page cache."""
        if (from_disk or place.file in self._tensor_locks) and self._is_direct:
            try:
                with self._opened(place.file, os.O_RDONLY | os.O_DIRECT) as fd:
                    return read_direct(fd, place.file_offset, into)
            except OSError as error:
                self._refused(error)
        with self._opened(place.file, os.O_RDONLY) as fd:
            return read_buffered(fd, place.file_offset, into)

    def write(self, place: FilePlace, data: memoryview) -> None:
        """Writes `data` at `place`, through the page cache. Much of it is sent on to the disk at once.

        So a large load leaves little dirty memory, and the sync after it has little to wait for.
        """
        with self._writing(place.file) as fd:
            self._io.write(fd, data, place.file_offset)
            if len(data) >= WRITE_BACK_BYTES_MIN:
                self._io.begin_write_back(fd, place.file_offset, len(data))

    def write_from(self, block: Block, area: FilledArea) -> None:
        """Writes a block of an area, of which it may have more than one piece."""
        done = 0
        while done < block.length:
            at = block.area_offset + done
            length = area.stretch(at, block.length - done)
            part = block._replace(file_offset=block.file_offset + done, area_offset=at, length=length)
            self.write_block(part, area.window(at, length))
            done += length

    def write_block(self, block: Block, view: memoryview) -> None:
        """Writes a block past the page cache, but for the part of a page at the end of the file."""
        done = 0
        if self._is_direct and is_congruent(view, block.file_offset):
            aligned = block.length // ALIGNMENT * ALIGNMENT
            try:
                if aligned:
                    with self._tensor_locks[block.file], self._opened(block.file, os.O_WRONLY | os.O_DIRECT) as fd:
                        self._io.write(fd, view[:aligned], block.file_offset)
                done = aligned
            except OSError as error:
                self._refused(error)
        if done < block.length:
            with self._writing(block.file) as fd:
                self._io.write(fd, view[done:], block.file_offset + done)

    def sync(self, index: int) -> None:
        """Makes the file's data durable and drops a tensor file from the page cache."""
        with self._opened(index, os.O_RDONLY) as fd:
            self._io.sync_data(fd)
            if index in self._tensor_locks:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def _refused(self, error: OSError) -> None:
        if error.errno != EINVAL:
            raise error
        self._is_direct = False

    @contextmanager
    def _writing(self, index: int) -> Iterator[int]:
        lock = self._tensor_locks.get(index)
        if lock is not None:
            with lock, self._opened(index, os.O_WRONLY) as fd:
                yield fd
            return
        # Small files are written once: nothing is kept open.
        with self._lock:
            fd = self._io.open(self._path_of(index), os.O_WRONLY)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def _opened(self, index: int, flags: int) -> Iterator[int]:
        def open_file() -> int:
            return self._io.open(self._path_of(index), flags)

        # In this order everywhere: whoever renames a file holds the lock and may close descriptors.
        with self._lock:
            borrowed = self._descriptors.borrow((id(self), index, flags), open_file)
        try:
            yield borrowed.fd
        finally:
            self._descriptors.give_back(borrowed)

"""Files as a source: mapped where the page cache has them, read past it in parallel where it has not."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from typing import Literal

from snowdrop.content.mapping import map_file
from snowdrop.content.safetensors import Header, read_header
from snowdrop.weights.direct import THREADS, DirectFeed
from snowdrop.weights.diskfile import DiskFile
from snowdrop.weights.feeds import Feed, Loan, Piece, cut_pieces, run_of
from snowdrop.weights.plan import LoadPlan, PlannedTensor
from snowdrop.weights.residency import cached_fraction

Backend = Literal["auto", "mmap", "pread"]

CACHED_FRACTION_MIN = 0.6
"""From here on a file is mapped. Reading the rest through page faults costs about 2.4 times what it costs past the
cache, and what is cached then costs nothing."""

DIRECT_BYTES_MIN = 1 << 20
"""Less than this is not worth threads: page faults bring it."""


class FileSource:
    """Safetensors files of a directory, or a single one. Safe for threads; holds no descriptor of its own."""

    def __init__(self, files: Sequence[DiskFile], *, backend: Backend = "auto") -> None:
        self._files = tuple(files)
        self._backend = backend
        self._lock = threading.Lock()
        self._headers: dict[int, Header] = {}
        self._maps: dict[int, memoryview] = {}

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(file.name for file in self._files)

    def header(self, file: int) -> Header:
        with self._lock:
            if file not in self._headers:
                self._headers[file] = self._read_header(self._files[file])
            return self._headers[file]

    def open(self, plan: LoadPlan) -> Feed:
        wanted: dict[int, int] = {}
        for extent in plan.extents():
            wanted[extent.file] = wanted.get(extent.file, 0) + extent.length
        cold = {file for file, size in wanted.items() if self._is_cold(file, size)}
        return _FileFeed(self, self._files, plan, cold)

    def mapped(self, file: int) -> memoryview:
        """The file in memory, privately; all feeds share it."""
        with self._lock:
            if file not in self._maps:
                found = self._files[file]
                fd = found.open()
                try:
                    self._maps[file] = map_file(fd, found.size)
                finally:
                    os.close(fd)
            return self._maps[file]

    def _is_cold(self, number: int, wanted_bytes: int) -> bool:
        if self._backend != "auto":
            return self._backend == "pread"
        if wanted_bytes < DIRECT_BYTES_MIN:
            return False
        file = self._files[number]
        fd = file.open()
        try:
            return cached_fraction(fd, file.size) < CACHED_FRACTION_MIN
        finally:
            os.close(fd)

    def _read_header(self, file: DiskFile) -> Header:
        fd = file.open()
        try:
            return read_header(lambda offset, length: os.pread(fd, length, offset), file.size, where=file.name)
        finally:
            os.close(fd)


class _FileFeed:
    """Mapped and directly read files side by side."""

    def __init__(self, source: FileSource, files: Sequence[DiskFile], plan: LoadPlan, cold: set[int]) -> None:
        self._source = source
        self._cold = cold
        direct = tuple(tensor for tensor in plan.tensors if tensor.file in cold)
        length = sum(tensor.length for tensor in direct)
        threads = max(1, min(THREADS, length // DIRECT_BYTES_MIN))
        self._direct = DirectFeed(files, LoadPlan(tensors=direct), threads=threads) if direct else None

    def whole(self, tensor: PlannedTensor) -> Loan:
        if self._direct is not None and tensor.file in self._cold:
            return self._direct.whole(tensor)
        begin = tensor.entry.offset
        return Loan(self._source.mapped(tensor.file)[begin : begin + tensor.entry.length])

    def pieces(self, tensor: PlannedTensor) -> Iterator[Piece]:
        yield from cut_pieces(run_of(self.whole(tensor).view, tensor))

    def close(self) -> None:
        if self._direct is not None:
            self._direct.close()

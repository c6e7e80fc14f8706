"""A landing area that a test fills chunk by chunk, as the data plane does it: sealed memfds, progress map,
socket.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress

from snowdrop.content.cut import cut_safetensors
from snowdrop.content.progress import SEALS, FillState, ProgressReader, ProgressWriter, decode_wants
from snowdrop.content.safetensors import read_header
from snowdrop.domain.errors import ErrorBody
from snowdrop.weights.area import AreaSource, MappedArea, map_area
from snowdrop.wire.replica import AreaFile

PAGE = 4096
SLAB_BYTES = 64 * PAGE


class Chunk:
    """A stretch of the area."""

    def __init__(self, offset: int, data: bytes) -> None:
        self.offset = offset
        self.data = data

    def __repr__(self) -> str:
        return f"Chunk({self.offset}, {len(self.data)} bytes)"


class FillingArea:
    """The data plane's side of one landing area. `close` ends it, as the data plane's death does."""

    def __init__(self, files: Mapping[str, bytes], *, chunk_bytes: int | None = None) -> None:
        """Chunks are cut as a push cuts them, or every `chunk_bytes` of the area's files."""
        self.chunks: list[Chunk] = []
        placed: list[AreaFile] = []
        at = 0
        for path, data in files.items():
            placed.append(AreaFile(path, at, len(data)))
            if chunk_bytes is None:
                header = read_header(lambda offset, n, data=data: data[offset : offset + n], len(data), where=path)
                pieces = [(piece.offset, piece.length) for piece in cut_safetensors(header)]
            else:
                pieces = [(o, min(chunk_bytes, len(data) - o)) for o in range(0, len(data), chunk_bytes)]
            self.chunks += [Chunk(at + offset, data[offset : offset + length]) for offset, length in pieces]
            at += -(-len(data) // PAGE) * PAGE
        self.files = tuple(placed)
        self.area_bytes = at
        self.slab_bytes = [SLAB_BYTES] * max(1, -(-at // SLAB_BYTES))
        self._slabs = [_slab(size) for size in self.slab_bytes]
        extents = [(chunk.offset, len(chunk.data), number) for number, chunk in enumerate(self.chunks)]
        self.writer = ProgressWriter(extents, len(self.chunks), sum(len(chunk.data) for chunk in self.chunks))
        self._wake, self._readers_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._wake.setblocking(False)
        self.wanted: list[int] = []
        self._server: threading.Thread | None = None
        self._is_closed = False

    def map(self) -> MappedArea:
        """A reader's mapping; the descriptors are closed at once, as a replica does it."""
        fds = [os.dup(fd) for fd, _ in self._slabs]
        reader = ProgressReader(self.writer.fileno(), socket.socket(fileno=os.dup(self._readers_end.fileno())))
        try:
            return map_area(self.files, self.area_bytes, fds, self.slab_bytes, reader)
        finally:
            for fd in fds:
                os.close(fd)

    def source(
        self,
        *,
        is_lazy: bool = False,
        wait_s_max: float = 30.0,
        renew: Callable[[], MappedArea] | None = None,
    ) -> AreaSource:
        return AreaSource(self.map(), is_lazy=is_lazy, wait_s_max=wait_s_max, renew=renew)

    def fill(self, *numbers: int) -> None:
        for number in numbers:
            chunk = self.chunks[number]
            self._write(chunk.offset, chunk.data)
            self.writer.mark(number, len(chunk.data))
        if self.writer.filled_bytes == self.writer.total_bytes:
            self.writer.set_state(FillState.COMPLETE)
        self._notify()

    def fill_all(self) -> None:
        self.fill(*range(len(self.chunks)))

    def fail(self, error: ErrorBody) -> None:
        self.writer.set_state(FillState.FAILED, error)
        self._notify()

    def takes_wants(self) -> list[int]:
        """The chunks of all want packets that have come."""
        while select.select([self._wake], [], [], 0)[0]:
            packet = self._wake.recv(65536)
            if not packet:
                break
            self.wanted += decode_wants(packet, len(self.chunks))
        return self.wanted

    def serve_wants(self) -> None:
        """Fills what is wanted and nothing else, until it is closed."""

        def serve() -> None:
            while not self._is_closed:
                if select.select([self._wake], [], [], 0.02)[0]:
                    before = len(self.wanted)
                    self.fill(*self.takes_wants()[before:])

        self._server = threading.Thread(target=serve, daemon=True)
        self._server.start()

    def close(self) -> None:
        """Readers find the end of the data plane; their mappings stay."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._server is not None:
            self._server.join()
        self._wake.close()
        self._readers_end.close()
        self.writer.close()
        for fd, mapped in self._slabs:
            mapped.close()
            os.close(fd)

    def _write(self, offset: int, data: bytes) -> None:
        while data:
            slab, at = divmod(offset, SLAB_BYTES)
            part = data[: SLAB_BYTES - at]
            self._slabs[slab][1][at : at + len(part)] = part
            offset, data = offset + len(part), data[len(part) :]

    def _notify(self) -> None:
        with suppress(BlockingIOError):
            self._wake.send(b"\0")


def _slab(size: int) -> tuple[int, mmap.mmap]:
    fd = os.memfd_create("slab", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    mapped = mmap.mmap(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return fd, mapped

"""Compressed layers as streams of plain bytes: gzip, zstd or neither, told apart by how they begin."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import IO, cast

import zstandard

from snowdrop.domain.errors import CorruptContentError

Read = Callable[[int], bytes]
"""Gives up to so many bytes; empty only at the end."""

PIECE_BYTES = 1 << 20
RATIO_MAX = 250
RATIO_FREE_BYTES = 256 << 20
"""Above so many plain bytes, at most RATIO_MAX of them for each compressed one: no file grows out of nothing."""
ZSTD_WINDOW_BYTES_MAX = 128 << 20
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"


def plain_stream(read: Read, *, where: str, plain_bytes_max: int) -> Read:
    """What `read` gives, unpacked. Raises CorruptContentError if it is damaged or unpacks to more than it may."""
    source = _Source(read)
    head = source.peek(4)
    if head.startswith(_GZIP):
        pieces = _gunzip(source, where)
    elif head == _ZSTD or (head[1:] == _ZSTD_SKIPPABLE and head[0] & 0xF0 == 0x50):
        pieces = _unzstd(source, where)
    else:
        return _Bounded(source.pieces(), source, where, plain_bytes_max, ratio_max=None).read
    return _Bounded(pieces, source, where, plain_bytes_max, ratio_max=RATIO_MAX).read


class _Source:
    """The compressed bytes: counted, and with a look at how they begin."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._ahead = b""
        self.taken_bytes = 0

    def peek(self, count: int) -> bytes:
        while len(self._ahead) < count and (data := self._read(PIECE_BYTES)):
            self._ahead += data
        return self._ahead[:count]

    def read(self, count: int) -> bytes:
        data, self._ahead = self._ahead[:count], self._ahead[count:]
        if not data:
            data = self._read(count)
        self.taken_bytes += len(data)
        return data

    def pieces(self) -> Iterator[bytes]:
        while data := self.read(PIECE_BYTES):
            yield data


class _Bounded:
    def __init__(
        self, pieces: Iterator[bytes], source: _Source, where: str, plain_bytes_max: int, *, ratio_max: int | None
    ) -> None:
        self._pieces = pieces
        self._source = source
        self._where = where
        self._plain_bytes_max = plain_bytes_max
        self._ratio_max = ratio_max
        self._plain_bytes = 0
        self._rest = memoryview(b"")

    def read(self, count: int) -> bytes:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._rest = memoryview(piece)
            self._plain_bytes += len(piece)
            self._check()
        data, self._rest = bytes(self._rest[:count]), self._rest[count:]
        return data

    def _check(self) -> None:
        if self._plain_bytes > self._plain_bytes_max:
            raise _corrupt(f"unpacks to more than layer_bytes_max={self._plain_bytes_max}", self._where)
        if self._ratio_max is None or self._plain_bytes <= RATIO_FREE_BYTES:
            return
        if self._plain_bytes > self._ratio_max * self._source.taken_bytes:
            raise _corrupt(
                f"{self._source.taken_bytes} bytes unpack to {self._plain_bytes} and more (ratio_max={RATIO_MAX})",
                self._where,
            )


def _gunzip(source: _Source, where: str) -> Iterator[bytes]:
    """All members, one after the other; zeros may follow the last one."""
    engine = None
    data = b""
    try:
        while True:
            if engine is None:
                data = data.lstrip(b"\0") or source.read(PIECE_BYTES).lstrip(b"\0")
                if not data:
                    if source.peek(1):
                        continue
                    return
                engine = zlib.decompressobj(wbits=31)
            plain = engine.decompress(data, PIECE_BYTES)
            data = engine.unconsumed_tail
            if plain:
                yield plain
            if engine.eof:
                data, engine = engine.unused_data, None
            elif not data and len(plain) < PIECE_BYTES:
                data = source.read(PIECE_BYTES)
                if not data:
                    raise _corrupt("gzip ends too early", where)
    except zlib.error as error:
        raise _corrupt(f"gzip is damaged: {error}", where) from error


def _unzstd(source: _Source, where: str) -> Iterator[bytes]:
    """All frames. One that ends too early is noticed by what reads the tar in it, and by its digest."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES_MAX)
    try:
        with decompressor.stream_reader(cast("IO[bytes]", source), read_across_frames=True) as reader:
            while plain := reader.read(PIECE_BYTES):
                yield plain
    except zstandard.ZstdError as error:
        raise _corrupt(f"zstd is damaged: {error}", where) from error


def _corrupt(message: str, where: str) -> CorruptContentError:
    return CorruptContentError(message, where=where, next_step="make the image anew, or get it again")

"""Reading a source in spans ahead of the packer: read, hashed and compressed by threads, handed on in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, NamedTuple

from snowdrop.content.codec import encode
from snowdrop.content.cut import Piece
from snowdrop.content.ingest.source import Source, SourceFile
from snowdrop.content.keys import Hasher
from snowdrop.domain.manifest import CHUNK_BYTES_MAX, Codec

Compress = Literal["none", "zstd", "auto"]

SPAN_BYTES = 8 << 20
"""Neighbouring pieces are read together up to so many bytes: one request of a remote source."""
SMALL_BYTES = 1 << 20
GAIN_MIN = 1 / 32
AUTO_GAIN_MIN = 0.3
"""What compression must save of a chunk. `auto` leaves bf16 weights alone: they save about 0.22 and would take
longer to decode than a fast link takes to carry them."""
SAMPLE_BYTES = 128 << 10
assert SPAN_BYTES >= CHUNK_BYTES_MAX


class Span(NamedTuple):
    """Neighbouring pieces of a file. The first span of each file has none and is not read."""

    file: SourceFile
    pieces: tuple[Piece, ...]

    @property
    def offset(self) -> int:
        return self.pieces[0].offset if self.pieces else 0

    @property
    def length(self) -> int:
        return sum(piece.length for piece in self.pieces)


class Cut(NamedTuple):
    """A piece as it will be stored. `plain` and `stored` are valid until the next span is taken."""

    piece: Piece
    digest: str
    plain: memoryview
    codec: Codec
    stored: memoryview


def spans_of(file: SourceFile, pieces: Iterable[Piece]) -> Iterator[Span]:
    """The pieces in groups of at most SPAN_BYTES, after an empty one."""
    yield Span(file, ())
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        if group and size + piece.length > SPAN_BYTES:
            yield Span(file, tuple(group))
            group, size = [], 0
        group.append(piece)
        size += piece.length
    if group:
        yield Span(file, tuple(group))


class SpanReader:
    """Keeps `spans_ahead_max` spans in work, each with a buffer of SPAN_BYTES and what compressing it takes."""

    def __init__(
        self,
        source: Source,
        hasher: Hasher,
        threads: ThreadPoolExecutor,
        *,
        spans_ahead_max: int,
        compress: Compress,
        is_known: Callable[[str], bool],
    ) -> None:
        self._source = source
        self._hasher = hasher
        self._threads = threads
        self._ahead_max = spans_ahead_max
        self._compress = compress
        self._is_known = is_known
        self._buffers: list[bytearray] = []

    def read(self, spans: Iterable[Span]) -> Iterator[tuple[Span, list[Cut]]]:
        """Each span with its chunks, in order. Raises what the source raises."""
        ahead: deque[tuple[Span, bytearray, Future[list[Cut]] | None]] = deque()
        waiting = iter(spans)
        while True:
            while len(ahead) < self._ahead_max and (span := next(waiting, None)) is not None:
                buffer = self._buffer(span.length)
                result = self._threads.submit(self._carry, span, buffer) if span.pieces else None
                ahead.append((span, buffer, result))
            if not ahead:
                return
            span, buffer, result = ahead.popleft()
            yield span, result.result() if result is not None else []
            if len(buffer) == SPAN_BYTES:
                self._buffers.append(buffer)

    def _buffer(self, length: int) -> bytearray:
        """Large ones are used again: fresh memory costs more than filling it. Small files take what they are."""
        if not SMALL_BYTES <= length <= SPAN_BYTES:
            return bytearray(length)
        return self._buffers.pop() if self._buffers else bytearray(SPAN_BYTES)

    def _carry(self, span: Span, buffer: bytearray) -> list[Cut]:
        view = memoryview(buffer)[: span.length]
        self._source.read(span.file, span.offset, view)
        return [self._cut(piece, view[piece.offset - span.offset :][: piece.length]) for piece in span.pieces]

    def _cut(self, piece: Piece, plain: memoryview) -> Cut:
        digest = self._hasher.hexdigest(plain)
        if self._compress == "none" or self._is_known(digest):
            return Cut(piece, digest, plain, "plain", plain)
        gain = AUTO_GAIN_MIN if self._compress == "auto" else GAIN_MIN
        if self._compress == "auto" and len(plain) > 4 * SAMPLE_BYTES:
            # Not the start: headers and padding there say little of what follows.
            middle = plain[len(plain) // 2 :][:SAMPLE_BYTES]
            if len(encode("zstd", middle)) > len(middle) * (1 - gain):
                return Cut(piece, digest, plain, "plain", plain)
        packed = encode("zstd", plain)
        if len(packed) >= len(plain) * (1 - gain):
            return Cut(piece, digest, plain, "plain", plain)
        return Cut(piece, digest, plain, "zstd", memoryview(packed))

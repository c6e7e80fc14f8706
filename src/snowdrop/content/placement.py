"""Where each chunk of a tree belongs: places in its files, and in a landing area. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from snowdrop.domain.manifest import ChunkRef, Extent, Manifest
from snowdrop.wire.replica import AreaFile

AREA_ALIGNMENT = 4096
READ_BYTES_MAX = 8 << 20
"""Most that one thread reads and verifies at a time: the unit of cancellation and of scratch memory."""


class FilePlace(NamedTuple):
    """`length` bytes from `chunk_offset` of a chunk lie at `file_offset` of file `file`."""

    file: int
    file_offset: int
    chunk_offset: int
    length: int


class AreaPlace(NamedTuple):
    """`length` bytes from `chunk_offset` of a chunk lie at `offset` of the area."""

    offset: int
    chunk_offset: int
    length: int


def file_places(manifest: Manifest) -> list[list[FilePlace]]:
    """By chunk: every place in the files that holds its bytes."""
    places: list[list[FilePlace]] = [[] for _ in manifest.chunks]
    for index, entry in enumerate(manifest.files):
        for extent in entry.extents:
            places[extent.chunk].append(FilePlace(index, extent.file_offset, extent.chunk_offset, extent.length))
    return places


def joined(places: Iterable[FilePlace]) -> Iterator[FilePlace]:
    """The same stretches, neighbours in a file as one; `chunk_offset` is that of the first."""
    span: FilePlace | None = None
    for place in places:
        if span is not None and (span.file, span.file_offset + span.length) == place[:2]:
            span = span._replace(length=span.length + place.length)
            continue
        if span is not None:
            yield span
        span = place
    if span is not None:
        yield span


def name_of(chunk: ChunkRef) -> tuple[str, int]:
    """What two artefacts must agree in for a chunk to be the same.

    The size as well: a manifest may claim any for bytes that it does not have, and is not to be believed.
    """
    return chunk.digest, chunk.plain_bytes


def stretch_chunks(extents: Sequence[Extent], offset: int, length: int) -> list[int]:
    """The chunks that a stretch of a file consists of, in its order."""
    found: list[int] = []
    first = max(0, bisect_right(extents, offset, key=lambda extent: extent.file_offset) - 1)
    for at in range(first, len(extents)):
        if extents[at].file_offset >= offset + length:
            break
        found.append(extents[at].chunk)
    return found


class AreaLayout(NamedTuple):
    """The tensor files of a tree in one landing area, each aligned to AREA_ALIGNMENT."""

    size: int
    files: tuple[AreaFile, ...]
    places: dict[int, list[AreaPlace]]
    whole: dict[int, int]
    """Where a chunk lies as a whole, if it does anywhere."""


def area_layout(manifest: Manifest) -> AreaLayout:
    files: list[AreaFile] = []
    places: dict[int, list[AreaPlace]] = {}
    offset = 0
    for entry in manifest.files:
        if not entry.tensors:
            continue
        files.append(AreaFile(entry.path, offset, entry.size))
        for extent in entry.extents:
            place = AreaPlace(offset + extent.file_offset, extent.chunk_offset, extent.length)
            places.setdefault(extent.chunk, []).append(place)
        offset += -(-entry.size // AREA_ALIGNMENT) * AREA_ALIGNMENT
    whole = {
        chunk: place.offset
        for chunk, found in places.items()
        for place in found[:1]
        if place.length == manifest.chunks[chunk].plain_bytes
    }
    return AreaLayout(offset, tuple(files), places, whole)


def header_chunks(manifest: Manifest) -> list[int]:
    """Those with the headers of the tensor files: what lies before each file's first tensor."""
    found: list[int] = []
    for entry in manifest.files:
        if entry.tensors:
            end = min(tensor.offset for tensor in entry.tensors)
            found += [extent.chunk for extent in entry.extents if extent.file_offset < max(end, 1)]
    return list(dict.fromkeys(found))

"""Where the contents of a tree lie in `data`, and where it is cut. Pure.

Small files are packed into chunks with their neighbours: those that a trace names first, in its order, then the
others by path. Where one of these chunks ends depends on the contents alone as far as it can, so that a file more
or less changes the chunks around it and not all that come after. Large files have chunks of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from snowdrop.content.imagetree import aligned
from snowdrop.domain.image import IMAGE_CHUNK_BYTES_MAX, TreeEntry

LARGE_BYTES = 512 << 10
PACKED_BYTES_MIN = 128 << 10
"""A chunk of small files is not ended before, unless a large file comes."""
ENDS_BELOW = 8
"""A chunk of small files ends after a content whose digest's last byte is below: one of 32."""


class Content(NamedTuple):
    """A content and its place in `data`."""

    sha256: bytes
    size: int
    offset: int


class Layout(NamedTuple):
    """`entries` with their offsets, the contents in their order, `cuts` where chunks begin, `data` in all."""

    entries: tuple[TreeEntry, ...]
    contents: tuple[Content, ...]
    cuts: tuple[int, ...]
    data_bytes: int


def lay_out(entries: Sequence[TreeEntry], *, order: Iterable[bytes] = ()) -> Layout:
    """`order` are paths in the order of their first use; those that are no files here are passed over."""
    contents: list[Content] = []
    cuts: list[int] = []
    placed: dict[bytes, int] = {}
    end = 0
    chunk_begin: int | None = None
    for entry in _in_order(entries, order):
        if entry.size == 0 or entry.sha256 in placed:
            continue
        placed[entry.sha256] = end
        contents.append(Content(entry.sha256, entry.size, end))
        after = end + aligned(entry.size)
        if entry.size >= LARGE_BYTES:
            cuts += range(end, after, IMAGE_CHUNK_BYTES_MAX)
            chunk_begin = None
        else:
            if chunk_begin is None or after - chunk_begin > IMAGE_CHUNK_BYTES_MAX:
                chunk_begin = end
                cuts.append(end)
            if after - chunk_begin >= PACKED_BYTES_MIN and entry.sha256[-1] < ENDS_BELOW:
                chunk_begin = None
        end = after
    laid = tuple(_placed_at(entry, placed[entry.sha256]) if entry.size else entry for entry in entries)
    return Layout(laid, tuple(contents), tuple(cuts), end)


def _in_order(entries: Sequence[TreeEntry], order: Iterable[bytes]) -> Iterable[TreeEntry]:
    by_path = {entry.path: entry for entry in entries}
    for path in order:
        entry = by_path.get(path)
        if entry is not None and entry.kind == "hardlink":
            entry = by_path[entry.target]
        if entry is not None and entry.kind == "file":
            yield entry
    yield from (entry for entry in entries if entry.kind == "file")


def _placed_at(entry: TreeEntry, offset: int) -> TreeEntry:
    return msgspec.structs.replace(entry, offset=offset)

"""Where files are cut into chunks, and in which order they are loaded. Pure.

Safetensors are cut at tensor boundaries, so that a fine-tune or a re-shard re-uses every chunk of what it did
not change: a tensor of TINY_BYTES or more starts a chunk of its own and is cut every CHUNK_BYTES_MAX from its
own start; smaller neighbours share one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from snowdrop.content.safetensors import SUFFIX, Header
from snowdrop.domain.manifest import CHUNK_BYTES_MAX

TINY_BYTES = 256 << 10
_DIGITS = re.compile(r"(\d+)")


class Piece(NamedTuple):
    """A run of a file's bytes that becomes one chunk."""

    offset: int
    length: int


def cut_fixed(start: int, end: int) -> Iterator[Piece]:
    """Pieces of CHUNK_BYTES_MAX from `start`; the last one is shorter."""
    for offset in range(start, end, CHUNK_BYTES_MAX):
        yield Piece(offset, min(CHUNK_BYTES_MAX, end - offset))


def cut_at(begins: Sequence[int], end: int) -> Iterator[Piece]:
    """Pieces from each of `begins` to the next one; the last one ends at `end`."""
    for begin, after in pairwise((*begins, end)):
        yield Piece(begin, after - begin)


def cut_safetensors(header: Header) -> Iterator[Piece]:
    """The header as chunks of its own, then the tensors. Pieces cover the file without gap or overlap."""
    yield from cut_fixed(0, header.data_offset)
    start = end = header.data_offset
    for tensor in header.tensors:
        tiny = tensor.length < TINY_BYTES
        if end > start and (not tiny or end + tensor.length - start > CHUNK_BYTES_MAX):
            yield Piece(start, end - start)
            start = end
        end = tensor.offset + tensor.length
        if not tiny:
            yield from cut_fixed(start, end)
            start = end
    if end > start:
        yield Piece(start, end - start)


def is_tensor_file(path: str) -> bool:
    return path.endswith(SUFFIX)


def load_order_key(path: str) -> tuple[bool, list[tuple[int, str]], str]:
    """Sorts files into load order: metadata and other files first, then weights, shard 2 before shard 10."""
    natural = [(int(part[:18]), "") if part.isdecimal() else (-1, part) for part in _DIGITS.split(path) if part]
    return is_tensor_file(path), natural, path

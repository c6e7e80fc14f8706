"""Which parts of an artefact's tensor files can go from its landing area to the disk, in which blocks. No I/O.

Blocks lie on a grid over the area, so that none crosses the border of a slab of the usual sizes, and begin and
end in a file at multiples of a page, but for the file's own end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from snowdrop.content.placement import AreaLayout
from snowdrop.domain.manifest import Manifest

BLOCK_BYTES_MAX = 4 << 20


class FilledArea(Protocol):
    """What writing behind needs of a landing area."""

    @property
    def layout(self) -> AreaLayout: ...

    def is_filled(self, chunk: int) -> bool: ...

    def stretch(self, offset: int, length: int) -> int:
        """How many of `length` bytes from `offset` on lie in one piece: what `window` can be asked for."""

    def window(self, offset: int, length: int) -> memoryview: ...


class Block(NamedTuple):
    """`length` bytes at `file_offset` of `file` are those at `area_offset`; `chunks` have bytes among them."""

    file: int
    file_offset: int
    area_offset: int
    length: int
    chunks: tuple[int, ...]


def plan_blocks(manifest: Manifest, layout: AreaLayout) -> list[Block]:
    """All blocks of the tensor files, in the order of the area."""
    index_of = {entry.path: index for index, entry in enumerate(manifest.files)}
    blocks: list[Block] = []
    for file in layout.files:
        index = index_of[file.path]
        extents = sorted(manifest.files[index].extents, key=lambda extent: extent.file_offset)
        first = offset = 0
        while offset < file.size:
            at = file.offset + offset
            length = min(file.size - offset, BLOCK_BYTES_MAX - at % BLOCK_BYTES_MAX)
            while extents[first].file_offset + extents[first].length <= offset:
                first += 1
            last = first
            while last < len(extents) and extents[last].file_offset < offset + length:
                last += 1
            chunks = tuple(sorted({extent.chunk for extent in extents[first:last]}))
            blocks.append(Block(index, offset, at, length, chunks))
            offset += length
    return blocks


class Behind:
    """What of the tensor files is still to be written. The caller holds a lock."""

    def __init__(self, manifest: Manifest, layout: AreaLayout) -> None:
        self._blocks = plan_blocks(manifest, layout)
        self._of_chunk: dict[int, list[int]] = {}
        for index, block in enumerate(self._blocks):
            for chunk in block.chunks:
                self._of_chunk.setdefault(chunk, []).append(index)
        self._pending = {chunk: set(blocks) for chunk, blocks in self._of_chunk.items()}
        self._todo = dict.fromkeys(range(len(self._blocks)))

    def ready(self, area: FilledArea, is_settled: Callable[[int], bool], budget_bytes: int) -> list[Block]:
        """Blocks whose bytes are all in `area` and that hold a chunk that is not settled, in order.

        As many as `budget_bytes` allows, one at least. A block that has nothing unsettled is forgotten.
        """
        found: list[Block] = []
        for index in list(self._todo):
            block = self._blocks[index]
            if all(is_settled(chunk) for chunk in block.chunks):
                del self._todo[index]
            elif all(area.is_filled(chunk) for chunk in block.chunks):
                budget_bytes -= block.length
                if found and budget_bytes < 0:
                    break
                found.append(block)
        return found

    def wrote(self, block: Block, area: FilledArea) -> list[int]:
        """Notes a block as written; returns the chunks that are now written in every tensor file."""
        if not all(area.is_filled(chunk) for chunk in block.chunks):
            # A chunk was set aside while its bytes were on their way to the disk: they may be any.
            return []
        index = next(index for index in self._of_chunk[block.chunks[0]] if self._blocks[index] == block)
        self._todo.pop(index, None)
        for chunk in block.chunks:
            self._pending[chunk].discard(index)
        return [chunk for chunk in block.chunks if not self._pending[chunk]]

    def reopen(self, chunk: int) -> None:
        """The chunk is wrong on disk: its blocks are to be written again."""
        for index in self._of_chunk.get(chunk, ()):
            self._pending[chunk].add(index)
            self._todo[index] = None

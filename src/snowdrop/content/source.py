"""ChunkSource: the port behind which the chunks of one artefact are read, whatever the tier.

Sources do not verify: `fetch` does, on arrival, for every source alike.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, Protocol

from snowdrop.content.keys import PUBLIC_HASHER, Hasher
from snowdrop.content.layout import pack_key
from snowdrop.content.origin import Origin
from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.manifest import ChunkRef, Manifest

Tier = Literal["ram", "disk", "peer", "origin"]


class ChunkSource(Protocol):
    """Chunks are named by their index in the manifest. `read` blocks and may be called from several threads."""

    @property
    def tier(self) -> Tier: ...

    def holds(self, chunk: int) -> bool:
        """Whether `read` of this chunk can be tried."""

    def read(self, first: int, count: int, into: memoryview) -> None:
        """Fills `into` with the plaintext of `count` chunks from `first` on, one after the other.

        `into` has exactly their summed length. Raises a SnowdropError if the source cannot give them.
        """

    def quarantine(self, chunk: int) -> None:
        """This chunk's bytes were wrong: the source no longer holds it."""


class PackSource:
    """The origin's packs. Neighbours in a pack are read in one range."""

    tier: Tier = "origin"

    def __init__(self, origin: Origin, manifest: Manifest) -> None:
        self._origin = origin
        self._manifest = manifest
        self._bad: set[int] = set()

    def holds(self, chunk: int) -> bool:
        return chunk not in self._bad

    def read(self, first: int, count: int, into: memoryview) -> None:
        chunks = self._manifest.chunks[first : first + count]
        begin = done = 0
        for index, chunk in enumerate(chunks):
            if chunk.codec != "plain":
                raise InvalidInputError(
                    f"codec {chunk.codec!r} is not read by this version",
                    where=f"chunk {first + index}",
                    next_step="update Snowdrop on this node",
                )
            if index and not _adjacent(chunks[index - 1], chunk):
                self._read_range(chunks[begin], into[done : _end(chunks, begin, index, done)])
                done = _end(chunks, begin, index, done)
                begin = index
        if chunks:
            self._read_range(chunks[begin], into[done:])

    def quarantine(self, chunk: int) -> None:
        self._bad.add(chunk)

    def forgive(self) -> None:
        """Believes in every chunk again, for a new attempt at the artefact."""
        self._bad.clear()

    def _read_range(self, first: ChunkRef, into: memoryview) -> None:
        key = pack_key(self._manifest.key_domain, self._manifest.packs[first.pack].digest)
        self._origin.read_range(key, first.pack_offset, into)


def _adjacent(left: ChunkRef, right: ChunkRef) -> bool:
    return left.pack == right.pack and left.pack_offset + left.stored_bytes == right.pack_offset


def _end(chunks: tuple[ChunkRef, ...], begin: int, end: int, done: int) -> int:
    return done + sum(chunk.plain_bytes for chunk in chunks[begin:end])


def bad_chunks(
    manifest: Manifest, first: int, count: int, view: memoryview, hasher: Hasher = PUBLIC_HASHER
) -> list[int]:
    """Those of `count` chunks from `first` whose bytes in `view` do not match their digest.

    `hasher` is that of the manifest's key domain (`keys.chunk_hasher`); under another one every chunk is bad.
    """
    bad: list[int] = []
    done = 0
    for index in range(first, first + count):
        chunk = manifest.chunks[index]
        if hasher.hexdigest(view[done : done + chunk.plain_bytes]) != chunk.digest:
            bad.append(index)
        done += chunk.plain_bytes
    return bad


def runs_of(chunks: list[int]) -> list[tuple[int, int]]:
    """Ascending indices as (first, count) of consecutive ones."""
    if not chunks:
        return []
    starts = [chunks[0]] + [right for left, right in pairwise(chunks) if right != left + 1]
    ends = [left for left, right in pairwise(chunks) if right != left + 1] + [chunks[-1]]
    return [(start, end - start + 1) for start, end in zip(starts, ends, strict=True)]

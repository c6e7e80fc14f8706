"""ChunkSource: the port behind which the chunks of one artefact are read, whatever the tier.

Sources do not verify: `fetch` does, on arrival, for every source alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from snowdrop.content.codec import decode
from snowdrop.content.keys import PUBLIC_HASHER, Hasher
from snowdrop.content.layout import pack_key
from snowdrop.content.origin import Origin
from snowdrop.domain.errors import IntegrityError
from snowdrop.domain.manifest import ChunkRef, Manifest

Tier = Literal["ram", "disk", "peer", "origin"]
FindBad = Callable[[int, int, memoryview], list[int]]
"""(first, count, bytes): those of the chunks whose bytes are not what their digests say."""


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
        for end in range(1, count + 1):
            if end == count or not _together(chunks[end - 1], chunks[end]):
                size = sum(chunk.plain_bytes for chunk in chunks[begin:end])
                self._read_together(chunks[begin:end], into[done : done + size])
                done += size
                begin = end

    def quarantine(self, chunk: int) -> None:
        self._bad.add(chunk)

    def forgive(self) -> None:
        """Believes in every chunk again, for a new attempt at the artefact."""
        self._bad.clear()

    def _read_together(self, chunks: tuple[ChunkRef, ...], into: memoryview) -> None:
        """One range of one pack: in place if it is plain, otherwise decoded from a copy."""
        first = chunks[0]
        key = pack_key(self._manifest.key_domain, self._manifest.packs[first.pack].digest)
        if first.codec == "plain":
            self._origin.read_range(key, first.pack_offset, into)
            return
        stored = memoryview(bytearray(sum(chunk.stored_bytes for chunk in chunks)))
        self._origin.read_range(key, first.pack_offset, stored)
        taken = done = 0
        for chunk in chunks:
            decode(
                chunk.codec,
                stored[taken : taken + chunk.stored_bytes],
                into[done : done + chunk.plain_bytes],
            )
            taken += chunk.stored_bytes
            done += chunk.plain_bytes


def _together(left: ChunkRef, right: ChunkRef) -> bool:
    return (
        left.pack == right.pack
        and left.pack_offset + left.stored_bytes == right.pack_offset
        and (left.codec == "plain") == (right.codec == "plain")
    )


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


def wrong_chunk(manifest: Manifest, chunk: int) -> IntegrityError:
    """The error of a chunk that even the origin has wrong: names chunk, pack and file."""
    ref = manifest.chunks[chunk]
    path = next(
        (entry.path for entry in manifest.files if any(extent.chunk == chunk for extent in entry.extents)),
        "no file",
    )
    key = pack_key(manifest.key_domain, manifest.packs[ref.pack].digest)
    return IntegrityError(
        f"chunk {chunk} of {path} is wrong at the origin",
        where=f"chunk {ref.digest[:16]}, pack {key}, {ref.stored_bytes} bytes at {ref.pack_offset}",
        next_step="`snowdrop model push NAME SOURCE --repair` (code: deploy it again) puts right bytes there",
    )

"""RAM tier: landing areas, one sealed memfd per artefact, filled in place and mapped by every replica.

The seals keep whoever gets the descriptor from writing to, shrinking or growing the area; only the mapping made
here, before the seal, can write. A private (copy-on-write) mapping remains possible and is what replicas make.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections import OrderedDict
from contextlib import suppress
from errno import ENOMEM, ENOSPC

from snowdrop.content.placement import AreaLayout
from snowdrop.content.source import Tier
from snowdrop.domain.errors import StorageFullError
from snowdrop.domain.ids import Digest
from snowdrop.domain.manifest import Manifest

F_SEAL_FUTURE_WRITE = 0x10
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL


class Area:
    """The landing area of one artefact. `filled` says which chunks hold verified bytes; it is a ChunkSource."""

    tier: Tier = "ram"

    def __init__(self, manifest: Manifest, layout: AreaLayout) -> None:
        self.layout = layout
        self._manifest = manifest
        self._filled = bytearray(len(manifest.chunks))
        self._fd = os.memfd_create("snowdrop-area", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, layout.size)
            self._map = mmap.mmap(self._fd, layout.size)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            os.close(self._fd)
            raise _no_memory(layout.size) if error.errno in {ENOMEM, ENOSPC} else error from error
        self._view = memoryview(self._map)

    def fileno(self) -> int:
        """The area's own descriptor: duplicate it to keep it."""
        return self._fd

    def stretch(self, offset: int, length: int) -> int:
        """How many of `length` bytes from `offset` on lie in one piece."""
        return min(length, self.layout.size - offset)

    def window(self, offset: int, length: int) -> memoryview:
        """Writable bytes of the area; the caller lets go of them before the area is closed."""
        return self._view[offset : offset + length]

    def scatter(self, chunk: int, data: memoryview) -> None:
        """Copies a chunk to every place that it has in the area, except where it already lies."""
        for place in self.layout.places.get(chunk, ()):
            target = self._view[place.offset : place.offset + place.length]
            target[:] = data[place.chunk_offset : place.chunk_offset + place.length]

    def mark(self, chunk: int) -> None:
        self._filled[chunk] = 1

    def holds(self, chunk: int) -> bool:
        return bool(self._filled[chunk]) and chunk in self.layout.whole

    def is_filled(self, chunk: int) -> bool:
        """Whether every place of the area that takes bytes of this chunk has them."""
        return bool(self._filled[chunk])

    def missing(self) -> list[int]:
        """Chunks of the tensor files that are not filled yet, ascending."""
        return [chunk for chunk in sorted(self.layout.places) if not self._filled[chunk]]

    def read(self, first: int, count: int, into: memoryview) -> None:
        done = 0
        for chunk in range(first, first + count):
            size = self._manifest.chunks[chunk].plain_bytes
            into[done : done + size] = self.window(self.layout.whole[chunk], size)
            done += size

    def quarantine(self, chunk: int) -> None:
        self._filled[chunk] = 0

    def close(self) -> None:
        """Gives up this process's hold; the pages live on in whoever has mapped them."""
        self._view.release()
        # A traceback may still hold a window; the mapping then goes when that does.
        with suppress(BufferError):
            self._map.close()
        os.close(self._fd)


class RamTier:
    """All landing areas of the node, at most `bytes_max`; the least recently used unpinned ones make room.

    For one event loop: `reserve` decides and forgets at once, the slow part (closing what made room, making the
    new area) is then done in a thread.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._areas: OrderedDict[Digest, Area] = OrderedDict()
        self._reserved: dict[Digest, int] = {}

    @property
    def used_bytes(self) -> int:
        return sum(area.layout.size for area in self._areas.values()) + sum(self._reserved.values())

    def get(self, digest: Digest) -> Area | None:
        area = self._areas.get(digest)
        if area is not None:
            self._areas.move_to_end(digest)
        return area

    def reserve(self, digest: Digest, size: int, pinned: set[Digest]) -> list[Area]:
        """Sets `size` bytes aside and gives the areas to close for it; raises StorageFullError if none fits."""
        victims: list[Digest] = []
        free = self._bytes_max - self.used_bytes
        for other, area in self._areas.items():
            if free >= size:
                break
            if other not in pinned:
                victims.append(other)
                free += area.layout.size
        if free < size:
            raise _no_memory(size, f"ram_bytes_max={self._bytes_max}, in use {self.used_bytes}")
        self._reserved[digest] = size
        return [self._areas.pop(other) for other in victims]

    def settle(self, digest: Digest, area: Area | None) -> None:
        """Ends a reservation: with the area made for it, or without one because that failed."""
        del self._reserved[digest]
        if area is not None:
            self._areas[digest] = area

    def close(self) -> None:
        while self._areas:
            self._areas.popitem()[1].close()


def _no_memory(size: int, place: str = "memory") -> StorageFullError:
    return StorageFullError(
        f"no room for a landing area of {size} bytes",
        where=place,
        next_step="scale another deployment down, or raise ram_bytes_max",
    )

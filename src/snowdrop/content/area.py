"""RAM tier: landing areas, one per artefact, filled in place and mapped by every replica.

An area is one stretch of this process's memory, made of slabs. Whoever gets the slabs' descriptors can neither
write to, shrink nor grow them; a private (copy-on-write) mapping is possible and is what replicas make.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from snowdrop.content.mapping import memory_at
from snowdrop.content.placement import AreaLayout, name_of
from snowdrop.content.progress import FillState, ProgressWriter
from snowdrop.content.slabs import Slab, SlabPool, no_memory
from snowdrop.content.source import Tier
from snowdrop.domain.errors import ConflictError, ErrorBody
from snowdrop.domain.ids import Digest
from snowdrop.domain.manifest import ChunkRef, Manifest
from snowdrop.policy.eviction import Kept, choose


class Area:
    """The landing area of one artefact; it is a ChunkSource of what is filled.

    `progress` is the map that readers see. Memory is only touched inside `use`: an area that is in use is not
    taken apart.
    """

    tier: Tier = "ram"

    def __init__(self, manifest: Manifest, layout: AreaLayout, pool: SlabPool) -> None:
        """Blocks. Raises StorageFullError."""
        self.layout = layout
        self._manifest = manifest
        self._pool = pool
        self.slabs: tuple[Slab, ...] = tuple(pool.take(layout.size))
        self._chunk_bytes = {
            chunk: sum(place.length for place in places) for chunk, places in layout.places.items()
        }
        extents = sorted(
            (place.offset, place.length, chunk) for chunk, places in layout.places.items() for place in places
        )
        try:
            self.progress = ProgressWriter(extents, len(manifest.chunks), sum(self._chunk_bytes.values()))
        except OSError:
            pool.give_back(self.slabs)
            raise
        self._view = memory_at(self.slabs[0].address, layout.size) if self.slabs else memoryview(bytearray())
        self._index = {name_of(manifest.chunks[chunk]): chunk for chunk in layout.whole}
        self._lock = threading.Lock()
        self._users = 0
        self._is_closed = False

    def find(self, key_domain: str, wanted: ChunkRef) -> int | None:
        """The number that another artefact's chunk has here, if the area has a place for all of it."""
        if key_domain != self._manifest.key_domain:
            return None
        return self._index.get(name_of(wanted))

    @property
    def slab_bytes(self) -> int:
        """What the area takes of the RAM tier."""
        return sum(slab.size for slab in self.slabs)

    @property
    def is_complete(self) -> bool:
        return self.progress.filled_bytes == self.progress.total_bytes

    @property
    def is_in_use(self) -> bool:
        return self._users > 0

    @contextmanager
    def use(self) -> Iterator[None]:
        """Keeps the memory from being taken away. Raises ConflictError if it has been."""
        with self._lock:
            if self._is_closed:
                raise ConflictError("the landing area is gone", where="ram tier", next_step="ensure it again")
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1

    def stretch(self, offset: int, length: int) -> int:
        """How many of `length` bytes from `offset` on lie in one piece."""
        return min(length, self.layout.size - offset)

    def window(self, offset: int, length: int) -> memoryview:
        """Writable bytes of the area, for as long as it is in use."""
        return self._view[offset : offset + length]

    def scatter(self, chunk: int, data: memoryview, lies_at: int = -1) -> None:
        """Copies a chunk to every place that it has in the area; `lies_at` is where `data` lies in it already."""
        for place in self.layout.places.get(chunk, ()):
            if lies_at < 0 or place.offset != lies_at + place.chunk_offset:
                target = self._view[place.offset : place.offset + place.length]
                target[:] = data[place.chunk_offset : place.chunk_offset + place.length]

    def mark(self, chunk: int) -> None:
        """Verified bytes are in every place of the chunk."""
        self.progress.mark(chunk, self._chunk_bytes.get(chunk, 0))

    def holds(self, chunk: int) -> bool:
        return bool(self.progress.filled[chunk]) and chunk in self.layout.whole

    def is_filled(self, chunk: int) -> bool:
        """Whether every place of the area that takes bytes of this chunk has them."""
        return bool(self.progress.filled[chunk])

    def chunk(self, chunk: int) -> memoryview:
        """The bytes of a chunk that lies in the area as a whole, for as long as it is in use."""
        return self.window(self.layout.whole[chunk], self._manifest.chunks[chunk].plain_bytes)

    def missing(self) -> list[int]:
        """Chunks of the tensor files that are not filled yet, ascending."""
        filled = self.progress.filled
        return [chunk for chunk in sorted(self.layout.places) if not filled[chunk]]

    def read(self, first: int, count: int, into: memoryview) -> None:
        done = 0
        with self.use():
            for chunk in range(first, first + count):
                size = self._manifest.chunks[chunk].plain_bytes
                into[done : done + size] = self.window(self.layout.whole[chunk], size)
                done += size

    def quarantine(self, chunk: int) -> None:
        self.progress.unmark(chunk, self._chunk_bytes.get(chunk, 0))

    def set_state(self, state: FillState, error: ErrorBody | None = None) -> None:
        self.progress.set_state(state, error)

    def retire(self) -> bool:
        """Lets nobody use the area from now on; False, and nothing done, if somebody does. `close` follows."""
        with self._lock:
            if not self._users:
                self._is_closed = True
        return self._is_closed

    def close(self) -> None:
        """Gives the slabs back to the pool. Raises ConflictError if somebody uses the area."""
        if not self.retire():
            raise ConflictError("the landing area is in use", where="ram tier")
        slabs, self.slabs = self.slabs, ()
        if slabs:
            self._view = memoryview(b"")
            self.progress.close()
            self._pool.give_back(slabs)


class RamTier:
    """All landing areas of the node, at most `bytes_max`; the least recently used unpinned ones make room.

    For one event loop: `reserve` decides and forgets at once, the slow part (closing what made room, making the
    new area) is then done in a thread.
    """

    def __init__(self, bytes_max: int, pool: SlabPool | None = None) -> None:
        self.bytes_max = bytes_max
        self.pool = pool or SlabPool()
        self._areas: OrderedDict[Digest, Area] = OrderedDict()
        self._reserved: dict[Digest, int] = {}
        self._doomed: list[Area] = []

    @property
    def used_bytes(self) -> int:
        return sum(area.slab_bytes for area in self._areas.values()) + sum(self._reserved.values())

    def get(self, digest: Digest) -> Area | None:
        """The artefact's area, now the most recently used one."""
        area = self._areas.get(digest)
        if area is not None:
            self._areas.move_to_end(digest)
        return area

    def areas(self) -> list[tuple[Digest, Area]]:
        """All of them, the least recently used first."""
        return list(self._areas.items())

    def reserve(self, digest: Digest, size: int, is_held: Callable[[Digest], bool]) -> list[Area]:
        """Sets room for `size` bytes aside and gives the areas to close for it.

        Raises StorageFullError if none fits.
        """
        wanted = self.pool.rounded(size)
        kept = [
            Kept(
                name=other,
                size_bytes=area.slab_bytes,
                used=order,
                is_pinned=is_held(other) or area.is_in_use,
            )
            for order, (other, area) in enumerate(self._areas.items())
        ]
        decision = choose(kept, wanted, self.bytes_max - sum(self._reserved.values()))
        if not decision.fits:
            raise no_memory(size, f"ram_bytes_max={self.bytes_max}, in use {self.used_bytes}")
        victims = [Digest(name) for name in decision.victims]
        self._doomed += [self._areas.pop(other) for other in victims if self._areas[other].retire()]
        if self.bytes_max - self.used_bytes < wanted:
            # Somebody began to use one just now. The others are closed by the next who looks for room.
            raise no_memory(size, f"ram_bytes_max={self.bytes_max}, in use {self.used_bytes}")
        self._reserved[digest] = wanted
        doomed, self._doomed = self._doomed, []
        return doomed

    def settle(self, digest: Digest, area: Area | None) -> None:
        """Ends a reservation: with the area made for it, or without one because that failed."""
        del self._reserved[digest]
        if area is not None:
            self._areas[digest] = area

    def drop(self, digest: Digest) -> Area | None:
        """Forgets and gives the artefact's area, to be closed; None if there is none or somebody uses it."""
        area = self._areas.get(digest)
        return self._areas.pop(digest) if area is not None and area.retire() else None

    def least_used(self, is_held: Callable[[Digest], bool]) -> Area | None:
        """Forgets and gives the least recently used area that nobody holds, to be closed."""
        for digest, area in self._areas.items():
            if not is_held(digest) and area.retire():
                return self._areas.pop(digest)
        return None

    def close(self) -> None:
        for area in (*self._doomed, *self._areas.values()):
            area.close()
        self._doomed.clear()
        self._areas.clear()
        self.pool.close()

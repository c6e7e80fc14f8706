"""Chunks that other artefacts of this node hold: a fine-tune or a re-shard takes from there what it shares.

Artefacts of one key domain only: ids of private content are keyed, so nobody finds another tenant's chunk. What is
copied is verified on arrival like everything else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

from snowdrop.content.area import Area
from snowdrop.content.disk import DiskTier
from snowdrop.content.fill import Fill
from snowdrop.content.landing import Landing
from snowdrop.content.source import Tier
from snowdrop.domain.errors import NotFoundError
from snowdrop.domain.manifest import Manifest

LOOK_MAX = 64
"""So many chunks that are still on their way are looked at before a look at those that were waited for ends."""


class AreaSiblings:
    """The landing areas of other artefacts, as they are when asked."""

    tier: Tier = "ram"

    def __init__(self, manifest: Manifest, areas: Callable[[], Sequence[Area]]) -> None:
        """`areas` gives all of the node, also from other threads."""
        self._manifest = manifest
        self._areas = areas
        self._bad: set[int] = set()

    def holds(self, chunk: int) -> bool:
        return chunk not in self._bad and self._find(chunk) is not None

    def read(self, first: int, count: int, into: memoryview) -> None:
        done = 0
        for chunk in range(first, first + count):
            found = self._find(chunk)
            if found is None:
                raise NotFoundError("the other artefact's area is gone", where=f"chunk {chunk}")
            size = self._manifest.chunks[chunk].plain_bytes
            area, index = found
            area.read(index, 1, into[done : done + size])
            done += size

    def quarantine(self, chunk: int) -> None:
        self._bad.add(chunk)

    def _find(self, chunk: int) -> tuple[Area, int] | None:
        wanted = self._manifest.chunks[chunk]
        for area in self._areas():
            index = area.find(self._manifest.key_domain, wanted)
            if index is not None and area.holds(index):
                return area, index
        return None


class DiskSiblings:
    """Landing directories of other artefacts; `look` finds what they have, once, before a load."""

    tier: Tier = "disk"

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._found: dict[int, tuple[Landing, int]] = {}
        self._was_read: set[int] = set()
        self._lock = threading.Lock()

    def look(self, disk: DiskTier, chunks: Iterable[int], own: Landing) -> None:
        """Blocks."""
        for chunk in chunks:
            found = disk.find_chunk(self._manifest.key_domain, self._manifest.chunks[chunk])
            if found is not None and found[0] is not own:
                self._found[chunk] = found

    def holds(self, chunk: int) -> bool:
        found = self._found.get(chunk)
        return found is not None and found[0].holds(found[1])

    def read(self, first: int, count: int, into: memoryview) -> None:
        """Neighbours that are neighbours there, too, are read at once."""
        chunks = self._manifest.chunks
        begin, done = first, 0
        for end in range(first + 1, first + count + 1):
            if end == first + count or not self._are_neighbours(end - 1, end):
                size = sum(chunk.plain_bytes for chunk in chunks[begin:end])
                landing, index = self._at(begin)
                landing.read(index, end - begin, into[done : done + size])
                done += size
                begin = end
        with self._lock:
            self._was_read.update(range(first, first + count))

    def quarantine(self, chunk: int) -> None:
        """Wrong bytes are told to the directory that had them; what could not be read is only not asked again."""
        with self._lock:
            found = self._found.pop(chunk, None)
            was_read = chunk in self._was_read
        if found is not None and was_read:
            landing, index = found
            landing.quarantine(index)

    def _at(self, chunk: int) -> tuple[Landing, int]:
        found = self._found.get(chunk)
        if found is None:
            raise NotFoundError("the other artefact's directory is gone", where=f"chunk {chunk}")
        return found

    def _are_neighbours(self, left: int, right: int) -> bool:
        one, other = self._found.get(left), self._found.get(right)
        return one is not None and other is not None and one[0] is other[0] and one[1] + 1 == other[1]


class EarlierFills:
    """Loads that began earlier and are about to bring the same chunks: nobody fetches those a second time.

    Called with the engine's lock held, as the fills themselves.
    """

    def __init__(self, own: Fill, others: Sequence[Fill]) -> None:
        self._own = own
        self._others = [fill for fill in others if fill.manifest.key_domain == own.manifest.key_domain]
        self._held_up: dict[int, None] = {}

    def holds_up(self, chunk: int) -> bool:
        if not self._is_coming(chunk):
            return False
        self._held_up[chunk] = None
        return True

    def no_longer(self) -> list[int]:
        free: list[int] = []
        coming = 0
        for chunk in self._held_up:
            if not self._is_coming(chunk):
                free.append(chunk)
            elif (coming := coming + 1) == LOOK_MAX:
                break  # all threads ask this, under a lock; when one of these has come, they ask again
        for chunk in free:
            del self._held_up[chunk]
        return free

    def _is_coming(self, chunk: int) -> bool:
        wanted = self._own.manifest.chunks[chunk]
        for fill in self._others:
            if fill.turn < self._own.turn and fill.area is not None:
                index = fill.area.find(fill.manifest.key_domain, wanted)
                if index is not None and fill.will_bring(index):
                    return True
        return False

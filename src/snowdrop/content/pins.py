"""Who holds which artefact on this node. What is held is never evicted."""

from __future__ import annotations

from collections import Counter, defaultdict

from snowdrop.domain.ids import Digest


class Pins:
    """Counted, because one holder may ask twice and give up one of the two."""

    def __init__(self) -> None:
        self._held: defaultdict[str, Counter[Digest]] = defaultdict(Counter)

    def take(self, holder: str, digest: Digest) -> None:
        self._held[holder][digest] += 1

    def drop(self, holder: str, digest: Digest) -> None:
        """Takes back one `take`; does nothing if the holder was released meanwhile."""
        counts = self._held.get(holder)
        if counts is None:
            return
        counts[digest] -= 1
        if counts[digest] <= 0:
            del counts[digest]
        if not counts:
            del self._held[holder]

    def release(self, holder: str) -> None:
        """Drops everything that `holder` has taken."""
        self._held.pop(holder, None)

    def has(self, holder: str, digest: Digest) -> bool:
        counts = self._held.get(holder)
        return counts is not None and digest in counts

    def is_pinned(self, digest: Digest) -> bool:
        return any(digest in counts for counts in self._held.values())

    def holders(self, digest: Digest) -> list[str]:
        """Everybody who holds an artefact."""
        return [holder for holder, counts in self._held.items() if digest in counts]

    def pinned(self) -> set[Digest]:
        return {digest for counts in self._held.values() for digest in counts}

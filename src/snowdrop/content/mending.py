"""Brings chunks that a landing directory lost from another source: what the scrubber does with what it found."""

from __future__ import annotations

import anyio.to_thread

from snowdrop.content.artefact import Artefact, Keys
from snowdrop.content.disk import DiskTier
from snowdrop.content.fetch import FetchEngine
from snowdrop.content.origin import Origin
from snowdrop.content.scrub import Scrubber
from snowdrop.domain.errors import NotFoundError
from snowdrop.domain.ids import Digest
from snowdrop.policy.prefetch import LATER


class Mender:
    """Fetches through the node's engine, behind everything that somebody waits for."""

    def __init__(self, origin: Origin, disk: DiskTier, engine: FetchEngine, keys: Keys) -> None:
        self._origin = origin
        self._disk = disk
        self._engine = engine
        self._keys = keys

    async def mend(self, digest: Digest, chunks: list[int]) -> None:
        """Returns when the chunks are on disk again, verified and durable; raises why they never will be."""
        landing = await anyio.to_thread.run_sync(self._disk.known_landing, digest)
        if landing is None:
            raise NotFoundError("the artefact is not on this node's disk", where=digest)
        manifest = landing.manifest
        hasher = await anyio.to_thread.run_sync(self._keys.hasher, manifest.key_domain)
        # One of its own, which is in no books: the artefact may not be in use, and is not to be made so by this.
        artefact = Artefact(digest, manifest, self._origin, hasher)
        artefact.fill.landing = landing
        await artefact.bring(self._engine, chunks, "landing", LATER)
        await anyio.to_thread.run_sync(landing.sync)


def make_scrubber(origin: Origin, disk: DiskTier, engine: FetchEngine, keys: Keys, bytes_per_s: int) -> Scrubber:
    """A scrubber of a node: gives way to its loads, mends from its origin."""
    mender = Mender(origin, disk, engine, keys)
    return Scrubber(disk, keys, mender.mend, bytes_per_s=bytes_per_s, is_busy=lambda: engine.is_busy)

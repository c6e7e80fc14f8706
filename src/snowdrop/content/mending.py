"""Brings chunks that a landing directory lost from another source: what the scrubber does with what it found."""

from __future__ import annotations

import anyio.to_thread

from snowdrop.content.artefact import Artefact
from snowdrop.content.origin import Origin
from snowdrop.content.parts import StoreParts
from snowdrop.content.scrub import Scrubber
from snowdrop.content.siblings import AreaSiblings, DiskSiblings
from snowdrop.domain.errors import NotFoundError
from snowdrop.domain.ids import Digest
from snowdrop.policy.prefetch import LATER


class Mender:
    """Fetches through the node's engine, behind everything that somebody waits for.

    From memory, from other artefacts on the disk, from the origin.
    """

    def __init__(self, parts: StoreParts, origin: Origin) -> None:
        self._parts = parts
        self._origin = origin

    async def mend(self, digest: Digest, chunks: list[int]) -> None:
        """Returns when the chunks are on disk again, verified and durable; raises why they never will be."""
        parts = self._parts
        landing = await anyio.to_thread.run_sync(parts.disk.known_landing, digest)
        if landing is None:
            raise NotFoundError("the artefact is not on this node's disk", where=digest)
        manifest = landing.manifest
        hasher = await anyio.to_thread.run_sync(parts.keys.hasher, manifest.key_domain)
        on_disk = DiskSiblings(manifest)
        await anyio.to_thread.run_sync(on_disk.look, parts.disk, chunks, landing)
        # One of its own, which is in no books: the artefact may not be in use, and is not to be made so by this.
        artefact = Artefact(digest, manifest, self._origin, hasher)
        artefact.fill.landing = landing
        artefact.fill.siblings = (AreaSiblings(manifest, parts.areas.all), on_disk)
        await artefact.bring(parts.engine, chunks, "landing", LATER)
        await anyio.to_thread.run_sync(landing.sync)


def make_scrubber(parts: StoreParts, origin: Origin, bytes_per_s: int) -> Scrubber:
    """A scrubber of a node: gives way to its loads, mends from what it has or from its origin."""
    engine = parts.engine
    mend = Mender(parts, origin).mend
    return Scrubber(parts.disk, parts.keys, mend, bytes_per_s=bytes_per_s, is_busy=lambda: engine.is_busy)

"""What a node's content store is made of, as upkeep sees it."""

from __future__ import annotations

from typing import NamedTuple

import anyio

from snowdrop.content.areas import Areas
from snowdrop.content.artefact import Artefact
from snowdrop.content.disk import DiskTier
from snowdrop.content.fetch import FetchEngine
from snowdrop.content.keys import HasherSource
from snowdrop.content.origin import Origin
from snowdrop.content.pins import Pins
from snowdrop.content.source import Tier
from snowdrop.domain.ids import Digest
from snowdrop.domain.receipt import ContentBytes


class StoreParts(NamedTuple):
    """A store's parts, for upkeep, which keeps its rules: one event loop, `opening` around evictions."""

    areas: Areas
    disk: DiskTier
    engine: FetchEngine
    keys: HasherSource
    pins: Pins
    artefacts: dict[Digest, Artefact]
    opening: anyio.Lock
    origin: Origin


def content_bytes(given: dict[Tier, int]) -> ContentBytes:
    """Bytes by tier as receipts have them."""
    return ContentBytes(
        ram=given.get("ram", 0),
        disk=given.get("disk", 0),
        peer=given.get("peer", 0),
        origin=given.get("origin", 0),
    )

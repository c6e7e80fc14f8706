"""Upkeep of the node's content, over the data plane's channel: figures, verification, pins, eviction.

All are asked by the agent when a person asks; each is answered by the message named, or by Refused.
"""

from __future__ import annotations

import msgspec

from snowdrop.domain.ids import Digest, TenantId
from snowdrop.wire.codec import Message

CONTENT_PER_ANSWER_MAX = 400
"""Artefacts in one answer; below the bound of a packet."""
EVENTS_SHOWN_MAX = 50


class NodeEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A chunk that was found wrong on this node, or mended."""

    time_unix_ns: int
    kind: str
    artefact: str
    chunk: int
    file: str
    seen_by: str


class NodeStats(msgspec.Struct, frozen=True, kw_only=True):
    """The store of one node. `served_bytes` counts what loads were given since the data plane started, by tier;
    `quarantined` and `replaced` count chunks over restarts, as far as the log of events goes back.
    """

    ram_bytes: int
    ram_bytes_max: int
    areas: int
    pool_idle_bytes: int
    disk_bytes: int
    disk_bytes_max: int
    artefacts: int
    pinned: int
    served_bytes: dict[str, int]
    quarantined: int
    replaced: int
    events: tuple[NodeEvent, ...]
    scrubbed_oldest_unix_s: float
    scrubbed_never: int


class NodeContent(msgspec.Struct, frozen=True, kw_only=True):
    """One artefact on the node. `is_held`: by replicas or work under way; `pin`: the name it was pinned by."""

    manifest: Digest
    disk_bytes: int
    ram_bytes: int
    used_unix_ns: int
    is_held: bool
    pin: str | None


class BadChunk(msgspec.Struct, frozen=True, kw_only=True):
    """A chunk whose copy on this node was wrong. `problem` says why it could not be mended; empty if it was."""

    chunk: int
    file: str
    tier: str
    problem: str = ""


class AskStats(Message, frozen=True, kw_only=True):
    """-> StatsTold."""

    request: int


class StatsTold(Message, frozen=True, kw_only=True):
    request: int
    stats: NodeStats


class AskContent(Message, frozen=True, kw_only=True):
    """-> ContentTold: artefacts on the node in the order of their digests, those after `after`."""

    request: int
    after: str


class ContentTold(Message, frozen=True, kw_only=True):
    request: int
    content: tuple[NodeContent, ...]
    is_last: bool


class VerifyContent(Message, frozen=True, kw_only=True):
    """-> ContentVerified: reads copies of chunks from `first` on until about `bytes_max` have been read.

    Wrong ones are quarantined and fetched again from another source.
    """

    request: int
    manifest: Digest
    key_domain: str
    first: int
    bytes_max: int


class ContentVerified(Message, frozen=True, kw_only=True):
    """Asked again with `first` = `next_chunk` it goes on, until that is `chunk_count`."""

    request: int
    next_chunk: int
    chunk_count: int
    read_bytes: int
    bad: tuple[BadChunk, ...]


class PinContent(Message, frozen=True, kw_only=True):
    """-> Completed: the pin is durable. `name` is what people call the artefact. Pinning twice is one pin."""

    request: int
    tenant: TenantId
    manifest: Digest
    key_domain: str
    name: str


class UnpinContent(Message, frozen=True, kw_only=True):
    """-> Completed, also if there was no pin."""

    request: int
    manifest: Digest


class EvictContent(Message, frozen=True, kw_only=True):
    """-> ContentEvicted: drops the copies of artefacts that nobody holds and that were not used since."""

    request: int
    manifests: tuple[Digest, ...]
    unused_since_unix_ns: int


class ContentEvicted(Message, frozen=True, kw_only=True):
    request: int
    evicted: tuple[Digest, ...]
    disk_bytes: int
    ram_bytes: int


ToUpkeep = AskStats | AskContent | VerifyContent | PinContent | UnpinContent | EvictContent
FromUpkeep = StatsTold | ContentTold | ContentVerified | ContentEvicted


class PinRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of the agent's `POST /store/pins`."""

    tenant: TenantId
    manifest: Digest
    key_domain: str
    name: str


class VerifyRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of the agent's `POST /store/verify`."""

    manifest: Digest
    key_domain: str


class EvictRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of the agent's `POST /store/evict`."""

    manifests: tuple[Digest, ...]
    unused_since_unix_ns: int


class WorkLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of a streamed answer: how far it is, what was found, and at the end `is_done`."""

    done: int = 0
    total: int = 0
    read_bytes: int = 0
    bad: tuple[BadChunk, ...] = ()
    is_done: bool = False

"""The node's part of `store ...`: what is on it, pins, verification, cleaning up."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from snowdrop.cli.output import Context, console, human_age, human_bytes, table
from snowdrop.domain.deployment import ModelRecord
from snowdrop.domain.errors import NotFoundError
from snowdrop.domain.ids import Digest, TenantId, parse_digest
from snowdrop.policy.cleanup import Copy, choose
from snowdrop.wire.api import StoreRoots
from snowdrop.wire.upkeep import (
    BadChunk,
    ContentEvicted,
    EvictRequest,
    NodeContent,
    NodeStats,
    PinRequest,
    VerifyRequest,
    WorkLine,
)

NODE = ("store", "node")
SECOND_NS = 1_000_000_000
EVENTS_SHOWN = 5


class NodeArtefact(msgspec.Struct, frozen=True, kw_only=True):
    """An artefact to work on, and what people call it."""

    manifest: Digest
    key_domain: str
    name: str


class NodeVerified(msgspec.Struct, frozen=True, kw_only=True):
    """One artefact's copies on the node. `is_here`: whether there are any."""

    artefact: NodeArtefact
    is_here: bool
    read_bytes: int
    bad: tuple[BadChunk, ...]


class NodeCleaned(msgspec.Struct, frozen=True, kw_only=True):
    """Copies that were, or with --dry-run would be, dropped from the node."""

    evicted: tuple[Digest, ...]
    disk_bytes: int
    ram_bytes: int
    reason: str


def node_stats(ctx: Context) -> NodeStats:
    return ctx.client.get(NodeStats, *NODE, "stats")


def node_content(ctx: Context) -> list[NodeContent]:
    return ctx.client.get(list[NodeContent], *NODE, "content")


def resolve(ctx: Context, text: str) -> NodeArtefact:
    """A model's name, or a manifest's digest. Raises NotFoundError."""
    if ":" not in text:
        record = ctx.client.get(ModelRecord, "models", text)
        return NodeArtefact(
            manifest=record.artefact.manifest, key_domain=record.artefact.key_domain, name=str(record.name)
        )
    digest = parse_digest(text)
    for root in ctx.client.get(StoreRoots, "store", "roots").roots:
        if root.manifest == digest:
            return NodeArtefact(manifest=digest, key_domain=root.key_domain, name=", ".join(root.named_by))
    raise NotFoundError(
        "nothing that this platform names has this digest",
        where=text,
        next_step="`snowdrop model ls` and `snowdrop model show NAME` have the digests",
    )


def pin(ctx: Context, text: str, tick: Callable[[], None]) -> NodeArtefact:
    """Pins an artefact and brings it to the node; `tick` is called now and then meanwhile."""
    artefact = resolve(ctx, text)
    body = PinRequest(
        tenant=TenantId(ctx.tenant),
        manifest=artefact.manifest,
        key_domain=artefact.key_domain,
        name=artefact.name,
    )
    for _ in ctx.client.work(*NODE, "pins", body=body):
        tick()
    return artefact


def unpin(ctx: Context, text: str) -> list[Digest]:
    """Takes back pins: those set by this name, or of this digest. Raises NotFoundError if there is none."""
    pinned = [content for content in node_content(ctx) if content.pin is not None]
    found = [content.manifest for content in pinned if text in {content.pin, content.manifest}]
    if not found:
        raise NotFoundError(
            f"nothing is pinned as {text!r}", where="pins", next_step="`snowdrop store stats` lists pins"
        )
    for manifest in found:
        ctx.client.delete(*NODE, "pins", manifest)
    return found


def verify_node(ctx: Context, artefact: NodeArtefact, progress: Callable[[WorkLine], None]) -> NodeVerified:
    """Reads the copies of one artefact on the node; wrong ones are mended from elsewhere."""
    body = VerifyRequest(manifest=artefact.manifest, key_domain=artefact.key_domain)
    read_bytes, total, bad = 0, 0, list[BadChunk]()
    for line in ctx.client.work(*NODE, "verify", body=body):
        read_bytes += line.read_bytes
        total = line.total
        bad += line.bad
        progress(line)
    return NodeVerified(artefact=artefact, is_here=total > 0, read_bytes=read_bytes, bad=tuple(bad))


def clean_node(ctx: Context, *, grace_s: float, dry_run: bool) -> NodeCleaned:
    """Drops copies of what no platform of this state names, that nobody holds, pins, or used within the grace."""
    content = {item.manifest: item for item in node_content(ctx)}
    named = frozenset(root.manifest for root in ctx.client.get(StoreRoots, "store", "roots").roots)
    now = time.time_ns()
    copies = [
        Copy(
            manifest=item.manifest,
            used_unix_ns=item.used_unix_ns,
            is_held=item.is_held,
            is_pinned=item.pin is not None,
        )
        for item in content.values()
    ]
    grace_ns = int(grace_s * SECOND_NS)
    decided = choose(copies, named, now_unix_ns=now, grace_ns=grace_ns)
    doomed = tuple(Digest(manifest) for manifest in decided.evict)
    if dry_run or not doomed:
        return NodeCleaned(
            evicted=doomed,
            disk_bytes=sum(content[manifest].disk_bytes for manifest in doomed),
            ram_bytes=sum(content[manifest].ram_bytes for manifest in doomed),
            reason=decided.reason,
        )
    body = EvictRequest(manifests=doomed, unused_since_unix_ns=now - grace_ns)
    done = ctx.client.send(ContentEvicted, "POST", *NODE, "evict", body=body)
    return NodeCleaned(
        evicted=done.evicted, disk_bytes=done.disk_bytes, ram_bytes=done.ram_bytes, reason=decided.reason
    )


def print_node(stats: NodeStats, content: list[NodeContent]) -> None:
    shown = table("node", "#bytes", "#of", "")
    areas = f"{stats.areas} landing areas; {human_bytes(stats.pool_idle_bytes)} of pool idle"
    shown.add_row("RAM", human_bytes(stats.ram_bytes), human_bytes(stats.ram_bytes_max), areas)
    disk = f"{stats.artefacts} artefacts, {stats.pinned} pinned"
    shown.add_row("disk", human_bytes(stats.disk_bytes), human_bytes(stats.disk_bytes_max), disk)
    for tier, count in ((tier, count) for tier, count in stats.served_bytes.items() if count):
        shown.add_row(f"  from {tier}", human_bytes(count), "", "given to loads since the data plane started")
    console.print(shown)
    for item in content:
        if item.pin is not None:
            console.print(f"  pinned {item.pin}: {human_bytes(item.disk_bytes)}  {item.manifest}", soft_wrap=True)
    oldest = (
        f"the oldest pass ended {human_age(time.time_ns(), int(stats.scrubbed_oldest_unix_s * SECOND_NS))} ago"
        if stats.scrubbed_oldest_unix_s
        else "none ended yet"
    )
    console.print(f"  scrubbing: {oldest}; {stats.scrubbed_never} artefacts not read yet")
    console.print(f"  wrong chunks found: {stats.quarantined}, replaced: {stats.replaced}")
    for event in stats.events[-EVENTS_SHOWN:]:
        age = human_age(time.time_ns(), event.time_unix_ns)
        console.print(
            f"    {age} ago: chunk {event.chunk} of {event.file} {event.kind} ({event.seen_by})", style="dim"
        )


def print_cleaned(cleaned: NodeCleaned, *, dry_run: bool) -> None:
    verb = "would drop" if dry_run else "dropped"
    console.print(
        f"node: {verb} {len(cleaned.evicted)} artefacts, {human_bytes(cleaned.disk_bytes)} of disk, "
        f"{human_bytes(cleaned.ram_bytes)} of RAM"
    )
    console.print(f"  {cleaned.reason}", style="dim")


def print_verified(found: list[NodeVerified]) -> None:
    here = [one for one in found if one.is_here]
    bad = [(one, chunk) for one in here for chunk in one.bad]
    read_bytes = sum(one.read_bytes for one in here)
    console.print(
        f"node: {len(here)} of {len(found)} artefacts are here, {human_bytes(read_bytes)} read, "
        f"{len(bad)} chunks wrong"
    )
    for one, chunk in bad:
        outcome = f"NOT repaired: {chunk.problem}" if chunk.problem else "repaired"
        console.print(
            f"  [red]wrong[/] {one.artefact.name}: {chunk.file}, chunk {chunk.chunk} ({chunk.tier}): {outcome}",
            soft_wrap=True,
        )

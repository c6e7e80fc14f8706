"""What an origin holds, in figures: for people who decide whether to collect, and for metrics later."""

from __future__ import annotations

import msgspec

from snowdrop.content.observe import SAMPLE_MAX, Observation
from snowdrop.policy.collection import plan


class OriginStats(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes are as stored. `plain_bytes` is what the artefacts in use have as files, each counted by itself, so
    `dedupe_ratio` = plain_bytes / in_use_pack_bytes says what sharing and compression save (1 = nothing).
    """

    objects: int
    stored_bytes: int
    artefacts_in_use: int
    models: int
    plain_bytes: int
    in_use_pack_bytes: int
    in_use_bytes: int
    dedupe_ratio: float
    garbage_objects: int
    garbage_bytes: int
    condemned_objects: int
    refs: int
    platforms: tuple[str, ...]
    pushes: tuple[str, ...]
    strangers: tuple[str, ...]
    stranger_count: int
    notes: tuple[str, ...]


def origin_stats(observed: Observation, *, now_unix_ns: int) -> OriginStats:
    """Figures of one stock-taking. Garbage is what nothing names and no push may be about to name."""
    seen = observed.seen
    verdicts = plan(seen, now_unix_ns=now_unix_ns, grace_ns=0).verdicts
    sizes = {stored.key: stored.size_bytes for stored in seen.objects}
    used = {key for key, verdict in verdicts.items() if verdict == "in-use"}
    garbage = {key for key, verdict in verdicts.items() if verdict not in {"in-use", "not-understood", "leased"}}
    live = [observed.artefacts[key] for key in sorted(seen.live) if key in observed.artefacts]
    packs = {pack for artefact in live for pack in artefact.packs}
    plain = sum(artefact.plain_bytes for artefact in live)
    pack_bytes = sum(sizes.get(pack, 0) for pack in packs)
    closed = tuple(f"{domain}: {why}" for domain, why in sorted(seen.closed_domains.items()))
    return OriginStats(
        objects=len(seen.objects),
        stored_bytes=sum(sizes.values()),
        artefacts_in_use=len(live),
        models=sum(1 for artefact in live if artefact.kind == "model"),
        plain_bytes=plain,
        in_use_pack_bytes=pack_bytes,
        in_use_bytes=sum(sizes[key] for key in used),
        dedupe_ratio=plain / pack_bytes if pack_bytes else 1.0,
        garbage_objects=len(garbage),
        garbage_bytes=sum(sizes[key] for key in garbage),
        condemned_objects=len(garbage & set(seen.marks)),
        refs=len(observed.refs),
        platforms=tuple(platform.platform for platform in observed.platforms),
        pushes=tuple(f"{lease.id}: {lease.purpose}" for lease in observed.leases),
        strangers=observed.strangers[:SAMPLE_MAX],
        stranger_count=len(observed.strangers),
        notes=observed.notes + closed,
    )

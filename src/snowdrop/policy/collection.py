"""What collection does with the objects at the origin: keep, condemn, or delete.

An object that nothing names is condemned, which pushes can see, and deleted once it has been condemned, and has
not been written, for a grace period. Unknown means in use: a key domain in which something is not understood is
left alone, an active push keeps everything of which it may not know that it is condemned, and a manifest that
stays keeps its packs, so that at every moment a manifest at the origin implies its bytes.
docs/explanation/collection.md has the argument.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Literal

import msgspec

Verdict = Literal[
    "in-use", "condemn", "waits", "young", "leased", "named-by-kept", "not-understood", "delete", "delete-manifest"
]


class StoredObject(msgspec.Struct, frozen=True, kw_only=True):
    """A pack or a manifest at the origin."""

    key: str
    is_manifest: bool
    domain: str
    size_bytes: int
    modified_unix_ns: int


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """One record that condemns an object, and since when it has."""

    record: str
    since_unix_ns: int


class ActivePush(msgspec.Struct, frozen=True, kw_only=True):
    """A lease that has not run out: the records that its push has read, and what it revives of them."""

    lease: str
    started_unix_ns: int
    knows: frozenset[str]
    revived: frozenset[str]


class CollectionInput(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen at the origin.

    `live` are the keys of manifests that a root names; `packs_of` has the packs of every manifest that could be
    read; `closed_domains` are those in which something was not understood, with the reason.
    """

    objects: tuple[StoredObject, ...]
    live: frozenset[str]
    packs_of: Mapping[str, tuple[str, ...]]
    closed_domains: Mapping[str, str]
    marks: Mapping[str, tuple[Mark, ...]]
    pushes: tuple[ActivePush, ...]


class CollectionPlan(msgspec.Struct, frozen=True, kw_only=True):
    """`delete` is in the order in which it must be done: manifests, then packs. `condemned` maps every object that
    nothing names to the time since when, those to be deleted included.
    """

    delete: tuple[StoredObject, ...]
    condemned: dict[str, int]
    verdicts: dict[str, Verdict]
    bytes_by_verdict: dict[Verdict, int]
    reason: str


def plan(seen: CollectionInput, *, now_unix_ns: int, grace_ns: int) -> CollectionPlan:
    """Decides for every object. Pure; the same input gives the same plan."""
    verdicts: dict[str, Verdict] = {}
    condemned: dict[str, int] = {}
    used = {pack for manifest in seen.live for pack in seen.packs_of.get(manifest, ())}
    manifests = [stored for stored in seen.objects if stored.is_manifest]
    packs = [stored for stored in seen.objects if not stored.is_manifest]

    def judge(stored: StoredObject, is_used: bool) -> Verdict:
        return "in-use" if is_used else _judge(stored, seen, condemned, now_unix_ns=now_unix_ns, grace_ns=grace_ns)

    for stored in manifests:
        verdicts[stored.key] = judge(stored, stored.key in seen.live)
    staying = {
        pack
        for stored in manifests
        if verdicts[stored.key] not in {"delete-manifest", "in-use"}
        for pack in seen.packs_of.get(stored.key, ())
    }
    for stored in packs:
        verdict = judge(stored, stored.key in used)
        if verdict == "delete" and stored.key in staying:
            verdict = "named-by-kept"
        verdicts[stored.key] = verdict
    delete = [stored for stored in manifests if verdicts[stored.key] == "delete-manifest"]
    delete += [stored for stored in packs if verdicts[stored.key] == "delete"]
    totals: Counter[Verdict] = Counter()
    for stored in seen.objects:
        totals[verdicts[stored.key]] += stored.size_bytes
    return CollectionPlan(
        delete=tuple(delete),
        condemned=condemned,
        verdicts=verdicts,
        bytes_by_verdict=dict(totals),
        reason=_reason(seen, verdicts),
    )


def _judge(
    stored: StoredObject,
    seen: CollectionInput,
    condemned: dict[str, int],
    *,
    now_unix_ns: int,
    grace_ns: int,
) -> Verdict:
    if stored.domain in seen.closed_domains:
        return "not-understood"
    # An object that was put again after a mark was wanted then: that mark is void.
    marks = [mark for mark in seen.marks.get(stored.key, ()) if stored.modified_unix_ns <= mark.since_unix_ns]
    if not marks and any(stored.modified_unix_ns >= push.started_unix_ns for push in seen.pushes):
        return "leased"  # most likely what a push has just put and not named yet: not even condemned
    since = min((mark.since_unix_ns for mark in marks), default=now_unix_ns)
    condemned[stored.key] = since
    if not marks:
        return "condemn"
    records = {mark.record for mark in seen.marks[stored.key]}
    if any(stored.key in push.revived or not records & push.knows for push in seen.pushes):
        return "leased"
    if max(0, now_unix_ns - since) < grace_ns:
        return "waits"
    if max(0, now_unix_ns - stored.modified_unix_ns) < grace_ns:
        return "young"
    return "delete-manifest" if stored.is_manifest else "delete"


def _reason(seen: CollectionInput, verdicts: dict[str, Verdict]) -> str:
    counts = Counter(verdicts.values())
    doomed = counts["delete"] + counts["delete-manifest"]
    parts = [f"{doomed} of {len(verdicts)} objects can go"]
    told: list[tuple[Verdict, str]] = [
        ("condemn", "are condemned now"),
        ("waits", "wait for the grace period"),
        ("young", "were written within the grace period"),
        ("leased", "may be used by a push"),
        ("named-by-kept", "belong to a manifest that stays"),
        ("not-understood", "lie where something is not understood"),
    ]
    parts += [f"{counts[verdict]} {text}" for verdict, text in told if counts[verdict]]
    parts += [f"{domain} is left alone: {why}" for domain, why in sorted(seen.closed_domains.items())]
    return "; ".join(parts)

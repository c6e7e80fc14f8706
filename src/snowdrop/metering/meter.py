"""From what ran to usage facts: pure arithmetic on replica reports."""

from __future__ import annotations

import msgspec

from snowdrop.domain.receipt import ContentBytes
from snowdrop.domain.replica import ReplicaKey, ReplicaReport
from snowdrop.domain.usage import UsageUnit


class UsageDraft(msgspec.Struct, frozen=True, kw_only=True):
    """A fact without a number yet; the journal gives it one."""

    key: ReplicaKey
    unit: UsageUnit
    quantity: int
    detail: str
    from_unix_ns: int
    to_unix_ns: int


def replica_time(report: ReplicaReport, *, metered_until_unix_ns: int, now_unix_ns: int) -> UsageDraft | None:
    """The stretch of a replica's life that is not metered yet; None if there is nothing to add.

    A replica is metered from the order until it has ended: that is how long it holds its node.
    """
    start = max(metered_until_unix_ns, report.started_unix_ns)
    end = report.ended_unix_ns or now_unix_ns
    if end <= start:
        return None
    return UsageDraft(
        key=report.key, unit="replica_ns", quantity=end - start, detail="", from_unix_ns=start, to_unix_ns=end
    )


def content_bytes(
    key: ReplicaKey, content: ContentBytes, *, from_unix_ns: int, to_unix_ns: int
) -> list[UsageDraft]:
    """One fact per tier that gave bytes."""
    tiers = {"ram": content.ram, "disk": content.disk, "peer": content.peer, "origin": content.origin}
    return [
        UsageDraft(
            key=key,
            unit="content_bytes",
            quantity=count,
            detail=tier,
            from_unix_ns=from_unix_ns,
            to_unix_ns=to_unix_ns,
        )
        for tier, count in tiers.items()
        if count > 0
    ]

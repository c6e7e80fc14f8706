"""A decision as it is kept, with all that it was made from: `judge(record.signals)` gives it again."""

from __future__ import annotations

import msgspec

from snowdrop.domain.ids import DeploymentName, RevisionId, TenantId
from snowdrop.policy.autoscale.decide import AutoscaleDecision, Signals

RECORD_S_MIN = 1.0
"""Changes that leave the number of replicas as it was are kept at most so often."""
RECORD_S_MAX = 60.0
"""While nothing changes, a decision is kept so often."""


class ScalingRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`note` is what kept the decision from being carried out, if anything: no room, a failing revision."""

    tenant: TenantId
    deployment: DeploymentName
    revision: RevisionId
    unix_ns: int
    signals: Signals
    decision: AutoscaleDecision
    note: str = ""


def is_worth_keeping(last: ScalingRecord | None, new: ScalingRecord) -> bool:
    """Whether a decision says something that the last one kept does not."""
    if last is None:
        return True
    age_s = (new.unix_ns - last.unix_ns) / 1e9
    if new.decision.desired != last.decision.desired or bool(new.note) != bool(last.note) or age_s < 0:
        return True
    if _shape(new) != _shape(last):
        return age_s >= RECORD_S_MIN
    # A deployment that sleeps says nothing new, however long.
    asleep = new.decision.desired == 0 and new.signals.capacity == 0 and new.signals.load == 0
    return age_s >= RECORD_S_MAX and not asleep


def _shape(record: ScalingRecord) -> tuple[object, ...]:
    signals = record.signals
    return (record.decision.rule, signals.bounds, signals.ready, len(signals.starting_left_s), record.revision)

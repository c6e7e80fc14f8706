"""Why a deployment has the replicas that it has, and why a request waited: what control answers."""

from __future__ import annotations

import msgspec

from snowdrop.domain.ids import DeploymentName, ReplicaId, RevisionId
from snowdrop.domain.receipt import Receipt
from snowdrop.domain.replica import ReplicaState
from snowdrop.domain.scale import Scale
from snowdrop.policy.autoscale.explain import Alternative
from snowdrop.policy.autoscale.record import ScalingRecord
from snowdrop.policy.idle import IdleChoice
from snowdrop.wire.waits import WaitRecord


class ReplicaWhy(msgspec.Struct, frozen=True, kw_only=True):
    """A replica that is there, and why it is in its state; `draining` is why it goes, if it does."""

    id: ReplicaId
    revision: RevisionId
    state: ReplicaState
    reason: str
    in_flight: int
    draining: str = ""


class Why(msgspec.Struct, frozen=True, kw_only=True):
    """The decision of now with its signals, what would have changed it, and decisions of before, newest first.

    `short` is why there are fewer replicas than decided, if so. `idle` is there if the idle time is chosen.
    """

    deployment: DeploymentName
    scale: Scale
    now: ScalingRecord | None
    alternatives: tuple[Alternative, ...]
    short: str
    replicas: tuple[ReplicaWhy, ...]
    start_high_s: float
    starts_seen: int
    idle: IdleChoice | None
    history: tuple[ScalingRecord, ...]
    waits: tuple[WaitRecord, ...]


class WhyRequest(msgspec.Struct, frozen=True, kw_only=True):
    """How a request waits or waited: its waits (the last first), the starts it waited for, decisions meanwhile."""

    waits: tuple[WaitRecord, ...]
    receipts: tuple[Receipt, ...]
    decisions: tuple[ScalingRecord, ...]

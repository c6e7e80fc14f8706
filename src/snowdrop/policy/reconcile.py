"""From what a deployment has and what it should have to which replicas start and which drain."""

from __future__ import annotations

import msgspec

from snowdrop.domain.ids import ReplicaId, RevisionId
from snowdrop.domain.replica import STARTING_STATES, ReplicaState


class ReplicaView(msgspec.Struct, frozen=True, kw_only=True):
    """A living replica. `in_flight` is what gateways have at it; `age` orders replicas, higher is younger."""

    id: ReplicaId
    revision: RevisionId
    state: ReplicaState
    in_flight: int
    age: int
    draining_ordered: bool = False


class DrainOrder(msgspec.Struct, frozen=True):
    replica: ReplicaId
    reason: str


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How many replicas of the current revision to start, and which replicas to drain, with the reason."""

    starts: int = 0
    drains: tuple[DrainOrder, ...] = ()


def plan(
    replicas: tuple[ReplicaView, ...], *, current: RevisionId, desired: int, may_start: bool, reason: str
) -> Plan:
    """One step towards `desired` replicas of `current`.

    - Scaling down takes replicas that are still starting before ready ones, idle before busy, young before old.
    - Replicas of older revisions serve until the current one has a ready replica, or until nothing is desired.
    """
    living = [view for view in replicas if not view.draining_ordered]
    ours = [view for view in living if view.revision == current]
    older = [view for view in living if view.revision != current]
    drains: list[DrainOrder] = []
    ours_ready = any(view.state is ReplicaState.READY for view in ours)
    for view in older:
        if ours_ready or desired == 0:
            drains.append(DrainOrder(view.id, "a newer revision is ready" if ours_ready else reason))
        elif view.state in STARTING_STATES:
            drains.append(DrainOrder(view.id, "a newer revision was deployed"))
    surplus = len(ours) - desired
    if surplus > 0:
        order = sorted(ours, key=lambda view: (view.state not in STARTING_STATES, view.in_flight, -view.age))
        drains.extend(DrainOrder(view.id, reason) for view in order[:surplus])
    starts = max(0, -surplus) if may_start else 0
    return Plan(starts=starts, drains=tuple(drains))

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
    """How many replicas to start of the current revision and of its rival, and which to drain, with the reason."""

    starts: int = 0
    rival_starts: int = 0
    drains: tuple[DrainOrder, ...] = ()


class Rival(msgspec.Struct, frozen=True, kw_only=True):
    """The other revision of a rollout, and how many replicas it should have."""

    revision: RevisionId
    desired: int
    may_start: bool = True


def plan(
    replicas: tuple[ReplicaView, ...],
    *,
    current: RevisionId,
    desired: int,
    may_start: bool,
    reason: str,
    rival: Rival | None = None,
    older_reason: str = "a newer revision is ready",
) -> Plan:
    """One step towards `desired` replicas of `current`.

    - Scaling down takes replicas that are still starting before ready ones, idle before busy, young before old.
    - Replicas of other revisions serve until the current one has a ready replica, or until nothing is desired;
      those of a `rival` are counted like the current one's, but never all taken away while only they are ready.
    """
    living = [view for view in replicas if not view.draining_ordered]
    ours = [view for view in living if view.revision == current]
    rivals = [view for view in living if rival is not None and view.revision == rival.revision]
    older = [view for view in living if view not in ours and view not in rivals]
    drains: list[DrainOrder] = []
    ours_ready = any(view.state is ReplicaState.READY for view in ours)
    for view in older:
        if ours_ready or desired == 0:
            drains.append(DrainOrder(view.id, older_reason if ours_ready else reason))
        elif view.state in STARTING_STATES:
            drains.append(DrainOrder(view.id, "a newer revision was deployed"))
    drains += _surplus(ours, desired, keep_one=False, reason=reason)
    starts = max(0, desired - len(ours)) if may_start else 0
    if rival is None:
        return Plan(starts=starts, drains=tuple(drains))
    drains += _surplus(rivals, rival.desired, keep_one=desired > 0 and not ours_ready, reason=reason)
    rival_starts = max(0, rival.desired - len(rivals)) if rival.may_start else 0
    return Plan(starts=starts, rival_starts=rival_starts, drains=tuple(drains))


def _surplus(views: list[ReplicaView], desired: int, *, keep_one: bool, reason: str) -> list[DrainOrder]:
    """What is too much of one revision; with `keep_one` a ready one stays, as nobody else serves yet."""
    order = sorted(views, key=lambda view: (view.state not in STARTING_STATES, view.in_flight, -view.age))
    surplus = order[: max(0, len(views) - desired)]
    if keep_one and surplus and len(surplus) == len(order) and order[-1].state is ReplicaState.READY:
        surplus = surplus[:-1]
    return [DrainOrder(view.id, reason) for view in surplus]

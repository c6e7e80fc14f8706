"""What those who wait, wait for: as the phase of a start, and in words."""

from __future__ import annotations

from collections.abc import Collection

from snowdrop.domain.replica import ReplicaState
from snowdrop.gateway.slots import ReplicaSlots
from snowdrop.wire.control import DeploymentRoute

# The phase of a receipt that a replica in this state is in; the furthest state last.
PHASE_OF = {
    ReplicaState.PENDING: "activate",
    ReplicaState.MOUNTING: "mount",
    ReplicaState.STARTING: "start",
    ReplicaState.LOADING: "startup",
}
_FURTHEST = tuple(reversed(PHASE_OF))


def phase_of(route: DeploymentRoute, *, ready: bool) -> str:
    """A slot (`queue`), the replica furthest on its way, or the next try of what does not start (`parked`)."""
    if ready:
        return "queue"
    if route.parked is not None and not route.coming:
        return "parked"
    states = {one.state for one in route.coming}
    return next((PHASE_OF[state] for state in _FURTHEST if state in states), "activate")


def reason_of(route: DeploymentRoute, replicas: Collection[ReplicaSlots]) -> str:
    """Why a request finds no slot now."""
    accepting = [replica for replica in replicas if replica.accepting]
    ready, starting = len(accepting), route.starting
    left_out = sum(1 for replica in replicas if replica.route.accepting and replica.penalty_until_s)
    if ready:
        slots = sum(replica.concurrency for replica in accepting)
        text = f"all {slots} slots of {ready} ready replicas were taken"
    elif starting:
        text = f"no replica was ready, {starting} starting (phase {phase_of(route, ready=False)})"
    elif route.parked is not None:
        text = f"nothing is started for now: {route.parked.error.message}"
    else:
        text = "no replica was ready or starting"
    if left_out:
        text += f", {left_out} left out because it could not be reached"
    if ready and starting:
        text += f", {starting} more starting"
    return text

"""Which call was made for which request: chains of leases, and whether a call could only wait for itself.

Who made a call is known by the connection it came on, and for which of its requests by the lease that the replica
says back; a lease of another replica counts for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from snowdrop.domain.errors import CallDeadlockError, SnowdropError
from snowdrop.gateway.effects import DeploymentKey, TicketKey
from snowdrop.gateway.table import Deployment, Lease
from snowdrop.policy.deadlock import InnerWait, Target, blocked
from snowdrop.wire.slots import Acquire

CALL_DEPTH_MAX = 32
"""Most calls inside of each other."""
SPARE_MAX = 64
"""Waits that are over and may be kept beside as many as there are."""


class Lineage:
    """Reads the leases of the queues, and remembers which calls of services wait."""

    def __init__(self, leases: Mapping[int, Lease], is_waiting: Callable[[TicketKey], bool]) -> None:
        self._leases = leases
        self._is_waiting = is_waiting
        self._waits: dict[TicketKey, InnerWait[DeploymentKey]] = {}
        self._live = 0

    def parent_of(self, request: Acquire) -> int:
        """The lease that a call was made under; 0 for none, or one that is over or not its caller's."""
        lease = self._leases.get(request.parent_lease)
        if lease is None or lease.replica.route.replica != request.from_replica:
            return 0
        return request.parent_lease

    def depth_of(self, parent: int) -> int:
        lease = self._leases.get(parent)
        return 0 if lease is None else lease.depth + 1

    def refusal(
        self, request: Acquire, key: DeploymentKey, deployments: Mapping[DeploymentKey, Deployment]
    ) -> SnowdropError | None:
        """Why a call that finds no free slot may not wait for one; None if it may, or is no call of a service."""
        parent = self.parent_of(request)
        if not parent:
            return None
        waits = [*self._still_waiting(), InnerWait(parent, key)]
        targets = {
            name: _target(deployments[name]) for name in {wait.target for wait in waits} if name in deployments
        }
        parents = {lease: held.parent for lease, held in self._leases.items() if held.parent}
        if key not in blocked(targets, waits, parents):
            return None
        slots = targets[key].slots_max
        name = deployments[key].route.deployment
        return CallDeadlockError(
            f"the call would wait for itself: {self._chain(parent, name)}. Every slot of {name!r} "
            f"({slots} at most) is held by a request that waits for a call like this one",
            where=f"deployment {name!r}",
            next_step=f"raise scale.max or concurrency of {name!r}, or have its requests not call back to it",
        )

    def too_deep(self, request: Acquire) -> SnowdropError | None:
        parent = self.parent_of(request)
        if self.depth_of(parent) <= CALL_DEPTH_MAX:
            return None
        return CallDeadlockError(
            f"too many calls inside of each other: {self._chain(parent, request.deployment)}",
            where=f"call_depth_max={CALL_DEPTH_MAX}",
            next_step="do the services call each other in a circle?",
        )

    def waits(self, ticket: TicketKey, request: Acquire, key: DeploymentKey) -> None:
        """A request has begun to wait."""
        parent = self.parent_of(request)
        if parent:
            self._waits[ticket] = InnerWait(parent, key)
            if len(self._waits) > 2 * self._live + SPARE_MAX:
                self._still_waiting()

    def _still_waiting(self) -> list[InnerWait[DeploymentKey]]:
        """Nothing is said when a wait ends: those that have are dropped when somebody asks."""
        self._waits = {ticket: wait for ticket, wait in self._waits.items() if self._is_waiting(ticket)}
        self._live = len(self._waits)
        return list(self._waits.values())

    def _chain(self, parent: int, last: str) -> str:
        names: list[str] = [last]
        while (lease := self._leases.get(parent)) is not None:
            names.append(lease.key[1])
            parent = lease.parent
        shown = names[::-1]
        return " -> ".join(shown if len(shown) <= 8 else [*shown[:4], "...", *shown[-3:]])


def _target(deployment: Deployment) -> Target:
    """Replicas that take nobody any more hold nobody up: only those that would give their slots on count."""
    open_ones = [replica for replica in deployment.replicas.values() if replica.accepting]
    slots_max = max(deployment.route.replicas_max * deployment.route.concurrency, deployment.slots)
    return Target(slots_max=slots_max, holders=tuple(lease for replica in open_ones for lease in replica.leases))

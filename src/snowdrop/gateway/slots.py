"""A replica's slots as this gateway holds them, and how a deployment stands in numbers."""

from __future__ import annotations

import msgspec

from snowdrop.wire.control import ReplicaRoute


class ReplicaSlots:
    """A replica's slots. `accepting` is control's word, less what this gateway found out itself."""

    __slots__ = ("idle_said", "leases", "penalty_until_s", "route")

    def __init__(self, route: ReplicaRoute) -> None:
        self.route = route
        self.leases: set[int] = set()
        self.idle_said = False
        self.penalty_until_s = 0.0

    @property
    def in_flight(self) -> int:
        return len(self.leases)

    @property
    def concurrency(self) -> int:
        return self.route.concurrency

    @property
    def accepting(self) -> bool:
        return self.route.accepting and not self.penalty_until_s


class Gauges(msgspec.Struct, frozen=True, kw_only=True):
    """How a deployment stands at this instant."""

    tenant: str
    deployment: str
    in_flight: int
    queued: int
    ready: int
    starting: int

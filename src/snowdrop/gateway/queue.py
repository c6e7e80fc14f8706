"""The queues and slots of all deployments: one synchronous object, events in, effects out, no I/O, no await.

There is one of it per gateway, in the owner. Invariants, which the property test holds after every event:

- a replica's in-flight count is the number of leases on it, and never above its concurrency;
- a request waits only while no accepting replica has a free slot;
- each ticket is granted or denied exactly once, unless its worker cancelled it or went away.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable

import msgspec

from snowdrop.domain.errors import ErrorBody, SnowdropError, UnavailableError
from snowdrop.domain.ids import DeploymentName, ReplicaId, TenantId
from snowdrop.gateway.effects import (
    DemandChanged,
    Deny,
    DeploymentKey,
    Effect,
    Grant,
    Idle,
    Now,
    deny,
    queue_full,
    unknown,
    waited_too_long,
)
from snowdrop.policy import admission, routing
from snowdrop.tenancy.keys import authenticate
from snowdrop.wire.control import DeploymentLoad, DeploymentRoute, KeyGrant, ReplicaRoute
from snowdrop.wire.slots import Acquire, Denied, Granted

DRAIN_RATE_HALF_LIFE_S = 5.0
PENALTY_S = 1.0
"""A replica that could not be reached is left out for so long, unless control says something of it first."""

TicketKey = tuple[str, int]


class _Replica:
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


class _Waiting(msgspec.Struct):
    worker: str
    request: Acquire
    deadline_s: float


class _Deployment:
    """One deployment's queue, replicas and counters."""

    def __init__(self, route: DeploymentRoute) -> None:
        self.route = route
        self.replicas: dict[ReplicaId, _Replica] = {}
        self.waiting: OrderedDict[TicketKey, _Waiting] = OrderedDict()
        self.arrived = 0
        self.refused = 0
        self.peak = 0
        self.reported = 0
        self.drained_per_s = 0.0
        self.drained_at_s = 0.0

    @property
    def in_flight(self) -> int:
        return sum(replica.in_flight for replica in self.replicas.values())

    @property
    def accepting(self) -> int:
        return sum(1 for replica in self.replicas.values() if replica.accepting)

    def note_peak(self) -> None:
        self.peak = max(self.peak, self.in_flight + len(self.waiting))

    def drain_rate(self, now_s: float) -> float:
        """Requests a second that got a slot lately; it fades while none does."""
        half_lives = max(0.0, now_s - self.drained_at_s) / DRAIN_RATE_HALF_LIFE_S
        return self.drained_per_s * math.exp2(-half_lives)

    def note_drained(self, now_s: float) -> None:
        """Exponentially forgetting rate of requests that left the queue for a slot."""
        elapsed_s = max(now_s - self.drained_at_s, 1e-3)
        keep = 0.5 ** (elapsed_s / DRAIN_RATE_HALF_LIFE_S)
        self.drained_per_s = self.drained_per_s * keep + (1 - keep) / elapsed_s
        self.drained_at_s = now_s


class QueueCore:
    """See the module."""

    def __init__(self, *, keys_required: bool) -> None:
        self._keys_required = keys_required
        self._keys: dict[str, TenantId] = {}
        self._deployments: dict[DeploymentKey, _Deployment] = {}
        self._leases: dict[int, tuple[str, DeploymentKey, _Replica]] = {}
        self._tickets: dict[TicketKey, _Deployment | int] = {}
        self._ticket_of_lease: dict[int, TicketKey] = {}
        self._next_lease = 1
        self.connected = False

    # --- requests -----------------------------------------------------------------------------------------

    def arrive(self, worker: str, request: Acquire, now: Now) -> list[Effect]:
        """A request wants a slot: grants it, queues it or denies it."""
        try:
            tenant = request.tenant
            if tenant is None:
                tenant = authenticate(request.key_sha256, self._keys, required=self._keys_required)
            deployment = self._find(tenant, request.deployment)
        except SnowdropError as error:
            return [deny(worker, request.ticket, error)]
        deployment.arrived += 1
        key = (tenant, request.deployment)
        if deployment.route.refusal is not None:
            deployment.refused += 1
            return [Deny(worker, Denied(ticket=request.ticket, error=deployment.route.refusal))]
        if not deployment.waiting:
            replica = routing.choose(deployment.replicas.values())
            if replica is not None:
                effect = self._grant(worker, request, deployment, replica, now)
                deployment.note_peak()
                return [effect]
        verdict = admission.admit(
            deployment.route.queue,
            waiting=len(deployment.waiting),
            drained_per_s=deployment.drain_rate(now.s),
            start_s=0.0 if deployment.accepting else deployment.route.start_s,
            now_s=now.s,
        )
        if isinstance(verdict, admission.Refuse):
            deployment.refused += 1
            return [
                deny(
                    worker,
                    request.ticket,
                    queue_full(
                        deployment.route, waiting=len(deployment.waiting), retry_after_s=verdict.retry_after_s
                    ),
                )
            ]
        ticket = (worker, request.ticket)
        deployment.waiting[ticket] = _Waiting(worker, request, verdict.deadline_s)
        self._tickets[ticket] = deployment
        deployment.note_peak()
        return [DemandChanged(key)]

    def cancel(self, worker: str, ticket: int, now: Now) -> list[Effect]:
        """The client is gone. A slot that was granted meanwhile is given back."""
        found = self._tickets.pop((worker, ticket), None)
        if found is None:
            return []
        if isinstance(found, int):
            return self.release(found, now)
        found.waiting.pop((worker, ticket), None)
        return []

    def release(self, lease: int, now: Now) -> list[Effect]:
        """A request is over; its slot goes to the next in the queue."""
        held = self._leases.pop(lease, None)
        if held is None:
            return []
        _worker, key, replica = held
        replica.leases.discard(lease)
        self._forget_ticket(lease)
        effects = self._idle(replica)
        deployment = self._deployments.get(key)
        if deployment is None or replica.route.replica not in deployment.replicas:
            return effects
        return effects + self._serve(deployment, now)

    def unreachable(self, lease: int, now: Now) -> tuple[ReplicaId | None, list[Effect]]:
        """No connection to the lease's replica: it is left out for a while, and the lease ends."""
        held = self._leases.get(lease)
        if held is None:
            return None, []
        held[2].penalty_until_s = now.s + PENALTY_S
        return held[2].route.replica, self.release(lease, now)

    def worker_gone(self, worker: str, now: Now) -> list[Effect]:
        """A worker's connection ended: its waiting requests vanish, its leases are reclaimed."""
        for ticket in [t for t in self._tickets if t[0] == worker]:
            found = self._tickets.pop(ticket)
            if not isinstance(found, int):
                found.waiting.pop(ticket, None)
        effects: list[Effect] = []
        for lease in [number for number, held in self._leases.items() if held[0] == worker]:
            effects += self.release(lease, now)
        return effects

    def tick(self, now: Now) -> list[Effect]:
        """Ends waits that have lasted too long and penalties that have run out."""
        effects: list[Effect] = []
        for deployment in self._deployments.values():
            late = [w for w in deployment.waiting.values() if w.deadline_s <= now.s]
            for waiting in late:
                ticket = (waiting.worker, waiting.request.ticket)
                del deployment.waiting[ticket]
                self._tickets.pop(ticket, None)
                deployment.refused += 1
                effects.append(
                    deny(
                        waiting.worker,
                        waiting.request.ticket,
                        waited_too_long(deployment.route, ready=deployment.accepting),
                    )
                )
            for replica in deployment.replicas.values():
                if replica.penalty_until_s and replica.penalty_until_s <= now.s:
                    replica.penalty_until_s = 0.0
            effects += self._serve(deployment, now)
        return effects

    # --- the table ----------------------------------------------------------------------------------------

    def set_routes(self, routes: Iterable[DeploymentRoute], keys: Iterable[KeyGrant], now: Now) -> list[Effect]:
        """Replaces the whole table. Leases on replicas that are no longer in it run to their end."""
        self.connected = True
        for deployment in self._deployments.values():
            for replica in deployment.replicas.values():
                replica.idle_said = False  # a control that was restarted has not heard it
        self._keys = {grant.key_sha256: grant.tenant for grant in keys}
        effects: list[Effect] = []
        named: set[DeploymentKey] = set()
        for route in routes:
            key = (route.tenant, route.deployment)
            named.add(key)
            effects += self.change_route(key, route, now)
        for key in [k for k in self._deployments if k not in named]:
            effects += self.change_route(key, None, now)
        return effects

    def change_route(self, key: DeploymentKey, route: DeploymentRoute | None, now: Now) -> list[Effect]:
        """Replaces one deployment's entry, or removes it; whoever waits for a removed one is told."""
        deployment = self._deployments.get(key)
        if route is None:
            if deployment is None:
                return []
            del self._deployments[key]
            deployment.replicas.clear()
            return self._deny_all(deployment, unknown(key[1]).body())
        if deployment is None:
            deployment = self._deployments[key] = _Deployment(route)
        deployment.route = route
        for replica_route in route.replicas:
            known = deployment.replicas.get(replica_route.replica) or self._still_leased(replica_route.replica)
            if known is None:
                known = _Replica(replica_route)
            elif known.route != replica_route:
                known.route, known.penalty_until_s = replica_route, 0.0
            deployment.replicas[replica_route.replica] = known
        kept = {replica_route.replica for replica_route in route.replicas}
        for gone in [name for name in deployment.replicas if name not in kept]:
            del deployment.replicas[gone]
        effects: list[Effect] = []
        for replica in deployment.replicas.values():
            effects += self._idle(replica)
        if route.refusal is not None:
            return effects + self._deny_all(deployment, route.refusal)
        return effects + self._serve(deployment, now)

    def loads(self) -> tuple[DeploymentLoad, ...]:
        """The load of every deployment; resets the peaks."""
        report: list[DeploymentLoad] = []
        for (tenant, name), deployment in self._deployments.items():
            in_flight = deployment.in_flight
            queued = len(deployment.waiting)
            report.append(
                DeploymentLoad(
                    tenant=tenant,
                    deployment=name,
                    in_flight=in_flight,
                    queued=queued,
                    peak=max(deployment.peak, in_flight + queued),
                    arrived=deployment.arrived,
                    refused=deployment.refused,
                    busy={name: r.in_flight for name, r in deployment.replicas.items() if r.in_flight},
                )
            )
            deployment.peak = deployment.reported = in_flight + queued
        return tuple(report)

    @property
    def worth_reporting(self) -> bool:
        """Whether control does not know the load as it is: also a request that came and went in between counts."""
        return any(d.peak or d.reported for d in self._deployments.values())

    @property
    def busy(self) -> bool:
        """Whether any request waits or is in flight."""
        return bool(self._leases) or any(deployment.waiting for deployment in self._deployments.values())

    # --- inside -------------------------------------------------------------------------------------------

    def _find(self, tenant: TenantId, name: DeploymentName) -> _Deployment:
        deployment = self._deployments.get((tenant, name))
        if deployment is not None:
            return deployment
        if not self.connected:
            raise UnavailableError(
                "the gateway has not heard from control yet", where="gateway", retry_after_s=1.0
            )
        raise unknown(name)

    def _grant(
        self, worker: str, request: Acquire, deployment: _Deployment, replica: _Replica, now: Now
    ) -> Effect:
        lease = self._next_lease
        self._next_lease += 1
        self._leases[lease] = (worker, (deployment.route.tenant, deployment.route.deployment), replica)
        replica.leases.add(lease)
        ticket = (worker, request.ticket)
        self._tickets[ticket] = lease
        self._ticket_of_lease[lease] = ticket
        route = replica.route
        waited_for_it = request.arrived_unix_ns < route.ready_unix_ns
        message = Granted(
            ticket=request.ticket,
            lease=lease,
            replica=route.replica,
            socket_path=route.socket_path,
            request_s_max=deployment.route.queue.request_s_max,
            granted_unix_ns=now.unix_ns,
            tenant=deployment.route.tenant,
            revision=route.revision,
            receipt=route.receipt if waited_for_it else None,
            spans=route.spans if waited_for_it else (),
            ordered_unix_ns=route.ordered_unix_ns,
            ready_unix_ns=route.ready_unix_ns,
        )
        return Grant(worker, message)

    def _serve(self, deployment: _Deployment, now: Now) -> list[Effect]:
        """Hands free slots to the queue, first come first served."""
        effects: list[Effect] = []
        while deployment.waiting:
            replica = routing.choose(deployment.replicas.values())
            if replica is None:
                break
            _ticket, waiting = deployment.waiting.popitem(last=False)
            deployment.note_drained(now.s)
            effects.append(self._grant(waiting.worker, waiting.request, deployment, replica, now))
        return effects

    def _still_leased(self, replica: ReplicaId) -> _Replica | None:
        """A replica that left the table with requests in flight: if it comes back, they still count."""
        return next((held[2] for held in self._leases.values() if held[2].route.replica == replica), None)

    def _idle(self, replica: _Replica) -> list[Effect]:
        if replica.route.accepting:
            replica.idle_said = False
            return []
        if replica.leases or replica.idle_said:
            return []
        replica.idle_said = True
        return [Idle(replica.route.replica)]

    def _deny_all(self, deployment: _Deployment, error: ErrorBody) -> list[Effect]:
        effects: list[Effect] = []
        for ticket, waiting in deployment.waiting.items():
            self._tickets.pop(ticket, None)
            deployment.refused += 1
            message = Denied(ticket=waiting.request.ticket, error=error)
            effects.append(Deny(waiting.worker, message))
        deployment.waiting.clear()
        return effects

    def _forget_ticket(self, lease: int) -> None:
        ticket = self._ticket_of_lease.pop(lease, None)
        if ticket is not None:
            self._tickets.pop(ticket, None)

"""The queues and slots of all deployments: one synchronous object, events in, effects out, no I/O, no await.

There is one of it per gateway, in the owner. Invariants, which the property test holds after every event:

- a replica's in-flight count is the number of leases on it, and never above its concurrency;
- a request waits only while no accepting replica has a free slot;
- each ticket is granted or denied exactly once, unless its worker cancelled it or went away.
"""

from __future__ import annotations

from collections.abc import Iterable

from snowdrop.domain.errors import ErrorBody, SnowdropError, UnavailableError
from snowdrop.domain.ids import DeploymentName, ReplicaId, TenantId
from snowdrop.gateway.deadlines import Deadlines
from snowdrop.gateway.effects import (
    DemandChanged,
    Deny,
    DeploymentKey,
    Effect,
    Grant,
    Idle,
    Now,
    Tell,
    TicketKey,
    deny,
    no_longer_served,
    queue_full,
    unknown,
)
from snowdrop.gateway.lineage import Lineage
from snowdrop.gateway.looking import looked
from snowdrop.gateway.slots import Gauges, ReplicaSlots
from snowdrop.gateway.table import Deployment, Lease, Waiting
from snowdrop.gateway.traffic import is_free
from snowdrop.gateway.waitlog import WaitLog, waiting_now
from snowdrop.policy import admission
from snowdrop.tenancy.keys import authenticate
from snowdrop.wire.control import DeploymentLoad, DeploymentRoute, KeyGrant
from snowdrop.wire.slots import Acquire, Denied, Granted, Look, Outcome
from snowdrop.wire.waits import WaitRecord

PENALTY_S = 1.0
"""A replica that could not be reached is left out for so long, unless control says something of it first."""
RANKED_MAX = 10_000
"""In a longer line than this, those who wait are not told their exact place."""


class QueueCore:
    """See the module."""

    def __init__(self, *, keys_required: bool) -> None:
        self._keys_required = keys_required
        self._keys: dict[str, TenantId] = {}
        self._key_priority: dict[str, int] = {}
        self._deployments: dict[DeploymentKey, Deployment] = {}
        self._leases: dict[int, Lease] = {}
        self._tickets: dict[TicketKey, Deployment | int] = {}
        self._deadlines = Deadlines()
        self._next_lease = 1
        self._lineage = Lineage(self._leases, lambda ticket: isinstance(self._tickets.get(ticket), Deployment))
        self.waits = WaitLog()
        self.connected = False

    # --- requests -----------------------------------------------------------------------------------------

    def arrive(self, worker: str, request: Acquire, now: Now) -> list[Effect]:
        """A request wants a slot: grants it, queues it or denies it."""
        try:
            tenant = request.tenant or self.tenant_of(request.key_sha256)
            deployment = self._find(tenant, request.deployment)
            pin = deployment.traffic.named(deployment.route, request.revision) or ""
        except SnowdropError as error:
            return [deny(worker, request.ticket, error)]
        if not request.attempt:
            deployment.arrived += 1
        if deployment.route.refusal is not None:
            return [self._refuse(worker, request, deployment, deployment.route.refusal, now)]
        if request.parent_lease and (deep := self._lineage.too_deep(request)) is not None:
            return [self._refuse(worker, request, deployment, deep.body(), now)]
        if deployment.may_pass(pin):
            replica = deployment.choose(pin)
            if replica is not None:
                effect = self._grant(worker, request, deployment, replica, now)
                deployment.note_peak()
                return [effect]
        stuck = self._lineage.refusal(request, (tenant, request.deployment), self._deployments)
        if stuck is not None:
            return [self._refuse(worker, request, deployment, stuck.body(), now)]
        waited_s = max(0.0, (now.unix_ns - request.arrived_unix_ns) / 1e9) if request.attempt else 0.0
        verdict = admission.admit(
            deployment.route.queue,
            lambda: deployment.outlook(now),
            waiting=len(deployment.line),
            promised=deployment.promised(now.s),
            wait_s_max=request.wait_s_max,
            waited_s=waited_s,
            now_s=now.s,
        )
        if isinstance(verdict, admission.Refuse):
            told_s = deployment.promise(verdict.retry_after_s, now)
            full = queue_full(deployment.route, waiting=len(deployment.line), retry_after_s=told_s)
            return [self._refuse(worker, request, deployment, full.body(), now)]
        return self._wait(worker, request, deployment, verdict.deadline_s, now, pin=pin)

    def look(self, worker: str, request: Look, now: Now) -> list[Effect]:
        """Says how a deployment stands; wakes it if asked, as a request would that waits for no answer."""
        try:
            tenant = self.tenant_of(request.key_sha256)
            deployment = self._find(tenant, request.deployment)
        except SnowdropError as error:
            return [deny(worker, request.ticket, error)]
        effects: list[Effect] = []
        if request.activate and deployment.route.refusal is None:
            deployment.wake(now.s)
            effects.append(DemandChanged((tenant, request.deployment)))
        return [*effects, Tell(worker, looked(request.ticket, deployment, now))]

    def tenant_of(self, key_sha256: str | None) -> TenantId:
        """Whose key it is. Raises UnauthorisedError."""
        return authenticate(key_sha256, self._keys, required=self._keys_required)

    def cancel(self, worker: str, ticket: int, now: Now) -> list[Effect]:
        """The client is gone. A slot that was granted meanwhile is given back."""
        found = self._tickets.pop((worker, ticket), None)
        if found is None:
            return []
        if isinstance(found, int):
            return self._end(found, now, done=False)
        waited = found.leave((worker, ticket))
        if waited is not None:
            self.waits.gone(found, waited, now)
        return []

    def release(self, lease: int, now: Now, outcome: Outcome | None = None) -> list[Effect]:
        """A request is over; its slot goes to whoever has the turn."""
        return self._end(lease, now, done=True, outcome=outcome)

    def unreachable(
        self, lease: int, now: Now, outcome: Outcome | None = None
    ) -> tuple[ReplicaId | None, list[Effect]]:
        """No connection to the lease's replica: it is left out for a while, and the lease ends."""
        held = self._leases.get(lease)
        if held is None:
            return None, []
        held.replica.penalty_until_s = now.s + PENALTY_S
        held.deployment.changed()
        return held.replica.route.replica, self._end(lease, now, done=False, outcome=outcome)

    def worker_gone(self, worker: str, now: Now) -> list[Effect]:
        """A worker's connection ended: its waiting requests vanish, its leases are reclaimed."""
        for ticket in [t for t in self._tickets if t[0] == worker]:
            found = self._tickets.pop(ticket)
            if not isinstance(found, int):
                found.leave(ticket)
        effects: list[Effect] = []
        for lease in [number for number, held in self._leases.items() if held.worker == worker]:
            effects += self._end(lease, now, done=False)
        return effects

    def tick(self, now: Now) -> list[Effect]:
        """Ends waits that have lasted too long and penalties that have run out; tells those who want to know."""
        effects: list[Effect] = self._end_late(now)
        for deployment in self._deployments.values():
            for replica in deployment.replicas.values():
                if replica.penalty_until_s and replica.penalty_until_s <= now.s:
                    replica.penalty_until_s = 0.0
                    deployment.changed()
            deployment.end_waking(now.s)
            for waited in deployment.end_parking(now.s):
                self._tickets.pop(waited.ticket, None)
                effects.append(self._deny(deployment, waited, deployment.too_late(waited, now), now))
            effects += self._serve(deployment, now)
            effects += self._news(deployment, now)
        return effects

    # --- the table ----------------------------------------------------------------------------------------

    def set_routes(self, routes: Iterable[DeploymentRoute], keys: Iterable[KeyGrant], now: Now) -> list[Effect]:
        """Replaces the whole table. Leases on replicas that are no longer in it run to their end."""
        self.connected = True
        for deployment in self._deployments.values():
            for replica in deployment.replicas.values():
                replica.idle_said = False  # a control that was restarted has not heard it
        grants = tuple(keys)
        self._keys = {grant.key_sha256: grant.tenant for grant in grants}
        self._key_priority = {g.key_sha256: g.priority_max for g in grants if g.priority_max is not None}
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
            return self._deny_all(deployment, unknown(key[1]).body(), now)
        if deployment is None:
            deployment = self._deployments[key] = Deployment(route)
        lost = deployment.change(route, now.s)
        for replica_route in route.replicas:
            known = deployment.replicas.get(replica_route.replica) or self._still_leased(replica_route.replica)
            if known is None:
                known = ReplicaSlots(replica_route)
            elif known.route != replica_route:
                known.route, known.penalty_until_s = replica_route, 0.0
            deployment.replicas[replica_route.replica] = known
        kept = {replica_route.replica for replica_route in route.replicas}
        for gone in [name for name in deployment.replicas if name not in kept]:
            del deployment.replicas[gone]
        deployment.changed()
        deployment.end_waking(now.s)
        effects: list[Effect] = []
        for waited in lost:
            self._tickets.pop(waited.ticket, None)
            effects.append(self._deny(deployment, waited, no_longer_served(key[1], waited.pin).body(), now))
        for replica in deployment.replicas.values():
            effects += self._idle(replica)
        if route.refusal is not None:
            return effects + self._deny_all(deployment, route.refusal, now)
        return effects + self._serve(deployment, now)

    def loads(self, now: Now) -> tuple[DeploymentLoad, ...]:
        """The load of every deployment; resets the peaks."""
        return tuple(deployment.take_load(now.s) for deployment in self._deployments.values())

    def gauges(self) -> tuple[Gauges, ...]:
        """How every deployment stands, for metrics; changes nothing."""
        return tuple(deployment.gauges() for deployment in self._deployments.values())

    def waiting(self, key: DeploymentKey, request_id: str, now: Now) -> tuple[WaitRecord, ...]:
        """How requests of that id wait; changes nothing."""
        deployment = self._deployments.get(key)
        return waiting_now(deployment, request_id, now) if deployment is not None else ()

    @property
    def worth_reporting(self) -> bool:
        """Whether control does not know the load as it is: also a request that came and went in between counts."""
        return bool(self.waits) or any(d.peak or d.reported or d.queued for d in self._deployments.values())

    @property
    def busy(self) -> bool:
        """Whether any request waits or is in flight."""
        return bool(self._leases) or any(deployment.line for deployment in self._deployments.values())

    # --- inside -------------------------------------------------------------------------------------------

    def _find(self, tenant: TenantId, name: DeploymentName) -> Deployment:
        deployment = self._deployments.get((tenant, name))
        if deployment is not None:
            return deployment
        if not self.connected:
            raise UnavailableError(
                "the gateway has not heard from control yet", where="gateway", retry_after_s=1.0
            )
        raise unknown(name)

    def _refuse(self, worker: str, request: Acquire, deployment: Deployment, error: ErrorBody, now: Now) -> Effect:
        deployment.refused += 1
        self.waits.refused(deployment, request, error, now)
        return Deny(worker, Denied(ticket=request.ticket, error=error))

    def _wait(
        self, worker: str, request: Acquire, deployment: Deployment, deadline_s: float, now: Now, *, pin: str
    ) -> list[Effect]:
        queue = deployment.route.queue
        key_max = self._key_priority.get(request.key_sha256 or "")
        waiting = deployment.join(worker, request, deadline_s, now, pin=pin, key_priority_max=key_max)
        self._tickets[waiting.ticket] = deployment
        if request.parent_lease:
            self._lineage.waits(waiting.ticket, request, (deployment.route.tenant, request.deployment))
        self._deadlines.put(waiting.deadline_s, waiting.ticket, self._tickets)
        deployment.note_peak()
        effects: list[Effect] = [DemandChanged((deployment.route.tenant, request.deployment))]
        if request.progress and queue.progress_first_s is not None:
            effects.append(Tell(worker, deployment.news(waiting, waiting.position, now)))
        return effects

    def _grant(
        self, worker: str, request: Acquire, deployment: Deployment, replica: ReplicaSlots, now: Now
    ) -> Grant:
        lease = self._next_lease
        self._next_lease += 1
        ticket = (worker, request.ticket)
        key = (deployment.route.tenant, deployment.route.deployment)
        parent = self._lineage.parent_of(request) if request.parent_lease else 0
        depth = self._lineage.depth_of(parent)
        self._leases[lease] = Lease(worker, key, replica, ticket, deployment, now.s, parent, depth)
        replica.leases.add(lease)
        deployment.times.lent(ticket, now.s)
        self._tickets[ticket] = lease
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

    def _end(self, lease: int, now: Now, *, done: bool, outcome: Outcome | None = None) -> list[Effect]:
        """A lease ends, once: hearing of it again changes nothing."""
        held = self._leases.pop(lease, None)
        if held is None:
            return []
        held.replica.leases.discard(lease)
        self._tickets.pop(held.ticket, None)
        held.deployment.given_back(held, now.s, done=done, outcome=outcome)
        effects = self._idle(held.replica)
        deployment = self._deployments.get(held.key)
        if deployment is None or held.replica.route.replica not in deployment.replicas:
            return effects
        return effects + self._serve(deployment, now)

    def _serve(self, deployment: Deployment, now: Now) -> list[Effect]:
        """Hands free slots to those whose turn it is."""
        effects: list[Effect] = []
        while deployment.line:
            if not any(is_free(replica) for replica in deployment.replicas.values()):
                break
            waiting = deployment.take()
            if waiting is None:
                break
            replica = deployment.choose(waiting.pin)
            if replica is None:
                raise AssertionError(f"whoever has the turn finds no slot: {waiting.ticket}")
            deployment.note_drained(now.s)
            grant = self._grant(waiting.worker, waiting.request, deployment, replica, now)
            self.waits.granted(deployment, waiting, grant.message, now)
            effects.append(grant)
        return effects

    def _end_late(self, now: Now) -> list[Effect]:
        effects: list[Effect] = []
        for ticket in self._deadlines.due(now.s):
            deployment = self._tickets.get(ticket)
            if not isinstance(deployment, Deployment):
                continue
            waited = deployment.leave(ticket)
            del self._tickets[ticket]
            if waited is not None:
                effects.append(self._deny(deployment, waited, deployment.too_late(waited, now), now))
        return effects

    def _news(self, deployment: Deployment, now: Now) -> list[Effect]:
        """Tells those who want to know how it stands, now and then."""
        due = [waiting for waiting in deployment.curious.values() if waiting.news_due_s <= now.s]
        if not due:
            return []
        ranks = deployment.line.ranks() if len(deployment.line) <= RANKED_MAX else {}
        longest = len(deployment.line) - 1
        return [
            Tell(waiting.worker, deployment.news(waiting, ranks.get(waiting.ticket, longest), now))
            for waiting in due
        ]

    def _still_leased(self, replica: ReplicaId) -> ReplicaSlots | None:
        """A replica that left the table with requests in flight: if it comes back, they still count."""
        return next((h.replica for h in self._leases.values() if h.replica.route.replica == replica), None)

    def _idle(self, replica: ReplicaSlots) -> list[Effect]:
        if replica.route.accepting:
            replica.idle_said = False
            return []
        if replica.leases or replica.idle_said:
            return []
        replica.idle_said = True
        return [Idle(replica.route.replica)]

    def _deny(self, deployment: Deployment, waited: Waiting, error: ErrorBody, now: Now) -> Effect:
        deployment.refused += 1
        self.waits.denied(deployment, waited, error, now)
        return Deny(waited.worker, Denied(ticket=waited.request.ticket, error=error))

    def _deny_all(self, deployment: Deployment, error: ErrorBody, now: Now) -> list[Effect]:
        effects: list[Effect] = []
        for waited in deployment.clear():
            self._tickets.pop(waited.ticket, None)
            effects.append(self._deny(deployment, waited, error, now))
        return effects

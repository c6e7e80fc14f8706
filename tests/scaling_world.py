"""Queue, deciders and control's reconciliation together in virtual time: only replicas and clients are made up.

`QueueCore` (the gateway's queues) and `ControlLoop.heard_*`, `iterate`, `publish` (control) are the real ones; a
message between them takes LINK_S. A replica becomes ready as long after its order, and a request holds its slot
for as long, as the test says. Nothing sleeps.
"""

import heapq
import itertools
from collections.abc import Callable

import msgspec

from platform_helpers import NODE, deployment, node_record, replica_key, report, revision
from snowdrop.control import scaling
from snowdrop.control.loop import ControlLoop
from snowdrop.control.reconcile import iterate
from snowdrop.control.recorder import Recorder
from snowdrop.control.world import DeploymentEntry, NodeEntry
from snowdrop.domain.ids import DEFAULT_TENANT, DeploymentName, ReplicaId
from snowdrop.domain.replica import ReplicaState
from snowdrop.domain.service import Scale
from snowdrop.gateway.effects import DemandChanged, Deny, Effect, Grant, Idle, Now
from snowdrop.gateway.queue import QueueCore
from snowdrop.policy.autoscale.record import ScalingRecord
from snowdrop.state.memory import MemoryState
from snowdrop.wire.codec import Message
from snowdrop.wire.control import DrainReplica, LoadReport, RouteChanged, StartReplica
from snowdrop.wire.slots import Acquire

GATEWAY, WORKER = "gw-0", "worker-0"
LINK_S = 0.002
REPORT_S = 0.25
TICK_S = 0.5
STOP_S = 0.1
BEGIN_S = 1_000.0


class Served(msgspec.Struct):
    """One request, as its client saw it."""

    arrived_s: float
    granted_s: float | None = None
    ended_s: float | None = None
    denied: str = ""


class ScalingWorld:
    """One node, one gateway, deployments by name. `start_s` and `service_s` are asked at each start and grant."""

    def __init__(self, *, memory_bytes: int = 64 << 30) -> None:
        self.now_s = BEGIN_S
        self.core = QueueCore(keys_required=False)
        self.loop = ControlLoop(MemoryState(), Recorder(), tick_s=TICK_S, clock=lambda: self.now_s)
        self.world = self.loop.world
        self.world.nodes[NODE] = NodeEntry(node_record(memory_bytes=memory_bytes), "inc-1", "/agent.sock")
        self.world.gateways[GATEWAY] = {}
        self.world.make_room_idle_s = 1.0
        self.loop.send_gateways = self._to_gateway
        self.start_s: Callable[[], float] = lambda: 2.0
        self.service_s: Callable[[], float] = lambda: 0.2
        self.requests: list[Served] = []
        self.started: list[tuple[float, str]] = []
        self.ended: list[tuple[float, str, ReplicaState]] = []
        self.records: list[ScalingRecord] = []
        self.on_look: Callable[[DeploymentEntry], None] = lambda _entry: None
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._versions = itertools.count(10)
        self._tickets = itertools.count(1)
        self._of_ticket: dict[int, Served] = {}
        self._look_due = False
        self._report_due = False
        self.at(0.0, self._report_tick)
        self.at(0.0, self._control_tick)

    async def deploy(self, name: str = "embed", *, scale: Scale, concurrency: int = 4, **spec: object) -> None:
        state = self.loop.state
        await state.put_revision(revision(name=name, scale=scale, concurrency=concurrency, **spec))
        made = deployment(name=name)
        await state.put_deployment(made, expected_generation=0)
        await self.loop.set_deployment(made)
        self.loop.publish((DEFAULT_TENANT, DeploymentName(name)))
        self.run(10 * LINK_S)

    def entry(self, name: str = "embed") -> DeploymentEntry:
        return self.world.deployments[DEFAULT_TENANT, DeploymentName(name)]

    # --- time -------------------------------------------------------------------------------------------------

    def at(self, after_s: float, do: Callable[[], None]) -> None:
        """Does something after so long, in the order in which it was asked for."""
        heapq.heappush(self._events, (self.now_s + after_s, next(self._order), do))

    def run(self, for_s: float) -> None:
        until_s = self.now_s + for_s
        while self._events and self._events[0][0] <= until_s:
            self.now_s, _, do = heapq.heappop(self._events)
            do()
        self.now_s = until_s

    # --- clients ----------------------------------------------------------------------------------------------

    def request(self, name: str = "embed", *, after_s: float = 0.0, patience_s: float | None = None) -> Served:
        """A request that comes after so long; its client leaves a queue in which it was for `patience_s`."""
        served = Served(arrived_s=self.now_s + after_s)
        self.requests.append(served)

        def arrive() -> None:
            ticket = next(self._tickets)
            self._of_ticket[ticket] = served
            ask = Acquire(
                ticket=ticket,
                key_sha256=None,
                deployment=DeploymentName(name),
                arrived_unix_ns=self._now.unix_ns,
                request_id=f"req-{ticket}",
            )
            self._carry_out(self.core.arrive(WORKER, ask, self._now))
            if patience_s is not None:
                self.at(patience_s, lambda: self._leave(ticket, served))

        self.at(after_s, arrive)
        return served

    def _leave(self, ticket: int, served: Served) -> None:
        if served.granted_s is None and not served.denied:
            served.denied = "gone"
            self._carry_out(self.core.cancel(WORKER, ticket, self._now))

    # --- the gateway ------------------------------------------------------------------------------------------

    @property
    def _now(self) -> Now:
        return Now(self.now_s, int(self.now_s * 1e9))

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Grant):
                served = self._of_ticket[effect.message.ticket]
                served.granted_s = self.now_s
                self.at(self.service_s(), lambda s=served, lease=effect.message.lease: self._release(s, lease))
            elif isinstance(effect, Deny):
                self._of_ticket[effect.message.ticket].denied = effect.message.error.kind
            elif isinstance(effect, Idle):
                self.at(
                    LINK_S, lambda name=effect.replica: self._hear(lambda: self.loop.heard_idle(GATEWAY, name))
                )
            elif isinstance(effect, DemandChanged) and not self._report_due:
                self._report_due = True
                self.at(LINK_S, self._report)

    def _release(self, served: Served, lease: int) -> None:
        served.ended_s = self.now_s
        self._carry_out(self.core.release(lease, self._now))

    def _report(self) -> None:
        self._report_due = False
        loads, waits = self.core.loads(self._now), self.core.waits.take()
        self._hear(lambda: self.loop.heard_load(LoadReport(gateway=GATEWAY, loads=loads, waits=waits)))

    def _report_tick(self) -> None:
        self._carry_out(self.core.tick(self._now))
        if self.core.worth_reporting:
            self._report()
        self.at(REPORT_S, self._report_tick)

    def _to_gateway(self, message: Message) -> None:
        if isinstance(message, RouteChanged):
            key, route = (message.tenant, message.deployment), message.route
            self.core.connected = True
            self.at(LINK_S, lambda: self._carry_out(self.core.change_route(key, route, self._now)))

    # --- control ----------------------------------------------------------------------------------------------

    def _hear(self, tell: Callable[[], None]) -> None:
        tell()
        if not self._look_due:
            self._look_due = True
            self.at(LINK_S, self._look)

    def _control_tick(self) -> None:
        self._look()
        self.at(TICK_S, self._control_tick)

    def _look(self) -> None:
        self._look_due = False
        for key, entry in list(self.world.deployments.items()):
            for order in iterate(self.world, key, now_s=self.now_s, now_unix_ns=self._now.unix_ns):
                self._order_agent(order.message)
            made = scaling.record(entry, now_unix_ns=self._now.unix_ns)
            if made is not None:
                self.records.append(made)
            self.loop.publish(key)
            self.on_look(entry)

    # --- the agent --------------------------------------------------------------------------------------------

    def _order_agent(self, message: Message) -> None:
        if isinstance(message, StartReplica):
            name = message.key.replica
            self.started.append((self.now_s, name))
            self.at(self.start_s(), lambda: self._tell(message.key.deployment, name, ReplicaState.READY))
        elif isinstance(message, DrainReplica):
            name = message.replica
            entry = self.world.replicas[name]
            assert entry.state is not ReplicaState.READY or not self._in_flight(name), "a drain cut an answer"
            self.at(STOP_S, lambda: self._tell(entry.key[1], name, ReplicaState.STOPPED))

    def _in_flight(self, name: ReplicaId) -> int:
        return sum(1 for lease in self.core._leases.values() if lease.replica.route.replica == name)

    def _tell(self, deployment_name: str, name: ReplicaId, state: ReplicaState) -> None:
        entry = self.world.replicas.get(name)
        if entry is None:
            return  # it ended before it was ready
        if state is ReplicaState.STOPPED:
            self.ended.append((self.now_s, name, entry.state))
        key = replica_key(name, name=deployment_name)
        told = report(
            key, state, version=next(self._versions), resources=entry.resources, concurrency=entry.concurrency
        )
        self._hear(lambda: self.loop.heard_replica(told))

"""The thin shell around the deciders: wakes when something changed, iterates, sends orders, publishes routes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from functools import partial

import anyio
import msgspec

from snowdrop.control import rollouts, scaling
from snowdrop.control.ending import LOST_REASON, ended_report, lost_report
from snowdrop.control.receipts import failed_starts, failure_of, receipt_of
from snowdrop.control.reconcile import Order, iterate, next_look_s
from snowdrop.control.recorder import Recorder
from snowdrop.control.routes import deployment_route
from snowdrop.control.secrets import Secrets
from snowdrop.control.volumes import Volumes
from snowdrop.control.world import DeploymentEntry, DeploymentKey, ReplicaEntry, World
from snowdrop.domain.deployment import Deployment
from snowdrop.domain.errors import ConflictError, SnowdropError
from snowdrop.domain.ids import NodeId, ReplicaId
from snowdrop.domain.replica import TERMINAL_STATES, ReplicaReport, ReplicaState
from snowdrop.domain.rollout import Rollout
from snowdrop.policy import restart
from snowdrop.policy.autoscale.learned import STARTS_KEPT
from snowdrop.state.port import StateStore
from snowdrop.wire.codec import Message
from snowdrop.wire.control import DeploymentRoute, DrainReplica, LoadReport, RouteChanged, StartReplica

ORPHAN_DRAIN_S_MAX = 30.0
log = logging.getLogger("snowdrop.control")


class ControlLoop:
    """Owns the world. `send_agent` and `send_gateways` are set by whoever holds the connections.

    `replica_changed` hears each new report, and whether the replica has just become ready under this control."""

    def __init__(
        self,
        state: StateStore,
        recorder: Recorder,
        *,
        tick_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.world = World()
        self.state = state
        self.recorder = recorder
        self.generation = 0
        self.secrets: Secrets | None = None
        self.volumes: Volumes | None = None
        self.send_agent: Callable[[NodeId, Message], None] = lambda _node, _message: None
        self.gateway_left: Callable[[str], None] = lambda _gateway: None
        self.send_gateways: Callable[[Message], None] = lambda _message: None
        self.replica_changed: Callable[[ReplicaReport, bool], None] = lambda _report, _just_ready: None
        self.rollout_ended: Callable[[DeploymentKey, Rollout], None] = lambda _key, _rollout: None
        self._tick_s = tick_s
        self._clock = clock
        self._dirty: set[DeploymentKey] = set()
        self._wake = anyio.Event()
        self._published: dict[DeploymentKey, DeploymentRoute] = {}

    # --- what others tell ---------------------------------------------------------------------------------

    async def load(self) -> None:
        """Reads deployments and the replicas that lived when control last ran."""
        for deployment in await self.state.list_deployments(None):
            await self.set_deployment(deployment)
        for report in await self.state.list_replicas(None, None, ended=False, limit=10_000):
            self._adopt(report)

    async def set_deployment(self, deployment: Deployment) -> None:
        """A deployment is new or has changed; its revision is read from the state."""
        key = (deployment.tenant, deployment.name)
        revision = await self.state.get_revision(deployment.tenant, deployment.name, deployment.revision)
        if revision is None:
            log.error("deployment %s/%s names revision %s, which is not stored", *key, deployment.revision)
            return
        rival = None
        if deployment.rival is not None:
            rival = await self.state.get_revision(deployment.tenant, deployment.name, deployment.rival)
        entry = self.world.deployments.get(key)
        if entry is None:
            entry = DeploymentEntry(deployment, revision, rival=rival)
            await self._restore_scaling(entry)
            self.world.deployments.setdefault(key, entry)
        elif rollouts.is_older(deployment, entry.deployment):
            pass
        elif deployment.created_unix_ns != entry.deployment.created_unix_ns:
            # Made anew before the old one's last replica had ended: what that one taught says nothing of this one.
            self.world.deployments[key] = DeploymentEntry(deployment, revision, rival=rival)
        else:
            self._tell_ended(key, entry.deployment, deployment)
            rollouts.acted(entry, deployment, revision, rival)
        self.poke(key)

    def poke(self, key: DeploymentKey) -> None:
        """Looks at a deployment soon."""
        self._dirty.add(key)
        self._wake.set()

    def heard_load(self, report: LoadReport) -> None:
        """A gateway's load, whole."""
        loads = self.world.gateways.get(report.gateway)
        if loads is None:
            return
        self.world.told.add(report.gateway)
        if report.waits:
            self._record_waits(report)
        first = not loads
        for load in report.loads:
            key = (load.tenant, load.deployment)
            before = loads.get(key)
            deployment = self.world.deployments.get(key)
            # What a gateway counted before this control heard of it says nothing of now.
            if deployment is not None and not first:
                scaling.heard(deployment, before, load)
            if before is not None and before.peak > load.peak:  # of a report that has not been looked at yet
                load = msgspec.structs.replace(load, peak=before.peak)  # noqa: PLW2901
            loads[key] = load
            if before is None or (before.in_flight, before.queued) != (load.in_flight, load.queued) or load.peak:
                self.poke(key)

    def heard_idle(self, gateway: str, replica: ReplicaId) -> None:
        """Nothing of that gateway is in flight at a draining replica."""
        entry = self.world.replicas.get(replica)
        if entry is not None:
            entry.idle_at.add(gateway)
            self.poke(entry.key)

    def gateway_gone(self, gateway: str) -> None:
        self.world.gateways.pop(gateway, None)
        self.world.told.discard(gateway)
        self.gateway_left(gateway)
        for key in self.world.deployments:
            self.poke(key)

    def heard_replica(self, report: ReplicaReport) -> None:
        """A replica changed, or is told again in a hello."""
        entry = self.world.replicas.get(report.key.replica)
        if entry is None:
            if report.state not in TERMINAL_STATES:
                self._adopt(report)
                entry = self.world.replicas[report.key.replica]
            elif not self.world.remember_end(report):
                return
        elif entry.report is not None and entry.report.version >= report.version:
            return
        now_s = self._clock()
        just_ready = entry is not None and report.state is ReplicaState.READY and entry.ready_s is None
        self.replica_changed(report, just_ready)
        ordered_unix_ns = entry.order.ordered_unix_ns if entry is not None and entry.order else 0
        if entry is not None:
            entry.report = report
            if just_ready:
                entry.ready_s = now_s
                deployment = self.world.deployments.get(entry.key)
                if deployment is not None and entry.order is not None:
                    scaling.became_ready(deployment, now_s - entry.ordered_s)
        self._record(report, ordered_unix_ns)
        if report.state in TERMINAL_STATES and entry is not None:
            self.world.remember_end(report)
            del self.world.replicas[report.key.replica]
            for waiting, other in self.world.deployments.items():
                if other.scaling.wants_room:
                    self.poke(waiting)
            self._count_failure(entry, report, now_s)
        # Gateways hear of it before anything else is done: a caller may be waiting for this replica.
        key = (report.key.tenant, report.key.deployment)
        self.publish(key)
        self.poke(key)

    def node_gone(self, node: NodeId, living: Iterable[ReplicaId] = ()) -> None:
        """An agent is lost, or came back with only `living`: everything else that it had is lost with it."""
        kept = set(living)
        for name, entry in list(self.world.replicas.items()):
            if entry.node == node and name not in kept:
                self.heard_replica(lost_report(name, entry))

    # --- the loop -----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """For ever. One failing deployment does not keep the others from being looked at."""
        while True:
            keys, self._dirty = self._dirty, set()
            for key in keys:
                if key not in self.world.deployments:
                    self._drain_orphans(key)
                    continue
                try:
                    await self.look(key)
                except SnowdropError as error:
                    log.warning("deployment %s/%s is looked at again later: %s", *key, error)
            if not self._dirty:
                with anyio.move_on_after(self._wait_s()):
                    await self._wake.wait()
            self._wake = anyio.Event()
            if not self._dirty:
                self._dirty = {key for key in self.world.deployments if self._is_active(key)}

    async def look(self, key: DeploymentKey) -> None:
        """One iteration for one deployment."""
        await self._step_rollout(key)
        entry = self.world.deployments[key]
        orders = iterate(self.world, key, now_s=self._clock(), now_unix_ns=time.time_ns())
        for order in orders:
            await self._send_order(order)
        self._record_decision(entry)
        while self.world.disturbed:
            self.poke(self.world.disturbed.pop())
        if entry.deployment.deleting and not any(True for _ in self.world.replicas_of(key)):
            # Fenced: if it was deployed anew meanwhile, the new deployment stays.
            generation = entry.deployment.generation
            gone = await self.state.delete_deployment(*key, expected_generation=generation)
            if gone and self.world.deployments.get(key) is entry and entry.deployment.generation == generation:
                del self.world.deployments[key]
        self.publish(key)

    async def _step_rollout(self, key: DeploymentKey) -> None:
        """Takes a rollout's next step, stored before anything is done about it: control may die at any time."""
        changed = rollouts.step(self.world, key, now_unix_ns=time.time_ns())
        if changed is None:
            return
        try:
            await self.state.put_deployment(changed, expected_generation=changed.generation - 1)
        except ConflictError:
            # Somebody changed the deployment meanwhile; what they want is looked at next.
            stored = await self.state.get_deployment(*key)
            if stored is not None:
                await self.set_deployment(stored)
            return
        entry = self.world.deployments[key]
        if not rollouts.is_older(changed, entry.deployment):
            self._tell_ended(key, entry.deployment, changed)
            rollouts.stepped(entry, changed)
            log.info("rollout of %s/%s: %s", *key, rollouts.summary(changed))
        self.poke(key)

    def _tell_ended(self, key: DeploymentKey, before: Deployment, after: Deployment) -> None:
        for ended in rollouts.newly_ended(before, after):
            self.rollout_ended(key, ended)

    async def _send_order(self, order: Order) -> None:
        message = order.message
        if isinstance(message, StartReplica):
            complete = await self.completed(message)
            if complete is not None:
                self.send_agent(order.node, complete)
        else:
            self.send_agent(order.node, message)

    async def completed(self, order: StartReplica) -> StartReplica | None:
        """The order with its secrets, as it is sent. Without them, or with a volume that is full, the start has
        failed, and None is returned.
        """
        try:
            if self.volumes is not None:
                self.volumes.check_start(order.key.tenant, order.revision.spec.volumes)
            return order if self.secrets is None else await self.secrets.complete(order)
        except SnowdropError as error:
            entry = self.world.replicas.get(order.key.replica)
            if entry is not None:
                self.heard_replica(ended_report(order.key.replica, entry, reason=str(error), error=error.body()))
            return None

    def _drain_orphans(self, key: DeploymentKey) -> None:
        """Replicas that came back after their deployment was deleted: nobody can call them."""
        for name, entry in self.world.replicas_of(key):
            if not entry.drain_sent:
                entry.drain_sent = True
                order = DrainReplica(replica=name, reason=entry.draining, drain_s_max=ORPHAN_DRAIN_S_MAX)
                self.send_agent(entry.node, order)

    def publish(self, key: DeploymentKey) -> None:
        """Tells gateways of a deployment if what they know is no longer so."""
        route = deployment_route(self.world, key)
        if route == self._published.get(key):
            return
        if route is None:
            del self._published[key]
        else:
            self._published[key] = route
        self.generation += 1
        changed = RouteChanged(generation=self.generation, tenant=key[0], deployment=key[1], route=route)
        self.send_gateways(changed)

    def _is_active(self, key: DeploymentKey) -> bool:
        """Whether time alone can change what a deployment should have."""
        entry = self.world.deployments[key]
        decision = entry.decision
        replicas = any(True for _ in self.world.replicas_of(key))
        return (
            entry.deployment.deleting
            or (entry.deployment.rollout is not None and entry.deployment.rollout.step_unix_ns > 0)
            or replicas
            or scaling.is_due(entry, time.time())
            or decision is None
            or decision.desired > 0
            or decision.stable_load > 0
        )

    def _wait_s(self) -> float:
        now_s = self._clock()
        looks = [next_look_s(entry, now_s, time.time()) for entry in self.world.deployments.values()]
        return min([self._tick_s, *(max(0.0, look - now_s) + 0.001 for look in looks if look is not None)])

    # --- inside -------------------------------------------------------------------------------------------

    def _adopt(self, report: ReplicaReport) -> None:
        """A replica that an earlier life of control ordered."""
        key = (report.key.tenant, report.key.deployment)
        deployment = self.world.deployments.get(key)
        self.world.replicas[report.key.replica] = ReplicaEntry(
            key=key,
            revision=report.key.revision,
            node=report.node,
            age=self.world.next_age(),
            concurrency=report.concurrency,
            drain_s_max=report.drain_s_max,
            resources=report.resources,
            ordered_s=self._clock(),
            report=report,
            ready_s=self._clock() if report.state is ReplicaState.READY else None,
            draining="" if deployment else "its deployment is gone",
        )

    def _record_decision(self, entry: DeploymentEntry) -> None:
        made = scaling.record(entry, now_unix_ns=time.time_ns())
        if made is None:
            return
        store, kept, learned = self.state.scaling, made, entry.scaling.learned
        deployments = self.world.deployments

        async def write() -> None:
            await store.put_decision(kept)
            if deployments.get((kept.tenant, kept.deployment)) is entry:  # it may have been deleted meanwhile
                await store.put_learned(kept.tenant, kept.deployment, learned)

        self.recorder.add(f"decision on {made.tenant}/{made.deployment}", write)

    def _record_waits(self, report: LoadReport) -> None:
        store = self.state.scaling

        async def write() -> None:
            await store.put_waits(report.waits)

        self.recorder.add(f"{len(report.waits)} waits told by {report.gateway}", write)

    async def _restore_scaling(self, entry: DeploymentEntry) -> None:
        """What an earlier life of control learned: start-up times and failed starts from receipts, the rest as it
        was kept.
        """
        key = (entry.deployment.tenant, entry.deployment.name)
        receipts = await self.state.list_receipts(*key, limit=STARTS_KEPT)
        since_unix_ns = entry.deployment.created_unix_ns  # one of that name may have been deleted before
        recent = [r for r in receipts if r.started_unix_ns >= since_unix_ns]
        ended_well = [r for r in reversed(recent) if r.outcome == "ready"]
        starts_s = [(r.ready_unix_ns - r.started_unix_ns) / 1e9 for r in ended_well]
        scaling.restore(entry, await self.state.scaling.get_learned(*key), starts_s)
        failed = partial(failed_starts, recent, now_s=self._clock(), now_unix_ns=time.time_ns())
        entry.starts = failed(entry.revision.id)
        if entry.rival is not None:
            entry.rival_starts = failed(entry.rival.id)

    def _record(self, report: ReplicaReport, ordered_unix_ns: int) -> None:
        state = self.state

        async def write() -> None:
            # The receipt first: a stored report then means that its receipt is stored.
            if report.state is ReplicaState.READY or report.state in TERMINAL_STATES:
                await state.put_receipt(receipt_of(report, ordered_unix_ns=ordered_unix_ns))
            await state.put_replica(report)

        self.recorder.add(f"replica {report.key.replica} {report.state}", write)

    def _count_failure(self, entry: ReplicaEntry, report: ReplicaReport, now_s: float) -> None:
        deployment = self.world.deployments.get(entry.key)
        if report.state is not ReplicaState.FAILED or deployment is None:
            return
        if report.reason == LOST_REASON:
            return
        ready_s = now_s - entry.ready_s if entry.ready_s is not None else None
        reason = failure_of(report.error, report.reason)
        failed = partial(restart.after_failure, reason=reason, ready_s=ready_s, now_s=now_s)
        if entry.revision == deployment.revision.id:
            deployment.starts = failed(deployment.starts)
        elif deployment.rival is not None and entry.revision == deployment.rival.id:
            deployment.rival_starts = failed(deployment.rival_starts)

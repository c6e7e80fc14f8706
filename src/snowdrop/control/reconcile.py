"""One iteration for one deployment: observe, ask the deciders, say what to order. No await, no I/O.

The loop (`control.loop`) carries the orders out; tests call `iterate` directly.
"""

from __future__ import annotations

import msgspec

from snowdrop.control.world import DeploymentEntry, DeploymentKey, ReplicaEntry, World
from snowdrop.domain.deployment import DeploymentHealth
from snowdrop.domain.ids import NodeId, ReplicaId, fresh_id
from snowdrop.domain.replica import STARTING_STATES, ReplicaKey, ReplicaState
from snowdrop.policy import autoscale, placement, reconcile, restart
from snowdrop.wire.control import DrainReplica, StartReplica


class Order(msgspec.Struct, frozen=True):
    """Send `message` to the agent of `node`."""

    node: NodeId
    message: StartReplica | DrainReplica


def iterate(world: World, key: DeploymentKey, *, now_s: float, now_unix_ns: int) -> list[Order]:
    """What to order for a deployment now; updates the deciders' memory and the entries in `world`."""
    entry = world.deployments[key]
    replicas = list(world.replicas_of(key))
    may_start = _judge_starts(entry, replicas, now_s)
    decision = _autoscale(world, key, entry, replicas, now_s)
    views = tuple(_view(world, name, replica) for name, replica in replicas)
    plan = reconcile.plan(
        views,
        current=entry.revision.id,
        desired=0 if entry.deployment.deleting else decision.desired,
        may_start=may_start,
        reason=decision.reason,
    )
    for drain in plan.drains:
        world.replicas[drain.replica].draining = drain.reason
    orders = _drains(world, entry)
    orders += _starts(world, key, plan.starts, now_s=now_s, now_unix_ns=now_unix_ns)
    return orders


def next_look_s(entry: DeploymentEntry, now_s: float) -> float | None:
    """When something will change without an event: idle over, back-off over. None if nothing will."""
    times: list[float] = []
    idle_at = autoscale.idle_at_s(entry.autoscale, entry.scale)
    if idle_at is not None and idle_at > now_s:
        times.append(idle_at)
    verdict = restart.verdict(entry.starts, now_s)
    if isinstance(verdict, restart.BackOff):
        times.append(verdict.until_s)
    return min(times) if times else None


def _judge_starts(entry: DeploymentEntry, replicas: list[tuple[ReplicaId, ReplicaEntry]], now_s: float) -> bool:
    """Whether a start is worth trying; sets the deployment's health for `ps` and callers."""
    proven = any(r.ready_s is not None and now_s - r.ready_s >= restart.PROVEN_S for _, r in replicas)
    if proven:
        entry.starts = restart.after_proof(entry.starts)
    verdict = restart.verdict(entry.starts, now_s)
    if isinstance(verdict, restart.CrashLooping):
        entry.health = DeploymentHealth.CRASH_LOOPING
        entry.health_reason = f"{verdict.failures} starts failed in a row, the last with: {verdict.reason}"
        return False
    if isinstance(verdict, restart.BackOff):
        entry.health = DeploymentHealth.BACKING_OFF
        entry.health_reason = f"next start in {verdict.until_s - now_s:.1f} s, after: {entry.starts.reason}"
        return False
    entry.health = DeploymentHealth.OK
    entry.health_reason = ""
    return True


def _autoscale(
    world: World,
    key: DeploymentKey,
    entry: DeploymentEntry,
    replicas: list[tuple[ReplicaId, ReplicaEntry]],
    now_s: float,
) -> autoscale.AutoscaleDecision:
    in_flight, queued, peak = world.load(key)
    world.clear_peaks(key)
    living = [replica for _, replica in replicas if not replica.draining]
    seen = autoscale.AutoscaleInput(
        in_flight=in_flight,
        queued=queued,
        peak=peak,
        ready=sum(1 for replica in living if replica.state is ReplicaState.READY),
        starting=sum(1 for replica in living if replica.state in STARTING_STATES),
        concurrency=entry.revision.spec.concurrency,
        scale=entry.scale,
    )
    entry.autoscale, entry.decision = autoscale.decide(entry.autoscale, seen, now_s)
    return entry.decision


def _view(world: World, name: ReplicaId, replica: ReplicaEntry) -> reconcile.ReplicaView:
    return reconcile.ReplicaView(
        id=name,
        revision=replica.revision,
        state=replica.state,
        in_flight=world.in_flight_at(replica.key, name),
        age=replica.age,
        draining_ordered=bool(replica.draining),
    )


def _drains(world: World, entry: DeploymentEntry) -> list[Order]:
    """Orders drains that gateways have finished with: nothing is in flight, so nothing can be cut."""
    orders: list[Order] = []
    for name, replica in world.replicas_of((entry.deployment.tenant, entry.deployment.name)):
        if not replica.draining or replica.drain_sent:
            continue
        quiet = replica.state is not ReplicaState.READY or set(world.gateways) <= replica.idle_at
        if quiet or not world.gateways:
            replica.drain_sent = True
            order = DrainReplica(replica=name, reason=replica.draining, drain_s_max=replica.drain_s_max)
            orders.append(Order(replica.node, order))
    return orders


def _starts(world: World, key: DeploymentKey, count: int, *, now_s: float, now_unix_ns: int) -> list[Order]:
    entry = world.deployments[key]
    orders: list[Order] = []
    spec = entry.revision.spec
    entry.placement_reason = ""
    for _ in range(count):
        where = placement.place(world.node_views(), spec.resources, spec.accelerator)
        entry.placement_reason = where.reason
        if isinstance(where, placement.NotPlaced):
            break
        replica = ReplicaId(fresh_id("rep"))
        name = ReplicaKey(tenant=key[0], deployment=key[1], revision=entry.revision.id, replica=replica)
        order = StartReplica(key=name, revision=entry.revision, ordered_unix_ns=now_unix_ns)
        world.replicas[replica] = ReplicaEntry(
            key=key,
            revision=entry.revision.id,
            node=where.node,
            age=world.next_age(),
            concurrency=spec.concurrency,
            drain_s_max=spec.drain_s_max,
            resources=spec.resources,
            ordered_s=now_s,
            order=order,
        )
        orders.append(Order(where.node, order))
    return orders

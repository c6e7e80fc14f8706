"""One iteration for one deployment: observe, ask the deciders, say what to order. No await, no I/O.

The loop (`control.loop`) carries the orders out; tests call `iterate` directly.
"""

from __future__ import annotations

import msgspec

from snowdrop.control import rollouts, room, scaling
from snowdrop.control.world import DeploymentEntry, DeploymentKey, ReplicaEntry, World
from snowdrop.domain.deployment import DeploymentHealth, Revision
from snowdrop.domain.ids import NodeId, ReplicaId, fresh_id
from snowdrop.domain.replica import STARTING_STATES, ReplicaKey, ReplicaState
from snowdrop.policy import placement, reconcile, restart
from snowdrop.wire.control import DrainReplica, StartReplica

CLOCKS_NS = 500_000_000
"""The two clocks may drift so far before a time that was converted is told anew."""


class Order(msgspec.Struct, frozen=True):
    """Send `message` to the agent of `node`."""

    node: NodeId
    message: StartReplica | DrainReplica


def iterate(world: World, key: DeploymentKey, *, now_s: float, now_unix_ns: int) -> list[Order]:
    """What to order for a deployment now; updates the deciders' memory and the entries in `world`."""
    entry = world.deployments[key]
    replicas = list(world.replicas_of(key))
    starts_max = _judge_starts(entry, replicas, now_s, now_unix_ns)
    decision = scaling.judge(world, key, replicas, now_s=now_s, now_unix_ns=now_unix_ns)
    views = tuple(_view(world, name, replica) for name, replica in replicas)
    desired = 0 if entry.deployment.deleting else decision.desired
    desired, rival = rollouts.targets(world, key, desired, now_s=now_s, now_unix_ns=now_unix_ns)
    rival = _bounded(entry, rival)
    plan = reconcile.plan(
        views,
        current=entry.revision.id,
        desired=desired,
        may_start=starts_max is None or starts_max > 0,
        reason=decision.reason,
        rival=rival,
        older_reason=rollouts.older_reason(entry),
    )
    for drain in plan.drains:
        world.replicas[drain.replica].draining = drain.reason
    orders = _drains(world, entry)
    count = plan.starts if starts_max is None else min(plan.starts, starts_max)
    entry.placement_reason = ""
    entry.scaling.wants_room = False
    started = _starts(world, key, entry.revision, count, now_s=now_s, now_unix_ns=now_unix_ns)
    if len(started) < count:
        room.make(world, key, entry.revision, now_s=now_s)
    orders += started
    entry.rival_no_room = False
    if entry.rival is not None:
        started = _starts(world, key, entry.rival, plan.rival_starts, now_s=now_s, now_unix_ns=now_unix_ns)
        entry.rival_no_room = len(started) < plan.rival_starts
        orders += started
    return orders


def _bounded(entry: DeploymentEntry, rival: reconcile.Rival | None) -> reconcile.Rival | None:
    """The other revision of a rollout within its own bounds; those of the current one are part of the decision."""
    bounds = entry.deployment.revision_bounds.get(rival.revision) if rival is not None else None
    if rival is None or bounds is None or rival.desired == 0:
        return rival
    count = max(rival.desired, bounds.min or 0)
    return msgspec.structs.replace(rival, desired=count if bounds.max is None else min(count, bounds.max))


def next_look_s(entry: DeploymentEntry, now_s: float, now_unix_s: float) -> float | None:
    """When something will change without an event: idle over, back-off over, a schedule. None if nothing will."""
    look = scaling.next_look_s(entry, now_s, now_unix_s)
    times: list[float] = [] if look is None else [look]
    verdict = restart.verdict(entry.starts, now_s)
    if isinstance(verdict, restart.BackOff):
        times.append(verdict.until_s)
    if isinstance(verdict, restart.CrashLooping) and verdict.until_s > now_s:
        times.append(verdict.until_s)
    return min(times) if times else None


def _judge_starts(
    entry: DeploymentEntry, replicas: list[tuple[ReplicaId, ReplicaEntry]], now_s: float, now_unix_ns: int
) -> int | None:
    """How many starts of the current revision are worth trying, None for any number; sets the deployment's health
    for `ps` and callers.
    """
    ours = [replica for _, replica in replicas if replica.revision == entry.revision.id]
    if any(r.ready_s is not None and now_s - r.ready_s >= restart.PROVEN_S for r in ours):
        entry.starts = restart.after_proof(entry.starts)
    verdict = restart.verdict(entry.starts, now_s)
    entry.is_half_open = isinstance(verdict, restart.CrashLooping) and now_s >= verdict.until_s
    if isinstance(verdict, restart.CrashLooping):
        entry.health = DeploymentHealth.CRASH_LOOPING
        until_unix_ns = now_unix_ns + int((verdict.until_s - now_s) * 1e9)
        if abs(until_unix_ns - entry.parked_until_unix_ns) > CLOCKS_NS:  # gateways need not hear of each tick
            entry.parked_until_unix_ns = until_unix_ns
        pause = f"; the next try is in {verdict.until_s - now_s:.0f} s" if verdict.until_s > now_s else ""
        entry.health_reason = f"{verdict.failures} starts failed in a row, the last with: {verdict.reason}{pause}"
        starting = sum(1 for r in ours if r.state in STARTING_STATES and not r.draining)
        return restart.starts_max(verdict, starting=starting, now_s=now_s)
    if isinstance(verdict, restart.BackOff):
        entry.health = DeploymentHealth.BACKING_OFF
        entry.health_reason = f"next start in {verdict.until_s - now_s:.1f} s, after: {entry.starts.reason}"
        return 0
    entry.health = DeploymentHealth.OK
    entry.health_reason = ""
    return None


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


def _starts(
    world: World, key: DeploymentKey, revision: Revision, count: int, *, now_s: float, now_unix_ns: int
) -> list[Order]:
    entry = world.deployments[key]
    orders: list[Order] = []
    spec = revision.spec
    for _ in range(count):
        where = placement.place(world.node_views(), spec.resources, spec.accelerator)
        entry.placement_reason = where.reason
        if isinstance(where, placement.NotPlaced):
            break
        replica = ReplicaId(fresh_id("rep"))
        name = ReplicaKey(tenant=key[0], deployment=key[1], revision=revision.id, replica=replica)
        order = StartReplica(key=name, revision=revision, ordered_unix_ns=now_unix_ns)
        world.replicas[replica] = ReplicaEntry(
            key=key,
            revision=revision.id,
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

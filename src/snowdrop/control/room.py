"""Makes room for a start that fits nowhere: idle replicas of other deployments drain, as `policy.room` says."""

from __future__ import annotations

import msgspec

from snowdrop.control.world import DeploymentEntry, DeploymentKey, World
from snowdrop.domain.deployment import Revision
from snowdrop.domain.ids import NodeId
from snowdrop.domain.replica import ReplicaState
from snowdrop.policy.placement import NodeView, Placed, place
from snowdrop.policy.room import IdleReplica, make_room


def make(world: World, key: DeploymentKey, revision: Revision, *, now_s: float) -> None:
    """Called when a replica of `revision` found no room. Whose replicas were taken is in `world.disturbed`."""
    entry = world.deployments[key]
    entry.scaling.wants_room = True
    signals = entry.scaling.signals
    if world.make_room_idle_s is None or signals is None:
        return
    # A standby of its own is no reason to take another's.
    if signals.load == 0 and signals.capacity >= signals.bounds.min:
        return
    spec = revision.spec
    soon = _with_leaving(world)
    if isinstance(place(soon, spec.resources, spec.accelerator), Placed):
        entry.placement_reason += "; waiting for replicas that drain"
        return
    room = make_room(soon, spec.resources, spec.accelerator, tuple(_idle(world, key, now_s)))
    entry.placement_reason += f"; {room.reason}"
    for name in room.drain:
        replica = world.replicas[name]
        replica.draining = f"makes room for {key[1]}"
        other = world.deployments[replica.key]
        other.scaling.room = _living(world, replica.key)
        world.disturbed.add(replica.key)


def _with_leaving(world: World) -> tuple[NodeView, ...]:
    """The nodes as they will be when those that drain are gone."""
    leaving: dict[NodeId, list[tuple[int, float]]] = {}
    for replica in world.replicas.values():
        if replica.draining:
            amount = (replica.resources.memory_bytes_max, replica.resources.cpus)
            leaving.setdefault(replica.node, []).append(amount)
    return tuple(
        msgspec.structs.replace(
            node,
            free_memory_bytes=node.free_memory_bytes + sum(memory for memory, _ in leaving.get(node.id, [])),
            free_cpus=node.free_cpus + sum(cpus for _, cpus in leaving.get(node.id, [])),
        )
        for node in world.node_views()
    )


def _idle(world: World, key: DeploymentKey, now_s: float) -> list[IdleReplica]:
    found: list[IdleReplica] = []
    for name, replica in world.replicas.items():
        if replica.key == key or replica.draining or replica.state is not ReplicaState.READY:
            continue
        other = world.deployments.get(replica.key)
        if other is None or any(world.load(replica.key)):
            continue
        idle_s = _idle_s(other, now_s)
        if world.make_room_idle_s is None or idle_s < world.make_room_idle_s:
            continue
        bounds = other.scaling.signals.bounds if other.scaling.signals is not None else other.scale
        found.append(
            IdleReplica(
                id=name,
                node=replica.node,
                deployment=replica.key,
                memory_bytes=replica.resources.memory_bytes_max,
                cpus=replica.resources.cpus,
                idle_s=idle_s,
                spare=max(0, _living(world, replica.key) - bounds.min),
                same_tenant=replica.key[0] == key[0],
            )
        )
    return found


def _idle_s(entry: DeploymentEntry, now_s: float) -> float:
    busy_s = entry.autoscale.busy_s
    return 0.0 if busy_s is None else now_s - busy_s


def _living(world: World, key: DeploymentKey) -> int:
    return sum(1 for _, replica in world.replicas_of(key) if not replica.draining)

"""Which idle replicas of other deployments give way to a start that finds no room on any node. Pure."""

from __future__ import annotations

import msgspec

from snowdrop.domain.ids import NodeId, ReplicaId
from snowdrop.domain.service import ResourceSpec
from snowdrop.policy.placement import NodeView, Placed, place


class IdleReplica(msgspec.Struct, frozen=True, kw_only=True):
    """A replica that could go: its deployment has no request, and keeps its minimum without it.

    `spare` is how many of its deployment may go at most; `same_tenant` says that its tenant is the one who needs
    room.
    """

    id: ReplicaId
    node: NodeId
    deployment: tuple[str, str]
    memory_bytes: int
    cpus: float
    idle_s: float
    spare: int
    same_tenant: bool


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """The replicas that should drain so that the start fits, none if that does not help."""

    drain: tuple[ReplicaId, ...]
    reason: str


def make_room(
    nodes: tuple[NodeView, ...],
    resources: ResourceSpec,
    accelerator: tuple[str, ...],
    idle: tuple[IdleReplica, ...],
) -> Room:
    """The node where the fewest must go; there those of the same tenant first, then those idle for longest.

    Nothing drains unless the start then fits: room that helps nobody is not made.
    """
    best: tuple[IdleReplica, ...] | None = None
    for node in nodes:
        chosen = _enough(node, resources, accelerator, [each for each in idle if each.node == node.id])
        if chosen and (best is None or len(chosen) < len(best)):
            best = chosen
    if best is None:
        return Room(drain=(), reason="no idle replica of another deployment makes enough room")
    names = ", ".join(sorted({each.deployment[1] for each in best}))
    return Room(drain=tuple(each.id for each in best), reason=f"{len(best)} idle of {names} make room")


def _enough(
    node: NodeView, resources: ResourceSpec, accelerator: tuple[str, ...], idle: list[IdleReplica]
) -> tuple[IdleReplica, ...]:
    taken: list[IdleReplica] = []
    of: dict[tuple[str, str], int] = {}
    ordered = sorted(idle, key=lambda each: (not each.same_tenant, -each.idle_s, each.id))
    for each in ordered:
        if of.get(each.deployment, 0) >= each.spare:
            continue
        taken.append(each)
        of[each.deployment] = of.get(each.deployment, 0) + 1
        if isinstance(place((_without(node, taken),), resources, accelerator), Placed):
            # One that was taken early may not be needed beside a later, larger one.
            for early in list(taken):
                rest = [other for other in taken if other is not early]
                if isinstance(place((_without(node, rest),), resources, accelerator), Placed):
                    taken = rest
            return tuple(taken)
    # What a deployment can spare may have gone to its smaller ones, where a larger one alone is enough.
    for each in ordered:
        if each.spare > 0 and isinstance(place((_without(node, [each]),), resources, accelerator), Placed):
            return (each,)
    return ()


def _without(node: NodeView, gone: list[IdleReplica]) -> NodeView:
    return msgspec.structs.replace(
        node,
        free_memory_bytes=node.free_memory_bytes + sum(each.memory_bytes for each in gone),
        free_cpus=node.free_cpus + sum(each.cpus for each in gone),
    )

"""Which node a new replica goes to."""

from __future__ import annotations

import msgspec

from snowdrop.domain.ids import NodeId
from snowdrop.domain.service import ResourceSpec


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """A node as placement sees it. Free amounts are what its replicas' limits leave over."""

    id: NodeId
    free_memory_bytes: int
    free_cpus: float
    devices: tuple[str, ...] = ()


class Placed(msgspec.Struct, frozen=True):
    node: NodeId
    reason: str


class NotPlaced(msgspec.Struct, frozen=True):
    """No node fits; `reason` names each node and what it lacks."""

    reason: str


def place(
    nodes: tuple[NodeView, ...], resources: ResourceSpec, accelerator: tuple[str, ...]
) -> Placed | NotPlaced:
    """The first accelerator of the list that any node has, and among such nodes the one with most memory left.

    Memory is never promised twice. CPUs are: they are shared out by weight, so a full node is slow, not broken;
    the least loaded node wins a tie.
    """
    if not nodes:
        return NotPlaced("no node is connected")
    lacking: list[str] = []
    for wanted in accelerator:
        fitting: list[NodeView] = []
        for node in nodes:
            if wanted != "cpu" and wanted not in node.devices:
                lacking.append(f"{node.id} has no {wanted}")
            elif node.free_memory_bytes < resources.memory_bytes_max:
                free, needed = node.free_memory_bytes >> 20, resources.memory_bytes_max >> 20
                lacking.append(f"{node.id} has {free} MiB free, {needed} needed")
            else:
                fitting.append(node)
        if fitting:
            best = max(fitting, key=lambda node: (node.free_memory_bytes, node.free_cpus, node.id))
            return Placed(best.id, f"{wanted} on {best.id}")
    return NotPlaced("; ".join(lacking))

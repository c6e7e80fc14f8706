"""Where replicas go: preferences, reasons, and memory that is never promised twice."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from snowdrop.domain.ids import NodeId
from snowdrop.domain.service import ResourceSpec
from snowdrop.policy.placement import NodeView, NotPlaced, Placed, place

MIB = 1 << 20
devices = st.sets(st.sampled_from(["L4", "A10G", "H100"]), max_size=3).map(lambda found: tuple(sorted(found)))
memory = st.integers(0, 4_096).map(lambda count: count * MIB)


@st.composite
def node_lists(draw: st.DrawFn) -> tuple[NodeView, ...]:
    return tuple(
        NodeView(
            id=NodeId(f"node-{number}"), free_memory_bytes=draw(memory), free_cpus=draw(st.floats(-8, 8)),
            devices=draw(devices),
        )
        for number in range(draw(st.integers(0, 5)))
    )  # fmt: skip


needs = st.integers(64, 2_048).map(lambda count: ResourceSpec(memory_bytes_max=count * MIB))
wishes = st.lists(st.sampled_from(["L4", "A10G", "H100", "cpu"]), min_size=1, max_size=4, unique=True).map(tuple)


def has(node: NodeView, wanted: str) -> bool:
    return wanted == "cpu" or wanted in node.devices


@given(node_lists(), needs, wishes)
def test_places_on_the_first_wish_that_fits_or_names_all_that_lacks(
    nodes: tuple[NodeView, ...], resources: ResourceSpec, accelerator: tuple[str, ...]
) -> None:
    fitting = [
        [n.id for n in nodes if has(n, wanted) and n.free_memory_bytes >= resources.memory_bytes_max]
        for wanted in accelerator
    ]
    answer = place(nodes, resources, accelerator)
    first = next((found for found in fitting if found), [])
    if first:
        assert isinstance(answer, Placed)
        assert answer.node in first
        assert answer.node in answer.reason
    else:
        assert isinstance(answer, NotPlaced)
        assert all(node.id in answer.reason for node in nodes)
        assert answer.reason


@given(node_lists(), needs, st.integers(1, 100))
def test_memory_is_never_promised_twice(nodes: tuple[NodeView, ...], resources: ResourceSpec, count: int) -> None:
    left = {node.id: node for node in nodes}
    for _ in range(count):
        answer = place(tuple(left.values()), resources, ("cpu",))
        if isinstance(answer, NotPlaced):
            assert all(n.free_memory_bytes < resources.memory_bytes_max for n in left.values())
            break
        node = left[answer.node]
        left[answer.node] = msgspec.structs.replace(
            node, free_memory_bytes=node.free_memory_bytes - resources.memory_bytes_max
        )
    assert all(node.free_memory_bytes >= 0 for node in left.values())


def test_what_lacks_is_said_in_numbers() -> None:
    node = NodeView(id=NodeId("node-0"), free_memory_bytes=100 * MIB, free_cpus=1.0)
    answer = place((node,), ResourceSpec(memory_bytes_max=200 * MIB), ("L4", "cpu"))
    assert answer == NotPlaced("node-0 has no L4; node-0 has 100 MiB free, 200 needed")
    assert place((), ResourceSpec(), ("cpu",)) == NotPlaced("no node is connected")

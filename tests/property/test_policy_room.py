"""Making room: only what is idle and spare goes, only if it helps, and nothing that is not needed."""

from hypothesis import given
from hypothesis import strategies as st

from snowdrop.domain.ids import NodeId, ReplicaId
from snowdrop.domain.service import ResourceSpec
from snowdrop.policy.placement import NodeView, Placed, place
from snowdrop.policy.room import IdleReplica, make_room

GIB = 1 << 30
nodes = st.lists(st.integers(0, 8), min_size=1, max_size=3)


@st.composite
def idle(draw: st.DrawFn, count: int) -> tuple[IdleReplica, ...]:
    made = []
    for number in range(draw(st.integers(0, 8))):
        name = draw(st.sampled_from(["a", "b", "c"]))
        made.append(
            IdleReplica(
                id=ReplicaId(f"rep-{number}"),
                node=NodeId(f"node-{draw(st.integers(0, count - 1))}"),
                deployment=("t", name),
                memory_bytes=draw(st.integers(1, 8)) * GIB,
                cpus=1.0,
                idle_s=draw(st.floats(0.0, 1_000.0)),
                spare={"a": 0, "b": 1, "c": 8}[name],
                same_tenant=draw(st.booleans()),
            )
        )
    return tuple(made)


@given(st.data(), nodes, st.integers(1, 16))
def test_room_is_made_with_no_more_than_is_needed(data: st.DataObject, free: list[int], wanted: int) -> None:
    views = tuple(
        NodeView(id=NodeId(f"node-{n}"), free_memory_bytes=gib * GIB, free_cpus=4.0) for n, gib in enumerate(free)
    )
    replicas = data.draw(idle(len(free)))
    spec = ResourceSpec(memory_bytes_max=wanted * GIB)
    if isinstance(place(views, spec, ("cpu",)), Placed):
        return
    room = make_room(views, spec, ("cpu",), replicas)
    gone = [each for each in replicas if each.id in room.drain]
    assert len(gone) == len(room.drain) == len(set(room.drain))
    for name in {each.deployment for each in gone}:
        of = [each for each in gone if each.deployment == name]
        assert len(of) <= of[0].spare, "more than its deployment can spare"

    def freed(taken: list[IdleReplica]) -> tuple[NodeView, ...]:
        return tuple(
            NodeView(
                id=view.id,
                free_memory_bytes=view.free_memory_bytes + sum(r.memory_bytes for r in taken if r.node == view.id),
                free_cpus=view.free_cpus,
            )
            for view in views
        )

    if gone:
        assert isinstance(place(freed(gone), spec, ("cpu",)), Placed), "drained for nothing"
        for spared in gone:
            rest = [each for each in gone if each is not spared]
            assert not isinstance(place(freed(rest), spec, ("cpu",)), Placed), "one too many"
    else:
        alone = [each for each in replicas if each.spare >= 1]
        for each in alone:
            assert not isinstance(place(freed([each]), spec, ("cpu",)), Placed), "there was an easy way"


def test_ones_own_go_first_then_those_idle_for_longest() -> None:
    node = (NodeView(id=NodeId("n"), free_memory_bytes=0, free_cpus=4.0),)

    def one(name: str, idle_s: float, *, own: bool = False) -> IdleReplica:
        return IdleReplica(
            id=ReplicaId(name), node=NodeId("n"), deployment=("t", name), memory_bytes=GIB, cpus=1.0,
            idle_s=idle_s, spare=1, same_tenant=own,
        )  # fmt: skip

    spec = ResourceSpec(memory_bytes_max=GIB)
    assert make_room(node, spec, ("cpu",), (one("x", 5.0), one("y", 50.0))).drain == ("y",)
    assert make_room(node, spec, ("cpu",), (one("x", 5.0, own=True), one("y", 50.0))).drain == ("x",)
    assert make_room(node, spec, ("L4",), (one("x", 5.0),)).drain == (), "no memory makes a device"

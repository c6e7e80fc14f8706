"""What is called a deadlock is one, and every one is found: held against running the waits out."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from snowdrop.policy.deadlock import InnerWait, Target, blocked

NAMES = "abcd"


class World(msgspec.Struct, frozen=True):
    """Deployments with their leases, numbered through; calls that wait; which lease was made under which."""

    targets: dict[str, Target]
    waits: list[InnerWait[str]]
    parents: dict[int, int]

    def blocked(self) -> frozenset[str]:
        return blocked(self.targets, self.waits, self.parents)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    targets: dict[str, Target] = {}
    lease = 1
    for name in NAMES[: draw(st.integers(1, 4))]:
        count = draw(st.integers(0, 3))
        targets[name] = Target(slots_max=draw(st.integers(1, 3)), holders=tuple(range(lease, lease + count)))
        lease += count
    order = draw(st.permutations(range(1, lease)))  # a lease is made under one that was there before
    parents = {each: draw(st.sampled_from([0, *order[:place]])) for place, each in enumerate(order)}
    waits = draw(
        st.lists(
            st.builds(InnerWait, st.integers(1, max(1, lease - 1)), st.sampled_from(sorted(targets))), max_size=8
        )
    )
    return World(targets, waits, parents)


def run_out(world: World) -> set[str]:
    """Lets everything that can end, end, one thing at a time: what still waits then waits for ever."""
    held = {name: set(target.holders) for name, target in world.targets.items()}
    pending = list(world.waits)
    moved = True
    while moved:
        moved = False
        for wait in list(pending):
            if len(held[wait.target]) < world.targets[wait.target].slots_max:
                pending.remove(wait)  # it gets a slot, is answered, and gives it back
                moved = True
        alive = set().union(*held.values())
        waiting = {wait.parent for wait in pending} | {world.parents.get(each, 0) for each in alive}
        for leases in held.values():
            for lease in leases - waiting:
                leases.remove(lease)
                moved = True
    return {wait.target for wait in pending}


@given(worlds())
def test_the_blocked_are_those_whose_waits_never_end(world: World) -> None:
    waited_for = {wait.target for wait in world.waits}
    assert world.blocked() & waited_for == run_out(world)


@given(worlds())
def test_a_deployment_that_may_grow_is_never_blocked(world: World) -> None:
    for name in world.blocked():
        assert len(world.targets[name].holders) >= world.targets[name].slots_max


@given(worlds(), st.data())
def test_one_wait_less_blocks_nobody_more(world: World, data: st.DataObject) -> None:
    if world.waits:
        place = data.draw(st.integers(0, len(world.waits) - 1))
        fewer = World(world.targets, world.waits[:place] + world.waits[place + 1 :], world.parents)
        assert fewer.blocked() <= world.blocked()

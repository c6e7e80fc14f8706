"""What is called a deadlock is one, and every one is found: held against running the waits out."""

from hypothesis import given
from hypothesis import strategies as st

from snowdrop.policy.deadlock import InnerWait, Target, blocked

NAMES = "abcd"


@st.composite
def worlds(draw: st.DrawFn) -> tuple[dict[str, Target], list[InnerWait[str]]]:
    """Deployments with their leases, numbered through, and calls that wait."""
    targets: dict[str, Target] = {}
    lease = 1
    for name in NAMES[: draw(st.integers(1, 4))]:
        count = draw(st.integers(0, 3))
        targets[name] = Target(slots_max=draw(st.integers(1, 3)), holders=tuple(range(lease, lease + count)))
        lease += count
    waits = draw(
        st.lists(
            st.builds(InnerWait, st.integers(1, max(1, lease - 1)), st.sampled_from(sorted(targets))), max_size=8
        )
    )
    return targets, waits


def run_out(targets: dict[str, Target], waits: list[InnerWait[str]]) -> set[str]:
    """Lets everything that can end, end, one thing at a time: what still waits then waits for ever."""
    held = {name: set(target.holders) for name, target in targets.items()}
    pending = list(waits)
    moved = True
    while moved:
        moved = False
        for wait in list(pending):
            if len(held[wait.target]) < targets[wait.target].slots_max:
                pending.remove(wait)  # it gets a slot, is answered, and gives it back
                moved = True
        waiting = {wait.parent for wait in pending}
        for leases in held.values():
            for lease in list(leases):
                if lease not in waiting:
                    leases.remove(lease)
                    moved = True
    return {wait.target for wait in pending}


@given(worlds())
def test_the_blocked_are_those_whose_waits_never_end(
    world: tuple[dict[str, Target], list[InnerWait[str]]],
) -> None:
    targets, waits = world
    waited_for = {wait.target for wait in waits}
    assert blocked(targets, waits) & waited_for == run_out(targets, waits)


@given(worlds())
def test_a_deployment_that_may_grow_is_never_blocked(
    world: tuple[dict[str, Target], list[InnerWait[str]]],
) -> None:
    targets, waits = world
    for name in blocked(targets, waits):
        assert len(targets[name].holders) >= targets[name].slots_max


@given(worlds(), st.data())
def test_one_wait_less_blocks_nobody_more(
    world: tuple[dict[str, Target], list[InnerWait[str]]], data: st.DataObject
) -> None:
    targets, waits = world
    if waits:
        place = data.draw(st.integers(0, len(waits) - 1))
        fewer = waits[:place] + waits[place + 1 :]
        assert blocked(targets, fewer) <= blocked(targets, waits)

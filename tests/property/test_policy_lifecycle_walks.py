"""Random lives of a replica."""

from hypothesis import given
from hypothesis import strategies as st

from snowdrop.domain.replica import TERMINAL_STATES
from snowdrop.policy.lifecycle import Event, IllegalTransition, Instruction, ReplicaMachine, step


@given(st.lists(st.sampled_from(Event), max_size=40))
def test_no_walk_launches_twice_or_cleans_up_twice(events: list[Event]) -> None:
    machine = ReplicaMachine()
    done: list[Instruction] = []
    for at, event in enumerate(events):
        before = machine
        try:
            machine, instructions = step(machine, event, reason="", now_unix_ns=at)
        except IllegalTransition:
            continue  # the shell would crash; the machine itself has not moved
        done += instructions
        assert machine.version == before.version + (machine.state is not before.state)
    assert done.count(Instruction.LAUNCH) <= 1
    assert done.count(Instruction.ENSURE_CONTENT) <= 1
    assert done.count(Instruction.CLEAN_UP) == (machine.state in TERMINAL_STATES)
    if Instruction.LAUNCH in done:
        assert Instruction.ENSURE_CONTENT in done[: done.index(Instruction.LAUNCH)]

"""The replica's table: complete, ending, and launching once."""

import itertools

import pytest

from snowdrop.domain.replica import TERMINAL_STATES, ReplicaState
from snowdrop.policy.lifecycle import TABLE, Event, IllegalTransition, Instruction, ReplicaMachine, step

ALL = [(state, event) for state in ReplicaState for event in Event]


@pytest.mark.parametrize(("state", "event"), ALL)
def test_every_pair_has_a_row_or_is_refused_with_the_history(state: ReplicaState, event: Event) -> None:
    machine, _ = step(ReplicaMachine(), Event.MOUNT_BEGUN, reason="a node was found", now_unix_ns=1)
    machine = ReplicaMachine(state, "set by the test", machine.version, machine.history)
    if (state, event) in TABLE:
        after, instructions = step(machine, event, reason="because", now_unix_ns=2)
        assert (after.state, instructions) == TABLE[state, event]
        return
    with pytest.raises(IllegalTransition) as caught:
        step(machine, event, reason="because", now_unix_ns=2)
    for part in (str(event), str(state), "because", "a node was found"):
        assert part in str(caught.value)


@pytest.mark.parametrize("state", [state for state in ReplicaState if state not in TERMINAL_STATES])
def test_an_end_can_be_reached_from_every_living_state(state: ReplicaState) -> None:
    reached, pending = {state}, [state]
    while pending:
        now = pending.pop()
        for (before, _), (after, _) in TABLE.items():
            if before == now and after not in reached:
                reached.add(after)
                pending.append(after)
    assert reached & TERMINAL_STATES
    # A drain is a sure way out, whatever comes in between: no state ignores the order for good.
    assert (state, Event.DRAIN_ORDERED) in TABLE


@pytest.mark.parametrize("state", sorted(TERMINAL_STATES))
@pytest.mark.parametrize("event", Event)
def test_an_end_is_final(state: ReplicaState, event: Event) -> None:
    machine = ReplicaMachine(state, "ended")
    assert step(machine, event, reason="late", now_unix_ns=3) == (machine, ())


def test_a_living_replica_is_cleaned_up_exactly_when_it_ends() -> None:
    for (before, event), (after, instructions) in TABLE.items():
        if before in TERMINAL_STATES:
            continue
        ends = after in TERMINAL_STATES
        assert (Instruction.CLEAN_UP in instructions) == ends, f"{before} on {event}"


def test_the_history_says_when_and_why_and_the_version_counts_steps() -> None:
    machine = ReplicaMachine()
    walk = [Event.MOUNT_BEGUN, Event.CONTENT_LANDED, Event.IMPORTED, Event.SERVING]
    for at, event in enumerate(walk, start=1):
        machine, _ = step(machine, event, reason=f"step {at}", now_unix_ns=at)
    assert machine.state is ReplicaState.READY
    assert machine.version == 5
    assert [(t.unix_ns, t.reason) for t in machine.history] == [(at, f"step {at}") for at in (1, 2, 3, 4)]
    assert all(a.after == b.before for a, b in itertools.pairwise(machine.history))


def test_an_order_repeated_while_draining_changes_nothing() -> None:
    machine = ReplicaMachine(ReplicaState.DRAINING, "scaled down")
    assert step(machine, Event.DRAIN_ORDERED, reason="again", now_unix_ns=1) == (machine, ())

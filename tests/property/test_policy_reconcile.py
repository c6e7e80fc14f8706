"""Plans: exact counts, the right ones go, and a rollout never leaves nobody serving."""

from hypothesis import given
from hypothesis import strategies as st

from snowdrop.domain.ids import ReplicaId, RevisionId
from snowdrop.domain.replica import STARTING_STATES, ReplicaState
from snowdrop.policy.reconcile import Plan, ReplicaView, plan

CURRENT, OLD = RevisionId("rev-2"), RevisionId("rev-1")
living = st.sampled_from([*sorted(STARTING_STATES), ReplicaState.READY])


@st.composite
def fleets(draw: st.DrawFn, revisions: tuple[RevisionId, ...] = (CURRENT, OLD)) -> tuple[ReplicaView, ...]:
    return tuple(
        ReplicaView(
            id=ReplicaId(f"rep-{number}"),
            revision=draw(st.sampled_from(revisions)),
            state=draw(living),
            in_flight=draw(st.integers(0, 3)),
            age=number,
            draining_ordered=draw(st.booleans()),
        )
        for number in range(draw(st.integers(0, 8)))
    )


def made(fleet: tuple[ReplicaView, ...], desired: int, *, may_start: bool = True) -> Plan:
    return plan(fleet, current=CURRENT, desired=desired, may_start=may_start, reason="because")


@given(fleets(), st.integers(0, 10), st.booleans())
def test_the_count_of_the_current_revision_comes_out_exact(
    fleet: tuple[ReplicaView, ...], desired: int, may_start: bool
) -> None:
    answer = made(fleet, desired, may_start=may_start)
    drained = {order.replica for order in answer.drains}
    assert len(drained) == len(answer.drains)
    assert drained <= {view.id for view in fleet if not view.draining_ordered}
    ours = [v for v in fleet if v.revision == CURRENT and not v.draining_ordered]
    after = sum(1 for v in ours if v.id not in drained) + answer.starts
    assert after == desired if may_start else after == min(desired, len(ours))
    assert not (answer.starts and any(v.id in drained for v in ours)), "starts and drains the same revision"


@given(fleets((CURRENT,)), st.integers(0, 10))
def test_ready_replicas_stay_while_starting_ones_are_surplus(fleet: tuple[ReplicaView, ...], desired: int) -> None:
    drained = {order.replica for order in made(fleet, desired).drains}
    kept_starting = [
        v for v in fleet if v.state in STARTING_STATES and v.id not in drained and not v.draining_ordered
    ]
    if any(v.state is ReplicaState.READY and v.id in drained for v in fleet):
        assert not kept_starting


@given(fleets((CURRENT,)), st.integers(0, 10))
def test_idle_before_busy_and_young_before_old(fleet: tuple[ReplicaView, ...], desired: int) -> None:
    drained = {order.replica for order in made(fleet, desired).drains}
    ready = [v for v in fleet if v.state is ReplicaState.READY and not v.draining_ordered]
    gone = [(v.in_flight, -v.age) for v in ready if v.id in drained]
    kept = [(v.in_flight, -v.age) for v in ready if v.id not in drained]
    assert not gone or not kept or max(gone) < min(kept)


@given(fleets(), st.integers(1, 10), st.booleans())
def test_a_rollout_keeps_serving(fleet: tuple[ReplicaView, ...], desired: int, may_start: bool) -> None:
    answer = made(fleet, desired, may_start=may_start)
    drained = {order.replica for order in answer.drains}
    serving = [v for v in fleet if v.state is ReplicaState.READY and not v.draining_ordered]
    if serving:
        assert [v for v in serving if v.id not in drained]
    new_ready = any(v.revision == CURRENT for v in serving)
    old = [v for v in fleet if v.revision == OLD and not v.draining_ordered]
    for view in old:
        assert (view.id in drained) == (new_ready or view.state in STARTING_STATES)


@given(fleets())
def test_nothing_desired_drains_all(fleet: tuple[ReplicaView, ...]) -> None:
    answer = made(fleet, 0)
    assert answer.starts == 0
    assert {order.replica for order in answer.drains} == {v.id for v in fleet if not v.draining_ordered}


def test_drains_say_why() -> None:
    old = ReplicaView(id=ReplicaId("a"), revision=OLD, state=ReplicaState.READY, in_flight=0, age=1)
    new = ReplicaView(id=ReplicaId("b"), revision=CURRENT, state=ReplicaState.READY, in_flight=0, age=2)
    assert [order.reason for order in made((old, new), 1).drains] == ["a newer revision is ready"]
    assert [order.reason for order in made((new,), 0).drains] == ["because"]

"""What the decider of batches may never do, whatever it has learned."""

import math

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from snowdrop.domain.batching import Batch
from snowdrop.policy.batching import BatchState, Costs, Hold, Start, decide, next_gap_s

SECONDS = st.floats(min_value=0, max_value=30)
OBSERVED = st.lists(st.tuples(st.integers(1, 64), st.floats(min_value=1e-6, max_value=10)), max_size=30)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    return Batch(
        size_max=draw(st.integers(1, 64)),
        wait_ms_max=draw(st.floats(min_value=0, max_value=1_000)),
        in_flight_max=draw(st.integers(1, 4)),
    )


@st.composite
def states(draw: st.DrawFn) -> BatchState:
    oldest_wait_s = draw(SECONDS)
    return BatchState(
        waiting=draw(st.integers(0, 200)),
        running=draw(st.integers(0, 4)),
        oldest_wait_s=oldest_wait_s,
        since_arrival_s=draw(st.floats(min_value=0, max_value=oldest_wait_s)),
        gap_s=draw(SECONDS | st.just(math.inf)),
        slack_s=draw(st.floats(min_value=-10, max_value=100) | st.just(math.inf)),
    )


def learned(observed: list[tuple[int, float]]) -> Costs:
    costs = Costs()
    for size, seconds in observed:
        costs = costs.learned(size, seconds)
    return costs


@given(batches(), states(), OBSERVED)
def test_a_batch_is_never_empty_nor_too_large_nor_one_too_many(
    batch: Batch, state: BatchState, observed: list[tuple[int, float]]
) -> None:
    decision = decide(batch, state, learned(observed))
    assert decision.reason
    if isinstance(decision, Start):
        assert 1 <= decision.size <= min(state.waiting, batch.size_max)
        assert state.running < batch.in_flight_max


@given(batches(), states(), OBSERVED)
def test_nobody_is_held_back_beyond_the_bound_or_a_deadline(
    batch: Batch, state: BatchState, observed: list[tuple[int, float]]
) -> None:
    costs = learned(observed)
    decision = decide(batch, state, costs)
    if isinstance(decision, Hold) and state.waiting and state.running < batch.in_flight_max:
        assert 0 < decision.wait_s <= batch.wait_ms_max / 1e3 - state.oldest_wait_s + 1e-9
        assert decision.wait_s <= state.slack_s - costs.expected_s(state.waiting) + 1e-9


@given(batches(), states(), OBSERVED)
def test_a_full_batch_starts_at_once(batch: Batch, state: BatchState, observed: list[tuple[int, float]]) -> None:
    full = msgspec.structs.replace(state, waiting=batch.size_max + state.waiting, running=0)
    assert isinstance(decide(batch, full, learned(observed)), Start)


@given(batches(), states(), OBSERVED, SECONDS)
def test_rarer_requests_are_never_waited_for_longer(
    batch: Batch, state: BatchState, observed: list[tuple[int, float]], more_s: float
) -> None:
    costs = learned(observed)
    rarer = msgspec.structs.replace(state, gap_s=state.gap_s + more_s)
    if isinstance(decide(batch, state, costs), Start):
        assert isinstance(decide(batch, rarer, costs), Start)


@given(batches(), states())
def test_nothing_learned_is_no_reason_to_wait(batch: Batch, state: BatchState) -> None:
    free = msgspec.structs.replace(state, waiting=max(state.waiting, 1), running=0)
    assert isinstance(decide(batch, free, Costs()), Start)


@given(batches(), OBSERVED, st.integers(1, 200))
def test_a_hold_ends_by_itself(batch: Batch, observed: list[tuple[int, float]], waiting: int) -> None:
    """Asked again when its time is over, and nobody has come, the batch starts: no hold goes on for ever."""
    costs = learned(observed)
    state = BatchState(waiting=waiting, running=0, gap_s=0.0)
    for _ in range(8):
        decision = decide(batch, state, costs)
        if isinstance(decision, Start):
            return
        state = msgspec.structs.replace(
            state,
            oldest_wait_s=state.oldest_wait_s + decision.wait_s + 1e-9,
            since_arrival_s=state.since_arrival_s + decision.wait_s + 1e-9,
        )
    raise AssertionError(f"still held back: {decision}")


@given(st.floats(min_value=1e-4, max_value=1), st.floats(min_value=1e-6, max_value=0.1), st.data())
def test_the_line_is_found_from_calls_of_several_sizes(fixed_s: float, each_s: float, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 64), min_size=5, max_size=30).filter(lambda s: len(set(s[-5:])) > 1))
    costs = learned([(size, fixed_s + each_s * size) for size in sizes])
    for size in (1, 64):
        assert math.isclose(costs.expected_s(size), fixed_s + each_s * size, rel_tol=1e-3, abs_tol=1e-4)


@given(OBSERVED)
def test_costs_are_never_negative(observed: list[tuple[int, float]]) -> None:
    fixed_s, each_s = learned(observed).line()
    assert fixed_s >= 0
    assert each_s >= 0


@given(st.floats(min_value=1e-5, max_value=1), st.integers(1, 200))
def test_one_caller_after_the_other_is_never_held_back(service_s: float, rounds: int) -> None:
    """Its next request comes when the answer is there: the gap is the call's time, and waiting gains nothing."""
    costs, gap_s = Costs(), math.inf
    for _ in range(rounds):
        state = BatchState(waiting=1, running=0, gap_s=gap_s)
        assert isinstance(decide(Batch(), state, costs), Start)
        costs, gap_s = costs.learned(1, service_s), next_gap_s(gap_s, service_s)

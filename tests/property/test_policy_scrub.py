import math

from hypothesis import given
from hypothesis import strategies as st

from snowdrop.policy.scrub import (
    BUSY_S_MAX,
    BUSY_WAIT_S,
    IDLE_WAIT_S_MAX,
    PASS_INTERVAL_S,
    ScrubCandidate,
    next_pass,
    pause_s,
)

times = st.floats(0, 1e10)
candidate_lists = st.lists(times, max_size=8).map(
    lambda found: [ScrubCandidate(name=f"a{index}", scrubbed_unix_s=at) for index, at in enumerate(found)]
)


@given(candidate_lists, times)
def test_the_one_that_waited_longest_is_next_and_waits_are_bounded(
    candidates: list[ScrubCandidate], now: float
) -> None:
    plan = next_pass(candidates, now)
    assert plan.reason
    oldest = min((candidate.scrubbed_unix_s for candidate in candidates), default=math.inf)
    if plan.name is None:
        assert 0 < plan.wait_s <= IDLE_WAIT_S_MAX
        assert not candidates or now - oldest < PASS_INTERVAL_S
    else:
        assert {c.name: c.scrubbed_unix_s for c in candidates}[plan.name] == oldest


@given(st.lists(times, min_size=1, max_size=6), st.integers(1, 20))
def test_every_artefact_gets_its_turn(scrubbed: list[float], rounds: int) -> None:
    """Passes that end at once: whoever had its turn waits until all others had theirs."""
    now = max(scrubbed) + PASS_INTERVAL_S
    state = {f"a{index}": at for index, at in enumerate(scrubbed)}
    turns = []
    for _ in state:
        plan = next_pass([ScrubCandidate(name=n, scrubbed_unix_s=at) for n, at in state.items()], now)
        assert plan.name is not None
        turns.append(plan.name)
        state[plan.name] = now
    assert sorted(turns) == sorted(state)


@given(
    st.lists(st.tuples(st.integers(1, 4 << 20), st.floats(0, 5)), min_size=1, max_size=20), st.integers(1, 1 << 30)
)
def test_the_rate_is_never_exceeded(reads: list[tuple[int, float]], rate: int) -> None:
    took = sum(t + pause_s(size, t, rate, is_busy=False, busy_s=0.0) for size, t in reads)
    assert sum(size for size, _ in reads) <= took * rate * (1 + 1e-9) + 1


@given(st.integers(0, 4 << 20), st.floats(0, 5), st.integers(1, 1 << 30), st.floats(0, 2 * BUSY_S_MAX))
def test_a_busy_node_is_left_alone_for_a_bounded_time(read: int, took: float, rate: int, busy: float) -> None:
    pause = pause_s(read, took, rate, is_busy=True, busy_s=busy)
    assert pause >= pause_s(read, took, rate, is_busy=False, busy_s=0.0)
    assert (pause >= BUSY_WAIT_S) or busy >= BUSY_S_MAX

"""The idle time that is chosen: never dearer than any other, by the gaps that were seen."""

import math

from hypothesis import example, given
from hypothesis import strategies as st

from snowdrop.policy.idle import BUCKETS, GAP_S_MIN, GAPS_MIN, GROWTH, Gaps, choose, note_gap

gaps_s = st.lists(st.floats(0.0, 200_000.0), min_size=int(GAPS_MIN) + 4, max_size=60)
EDGES_S = [GAP_S_MIN * GROWTH**index for index in range(BUCKETS)]


def seen(values: list[float]) -> Gaps:
    made = Gaps()
    for value in values:
        made = note_gap(made, value)
    return made


def cost(gaps: Gaps, idle_s: float, price: float) -> float:
    """What keeping the last replica for `idle_s` costs for one gap, from its definition."""
    total = 0.0
    for edge_s, weight in zip(EDGES_S, gaps.weights, strict=True):
        waits = edge_s > idle_s
        total += weight * (min(edge_s, idle_s) + (price if waits else 0.0))
    return total / gaps.total


@given(gaps_s, st.floats(0.1, 300.0), st.floats(0.01, 1_000.0), st.floats(0.0, 100_000.0))
def test_no_other_time_is_cheaper(values: list[float], start_s: float, wait_price: float, other_s: float) -> None:
    gaps = seen(values)
    choice = choose(gaps, start_s=start_s, wait_price=wait_price, fallback_s=60.0)
    price = start_s * wait_price
    mine = cost(gaps, choice.idle_s, price)
    assert math.isclose(mine, choice.cost, rel_tol=1e-6)
    for candidate_s in (0.0, other_s, *EDGES_S):
        assert mine <= cost(gaps, candidate_s, price) * (1 + 1e-9) + 1e-6


@given(gaps_s, st.floats(0.1, 300.0), st.floats(0.01, 1_000.0), st.floats(1.0, 10.0))
def test_dearer_waiting_never_shortens_it(values: list[float], start_s: float, price: float, more: float) -> None:
    gaps = seen(values)
    cheap = choose(gaps, start_s=start_s, wait_price=price, fallback_s=60.0)
    dear = choose(gaps, start_s=start_s, wait_price=price * more, fallback_s=60.0)
    assert dear.idle_s >= cheap.idle_s - 1e-9


@given(st.lists(st.floats(0.0, 1e6), max_size=int(GAPS_MIN) - 1), st.floats(0.0, 1_000.0))
def test_until_enough_is_known_the_time_given_by_hand_holds(values: list[float], fallback_s: float) -> None:
    assert choose(seen(values), start_s=10.0, wait_price=10.0, fallback_s=fallback_s).idle_s == fallback_s


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=40))
@example([1.797693134862316e307])
def test_any_gap_leaves_a_bounded_histogram(values: list[float]) -> None:
    gaps = seen(values)
    assert len(gaps.weights) in {0, BUCKETS}
    assert all(weight >= 0 and math.isfinite(weight) for weight in gaps.weights)


def test_short_gaps_with_long_nights_are_bridged_and_nights_are_not() -> None:
    gaps = seen(([20.0] * 30 + [40_000.0]) * 3)
    choice = choose(gaps, start_s=10.0, wait_price=10.0, fallback_s=60.0)
    assert 20.0 <= choice.idle_s <= 25.0
    assert choice.cost < choice.cost_at_once
    assert choice.cost < choice.cost_always


def test_gaps_that_cost_more_to_bridge_than_a_start_are_not() -> None:
    assert choose(seen([500.0] * 30), start_s=2.0, wait_price=10.0, fallback_s=60.0).idle_s == 0.0

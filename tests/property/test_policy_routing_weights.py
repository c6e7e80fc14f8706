"""Weighted routing: parts come out as they should, without waiting and without catching up."""

from hypothesis import given
from hypothesis import strategies as st

from snowdrop.domain.ids import RevisionId
from snowdrop.policy.routing import Turns, whose_turn

A, B = RevisionId("rev-a"), RevisionId("rev-b")


def counted(weights: dict[RevisionId, float], rounds: int, turns: Turns | None = None) -> tuple[list[str], Turns]:
    turns, order = turns or Turns(), []
    for _ in range(rounds):
        chosen, turns = whose_turn(turns, weights, {A, B})
        assert chosen is not None
        order.append(chosen)
    return order, turns


@given(st.integers(1, 99), st.integers(1, 400))
def test_every_stretch_has_the_parts_that_were_asked_for(percent: int, rounds: int) -> None:
    order, _ = counted({A: 1 - percent / 100, B: percent / 100}, rounds)
    for end in range(1, rounds + 1):
        assert abs(order[:end].count(B) - end * percent / 100) <= 1.01


@given(st.integers(1, 300), st.integers(1, 50))
def test_one_that_had_no_slot_for_long_does_not_catch_up(alone: int, percent: int) -> None:
    weights = {A: 1 - percent / 100, B: percent / 100}
    turns = Turns()
    for _ in range(alone):
        chosen, turns = whose_turn(turns, weights, {A})
        assert chosen == A
    order, _ = counted(weights, 100, turns)
    assert order.count(B) <= percent + 2


@given(st.floats(0.001, 0.999), st.sets(st.sampled_from([A, B])))
def test_nobody_waits_beside_a_free_slot(part: float, free: set[RevisionId]) -> None:
    chosen, _ = whose_turn(Turns(), {A: 1 - part, B: part}, free)
    assert (chosen in free) if free else chosen is None


def test_a_weight_of_nothing_gets_nothing() -> None:
    assert whose_turn(Turns(), {A: 1.0, B: 0.0}, {B}) == (None, Turns())

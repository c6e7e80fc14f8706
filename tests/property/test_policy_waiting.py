"""Admission, forecasts of a turn, and the time to come back: bounds, monotony, and that the forecast is right."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snowdrop.domain.service import QueueSpec
from snowdrop.policy.admission import Admit, Refuse, admit, come_back_s, spread_s
from snowdrop.policy.waiting import (
    RETRY_AFTER_S_MAX,
    RETRY_AFTER_S_MIN,
    RETRY_AFTER_UNKNOWN_S,
    Outlook,
    latest_turn_s,
    percent,
    retry_after_s,
    start_left_s,
    turn_s,
)

outlooks = st.builds(
    Outlook,
    slots=st.integers(0, 20),
    service_s=st.just(0.0) | st.floats(0.001, 100),
    drained_per_s=st.just(0.0) | st.floats(0.001, 1_000),
    coming_s=st.lists(st.floats(0, 300), max_size=4).map(lambda times: tuple(sorted(times))),
    coming_slots=st.integers(1, 8),
)


@given(outlooks, st.integers(0, 200), st.integers(0, 50))
def test_who_is_further_behind_waits_no_shorter(outlook: Outlook, ahead: int, more: int) -> None:
    near, far = turn_s(outlook, ahead), turn_s(outlook, ahead + more)
    assert (near is None) == (far is None)
    if near is not None and far is not None:
        assert 0 <= near <= far
        assert math.isfinite(far)


@given(outlooks, st.integers(0, 200), st.floats(0, 300))
def test_a_further_replica_makes_no_wait_longer(outlook: Outlook, ahead: int, ready_s: float) -> None:
    before = turn_s(outlook, ahead)
    coming = tuple(sorted((*outlook.coming_s, ready_s)))
    after = turn_s(
        Outlook(
            slots=outlook.slots,
            service_s=outlook.service_s,
            drained_per_s=outlook.drained_per_s,
            coming_s=coming,
            coming_slots=outlook.coming_slots,
        ),
        ahead,
    )
    assert after is not None
    if before is not None and (outlook.service_s or (outlook.slots and outlook.drained_per_s)):
        assert after <= before + 1e-6


@given(st.integers(1, 8), st.floats(0.1, 10), st.integers(0, 50), st.floats(0, 60), st.integers(1, 4))
def test_the_forecast_is_what_happens_with_steady_work(
    slots: int, service_s: float, ahead: int, ready_s: float, coming: int
) -> None:
    """Every slot gives one turn each `service_s`: the forecast may be off by one service time, not by more."""
    outlook = Outlook(slots=slots, service_s=service_s, coming_s=(ready_s,), coming_slots=coming)
    expected_s = turn_s(outlook, ahead)
    assert expected_s is not None
    turns = sorted(
        [(round_ + 1) * service_s for _ in range(slots) for round_ in range(ahead + 1)]
        + [ready_s + round_ * service_s for _ in range(coming) for round_ in range(ahead + 1)]
    )
    assert abs(turns[ahead] - expected_s) <= service_s + 1e-6


@given(outlooks, st.integers(0, 100))
def test_the_latest_turn_is_at_most_a_service_time_later(outlook: Outlook, ahead: int) -> None:
    soon, late = turn_s(outlook, ahead), latest_turn_s(outlook, ahead)
    assert (soon is None) == (late is None)
    if soon is not None and late is not None:
        assert soon <= late <= soon + outlook.service_s


@given(
    st.integers(1, 8),
    st.floats(0.1, 10),
    st.integers(0, 50),
    st.lists(st.floats(0, 60), max_size=3),
    st.integers(1, 4),
)
def test_by_the_latest_turn_it_has_come_however_the_slots_are_taken(
    slots: int, service_s: float, ahead: int, ready_s: list[float], coming: int
) -> None:
    outlook = Outlook(slots=slots, service_s=service_s, coming_s=tuple(sorted(ready_s)), coming_slots=coming)
    late = latest_turn_s(outlook, ahead)
    assert late is not None
    turns = sorted(
        [(round_ + 1) * service_s for _ in range(slots) for round_ in range(ahead + 1)]
        + [at_s + round_ * service_s for at_s in ready_s for _ in range(coming) for round_ in range(ahead + 1)]
    )
    assert turns[ahead] <= late + 1e-3 * service_s


@given(st.lists(st.floats(1, 60), min_size=1, max_size=60), st.integers(0, 6), st.integers(1, 6), st.floats(0, 5))
def test_those_who_are_told_to_come_back_do_not_come_all_at_once(
    told: list[float], slots: int, length_max: int, service_s: float
) -> None:
    promises: list[float] = []
    for each in told:
        later_s = spread_s(each, promises, slots=slots, length_max=length_max, service_s=service_s, now_s=100.0)
        assert RETRY_AFTER_S_MIN <= later_s <= RETRY_AFTER_S_MAX
        assert later_s >= min(each, RETRY_AFTER_S_MAX) - 1e-3
        promises.append(100.0 + later_s)
    assert promises == sorted(promises)
    for at_s in set(promises) - {100.0 + RETRY_AFTER_S_MAX}:
        assert promises.count(at_s) <= slots + length_max


def test_forecasts_said_one_by_one() -> None:
    assert turn_s(Outlook(slots=0), 0) is None, "nothing tells"
    assert turn_s(Outlook(slots=0, coming_s=(7.0,)), 0) == 7.0
    assert turn_s(Outlook(slots=0, coming_s=(7.0,), service_s=2.0), 1) == 9.0
    assert turn_s(Outlook(slots=4, service_s=2.0), 3) == 2.0
    assert turn_s(Outlook(slots=4, drained_per_s=2.0), 3) == 2.0
    assert turn_s(Outlook(slots=4, drained_per_s=0.0), 3) is None


@given(
    st.integers(1, 50),
    st.integers(0, 100),
    st.integers(0, 50),
    st.none() | st.floats(0, 1e4),
    st.just(0.0) | st.floats(0.1, 1e4),
    outlooks,
)
def test_admission_holds_the_bound_and_tells_a_bounded_time(
    length_max: int, waiting: int, promised: int, asked_s: float | None, waited_s: float, outlook: Outlook
) -> None:
    queue = QueueSpec(length_max=length_max, wait_s_max=1_000.0)
    verdict = admit(
        queue,
        lambda: outlook,
        waiting=waiting,
        promised=promised,
        wait_s_max=asked_s,
        waited_s=waited_s,
        now_s=5.0,
    )
    if waiting < length_max or waited_s:
        longest_s = min(1_000.0, asked_s if asked_s is not None else 1_000.0)
        assert verdict == Admit(5.0 + max(0.0, longest_s - waited_s))
    else:
        assert isinstance(verdict, Refuse)
        assert RETRY_AFTER_S_MIN <= verdict.retry_after_s <= RETRY_AFTER_S_MAX
        assert verdict.retry_after_s == int(verdict.retry_after_s)
        assert verdict.retry_after_s >= min(turn_s(outlook, promised) or 0.0, RETRY_AFTER_S_MAX)


@pytest.mark.parametrize(
    ("expected_s", "told_s"),
    [(None, RETRY_AFTER_UNKNOWN_S), (0.0, 1.0), (-5.0, 1.0), (7.2, 8.0), (1e9, RETRY_AFTER_S_MAX)],
)
def test_times_to_come_back(expected_s: float | None, told_s: float) -> None:
    assert retry_after_s(expected_s) == told_s


def test_who_waited_in_vain_comes_back_when_as_long_a_wait_is_enough() -> None:
    starting = Outlook(slots=0, coming_s=(30.0,))
    assert come_back_s(starting, waiting=0, wait_s_max=5.0) == 25.0
    assert come_back_s(starting, waiting=0, wait_s_max=60.0) == RETRY_AFTER_S_MIN
    assert come_back_s(Outlook(slots=0), waiting=0, wait_s_max=5.0) == RETRY_AFTER_UNKNOWN_S


@given(st.floats(0, 1e6), st.none() | st.floats(0, 1e6))
def test_a_percentage_is_below_a_hundred_until_it_is_over(waited_s: float, expected_s: float | None) -> None:
    shown = percent(waited_s, expected_s)
    assert shown is None if expected_s is None else shown is not None and 0 <= shown <= 99


def test_a_start_that_takes_longer_than_usual_is_measured_by_the_slow_ones() -> None:
    assert start_left_s(2.0, start_s=10.0, start_high_s=30.0) == 8.0
    assert start_left_s(12.0, start_s=10.0, start_high_s=30.0) == 18.0
    assert start_left_s(31.0, start_s=10.0, start_high_s=30.0) is None
    assert start_left_s(1.0, start_s=0.0, start_high_s=0.0) is None

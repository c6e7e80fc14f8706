"""Laws of the autoscaler over any history of load."""

import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from snowdrop.domain.service import Scale
from snowdrop.policy.autoscale import AutoscaleDecision, AutoscaleInput, AutoscaleState, decide

counts = st.integers(0, 200)
steps = st.tuples(st.floats(0.01, 20.0), counts, counts, st.integers(0, 300), st.integers(0, 5), st.integers(0, 5))
histories = st.lists(steps, min_size=1, max_size=25)


@st.composite
def scales(draw: st.DrawFn) -> Scale:
    low = draw(st.integers(0, 5))
    panic_s = draw(st.floats(0.5, 10.0))
    return Scale(
        min=low,
        max=draw(st.integers(max(1, low), 30)),
        idle_s=draw(st.floats(0.0, 60.0)),
        target=draw(st.floats(0.1, 1.0)),
        panic_window_s=panic_s,
        stable_window_s=panic_s * draw(st.floats(1.0, 20.0)),
    )


def run(
    scale: Scale, history: list[tuple[float, int, int, int, int, int]], concurrency: int, more_load: int = 0
) -> list[AutoscaleDecision]:
    state, now_s, made = AutoscaleState(), 0.0, []
    for elapsed_s, in_flight, queued, peak, ready, starting in history:
        now_s += elapsed_s
        seen = AutoscaleInput(
            in_flight=in_flight + more_load,
            queued=queued,
            peak=max(peak, in_flight + queued) + more_load,
            ready=ready,
            starting=starting,
            concurrency=concurrency,
            scale=scale,
        )
        state, decision = decide(state, seen, now_s)
        made.append(decision)
    return made


def starts(decision: AutoscaleDecision, step: tuple[float, int, int, int, int, int]) -> int:
    return max(0, decision.desired - step[4] - step[5])


@given(scales(), histories, st.integers(1, 50))
def test_never_outside_of_min_and_max(scale: Scale, history: list, concurrency: int) -> None:
    for decision in run(scale, history, concurrency):
        assert scale.min <= decision.desired <= scale.max


@given(scales(), histories, st.integers(1, 50), st.integers(1, 100))
def test_more_load_never_gives_fewer(scale: Scale, history: list, concurrency: int, more: int) -> None:
    less = run(scale, history, concurrency)
    greater = run(scale, history, concurrency, more_load=more)
    for low, high in zip(less, greater, strict=True):
        assert low.desired <= high.desired


@settings(deadline=None)
@given(scales(), histories, st.integers(1, 50), st.integers(1, 20))
def test_more_starting_replicas_never_start_more(scale: Scale, history: list, concurrency: int, more: int) -> None:
    # Panic is measured against a capacity, so at least one replica is there or on its way after the first look.
    history = [history[0], *((*step[:5], step[5] + 1) for step in history[1:])]
    # The first look is the same: one that finds replicas without a history takes them for just used.
    with_more = [history[0], *((*step[:5], step[5] + more) for step in history[1:])]
    for few, many, step, step_more in zip(
        run(scale, history, concurrency), run(scale, with_more, concurrency), history, with_more, strict=True
    ):
        assert starts(many, step_more) <= starts(few, step)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 150), st.integers(1, 40), st.floats(0.2, 1.0), st.floats(0.1, 3.0))
def test_constant_load_settles_on_what_it_needs(load: int, concurrency: int, target: float, tick_s: float) -> None:
    scale = Scale(max=1_000, target=target, stable_window_s=20.0, panic_window_s=2.0)
    state, now_s, desired, settled = AutoscaleState(), 0.0, 0, []
    while now_s < 90.0:
        seen = AutoscaleInput(
            in_flight=load, queued=0, peak=load, ready=desired, starting=0, concurrency=concurrency, scale=scale
        )
        state, decision = decide(state, seen, now_s)
        desired = decision.desired
        if now_s > 45.0:
            settled.append(desired)
        now_s += tick_s
    assert len(set(settled)) == 1, "it flaps"
    assert abs(settled[0] - load / max(1.0, concurrency * target) - 0.5) <= 0.5 + 1e-5


@given(scales(), st.integers(1, 500), st.integers(1, 50))
def test_from_zero_the_first_look_starts_enough_for_the_burst(scale: Scale, burst: int, concurrency: int) -> None:
    (decision,) = run(scale, [(1.0, 0, burst, burst, 0, 0)], concurrency)
    assert decision.desired >= min(scale.max, math.ceil(burst / concurrency))


@given(scales(), histories, st.integers(1, 50))
def test_panic_never_lowers_while_it_lasts(scale: Scale, history: list, concurrency: int) -> None:
    made = run(scale, history, concurrency)
    for before, after in itertools.pairwise(made):
        # One that begins anew at this look may have had an end before it.
        if before.panicking and after.panicking and not after.holds_anew and after.load > 0:
            floor = min(scale.max, math.ceil(before.panic_load / max(1.0, concurrency * scale.target)))
            assert after.desired >= floor

from hypothesis import given
from hypothesis import strategies as st

from snowdrop.policy.pool import (
    AVAILABLE_SHARE_KEPT,
    AVAILABLE_SHARE_MIN,
    PRESSURE_SHARE_MAX,
    PoolState,
    decide,
)

MIB = 1 << 20
amounts = st.integers(0, 64 << 30)


@st.composite
def states(draw: st.DrawFn) -> PoolState:
    machine = draw(st.integers(1 << 30, 128 << 30))
    return PoolState(
        target_bytes=draw(amounts),
        idle_bytes=draw(amounts),
        area_bytes=draw(amounts),
        limit_bytes=draw(amounts),
        step_bytes=draw(st.sampled_from([2 * MIB, 64 * MIB, 1024 * MIB])),
        machine_bytes=machine,
        available_bytes=draw(st.integers(0, machine)),
        pressure_share=draw(st.floats(0, 1)),
        is_busy=draw(st.booleans()),
    )


@given(states())
def test_it_never_grows_past_a_bound_under_pressure_or_during_a_load(state: PoolState) -> None:
    decision = decide(state)
    assert decision.reason
    assert decision.change_bytes >= -state.idle_bytes
    if decision.change_bytes > 0:
        assert not state.is_busy
        assert state.pressure_share <= PRESSURE_SHARE_MAX
        assert state.idle_bytes + decision.change_bytes <= state.target_bytes
        assert state.idle_bytes + state.area_bytes + decision.change_bytes <= state.limit_bytes
        left = state.available_bytes - decision.change_bytes
        assert left >= state.machine_bytes * AVAILABLE_SHARE_KEPT


@given(states())
def test_under_pressure_it_gives_back_until_nothing_is_idle_and_then_asks_for_an_area(state: PoolState) -> None:
    scarce = state.available_bytes < state.machine_bytes * AVAILABLE_SHARE_MIN
    decision = decide(state)
    if scarce or state.pressure_share > PRESSURE_SHARE_MAX:
        assert decision.evict == (state.idle_bytes == 0)
        assert (decision.change_bytes < 0) == (state.idle_bytes > 0)
    else:
        assert not decision.evict


@given(states())
def test_without_pressure_it_comes_to_rest_within_a_step_of_what_is_wanted(state: PoolState) -> None:
    still = PoolState(
        target_bytes=state.target_bytes % (4 << 30),
        idle_bytes=state.idle_bytes % (8 << 30),
        area_bytes=state.area_bytes % (4 << 30),
        limit_bytes=state.limit_bytes % (16 << 30),
        step_bytes=64 * MIB,
        machine_bytes=1 << 40,
        available_bytes=1 << 40,
        pressure_share=0.0,
        is_busy=False,
    )
    idle = still.idle_bytes
    for _ in range(200):
        change = decide(
            PoolState(**{name: getattr(still, name) for name in still.__struct_fields__} | {"idle_bytes": idle})
        ).change_bytes
        if change == 0:
            break
        idle += change
    wanted = max(0, min(still.target_bytes, still.limit_bytes - still.area_bytes))
    assert change == 0
    assert wanted - still.step_bytes < idle <= wanted or idle == wanted == 0

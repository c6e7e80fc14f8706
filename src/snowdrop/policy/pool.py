"""How much memory the data plane keeps ready for landing areas. Pure."""

from __future__ import annotations

import msgspec

PRESSURE_SHARE_MAX = 0.10
"""Part of the last ten seconds in which some task waited for memory; above it, idle memory is given back."""
AVAILABLE_SHARE_MIN = 1 / 16
"""Of the machine's memory: with less available, idle memory is given back."""
AVAILABLE_SHARE_KEPT = 1 / 8
"""Of the machine's memory: what growing leaves available."""
SHRINK_SHARE = 1 / 4
"""Of the idle bytes, given back at a time under pressure."""


class PoolState(msgspec.Struct, frozen=True, kw_only=True):
    """What is known when the pool is looked at.

    `idle_bytes` are in slabs of no area, `area_bytes` in those of areas, `limit_bytes` bounds both together.
    `step_bytes` is the size of the slab that would be made next, `pressure_share` the kernel's `some avg10` / 100.
    """

    target_bytes: int
    idle_bytes: int
    area_bytes: int
    limit_bytes: int
    step_bytes: int
    machine_bytes: int
    available_bytes: int
    pressure_share: float
    is_busy: bool


class PoolDecision(msgspec.Struct, frozen=True, kw_only=True):
    """`change_bytes` > 0: make and touch a slab of so many bytes; < 0: give back idle slabs up to so many.

    `evict` asks for one unused area to be dropped: the pool itself has nothing left to give.
    """

    change_bytes: int
    evict: bool
    reason: str


def decide(state: PoolState) -> PoolDecision:
    """What to do with the pool now; one step, to be asked again."""
    scarce = state.available_bytes < state.machine_bytes * AVAILABLE_SHARE_MIN
    if scarce or state.pressure_share > PRESSURE_SHARE_MAX:
        wanted = max(state.step_bytes, int(state.idle_bytes * SHRINK_SHARE))
        back = min(state.idle_bytes, wanted)
        reason = "memory is scarce" if scarce else "tasks wait for memory"
        return PoolDecision(change_bytes=-back, evict=back == 0, reason=reason)
    target = max(0, min(state.target_bytes, state.limit_bytes - state.area_bytes))
    if state.idle_bytes > target:
        return _still(state.idle_bytes - target, "more is idle than is to be kept")
    if state.idle_bytes + state.step_bytes > target:
        return _still(0, "the pool is full")
    if state.is_busy:
        return _still(0, "a load is under way")
    if state.available_bytes - state.step_bytes < state.machine_bytes * AVAILABLE_SHARE_KEPT:
        return _still(0, "the machine's memory is needed elsewhere")
    return PoolDecision(change_bytes=state.step_bytes, evict=False, reason="below the target")


def _still(back_bytes: int, reason: str) -> PoolDecision:
    return PoolDecision(change_bytes=-back_bytes, evict=False, reason=reason)

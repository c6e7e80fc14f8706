"""What would have changed a decision: the decider, run again on altered signals. Pure.

Nothing here knows the rules. Each alternative changes one signal, asks `judge`, and tells what it says; where the
question is "how much", the least change is searched for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from snowdrop.policy.autoscale.decide import AutoscaleDecision, Signals, judge

MORE_MAX = 100_000
"""No more requests than this are tried when it is asked how many would start another replica."""

replace = msgspec.structs.replace


class Alternative(msgspec.Struct, frozen=True, kw_only=True):
    """With `change`, `desired` replicas instead of those decided; `text` says it in a sentence."""

    change: str
    desired: int
    text: str


def alternatives(signals: Signals) -> tuple[Alternative, ...]:
    """The changes that would have made a difference, the most telling first."""
    decided = judge(signals)
    found = [*_bounds(signals, decided), *_load(signals, decided), *_time(signals, decided)]
    return tuple(found)


def _bounds(signals: Signals, decided: AutoscaleDecision) -> Iterator[Alternative]:
    bounds = signals.bounds
    free = judge(replace(signals, bounds=replace(bounds, max=MORE_MAX)))
    if free.desired > decided.desired:
        # The least maximum that gives all that is wanted.
        yield _made(
            f"max={free.desired}",
            free.desired,
            f"with max={free.desired} it would be {free.desired}: {free.reason}",
        )
    if bounds.min > 0:
        lower = judge(replace(signals, bounds=replace(bounds, min=0)))
        if lower.desired < decided.desired:
            yield _made("min=0", lower.desired, f"with min=0 it would be {lower.desired}")
    if bounds.buffer > 0:
        lower = judge(replace(signals, bounds=replace(bounds, buffer=0)))
        if lower.desired < decided.desired:
            yield _made("buffer=0", lower.desired, f"without the buffer it would be {lower.desired}")
    if signals.room is not None:
        lower = judge(replace(signals, room=None))
        if lower.desired > decided.desired:
            yield _made("room", lower.desired, f"had it not made room for others it would be {lower.desired}")


def _load(signals: Signals, decided: AutoscaleDecision) -> Iterator[Alternative]:
    more = _least(lambda n: judge(_waiting(signals, n)).desired > decided.desired, MORE_MAX)
    if more is not None:
        desired = judge(_waiting(signals, more)).desired
        text = f"{more} more waiting {_requests(more)} would make it {desired}"
        if more > 1 and desired == decided.desired + 1:
            text = f"{more} more waiting requests would start another"
        yield _made(f"queued+{more}", desired, text)
    steady = _least(lambda n: judge(_steady(signals, n)).desired > decided.desired, MORE_MAX)
    if steady is not None:
        desired = judge(_steady(signals, steady)).desired
        text = f"{steady} more {_requests(steady)} in flight all the time would make it {desired}"
        yield _made(f"in_flight+{steady}", desired, text)
    if signals.load > 0:
        none = judge(_without_load(signals))
        if none.desired < decided.desired:
            yield _made("in_flight=0", none.desired, f"without requests it would be {none.desired} now")


def _time(signals: Signals, decided: AutoscaleDecision) -> Iterator[Alternative]:
    if signals.hold > 0:
        lower = judge(replace(signals, hold=0, hold_left_s=0.0))
        if lower.desired < decided.desired:
            left_s = signals.hold_left_s
            text = f"it scales down to {lower.desired} in {left_s:.0f} s unless there is another burst"
            yield _made("hold", lower.desired, text)
    if signals.idle_for_s is not None and signals.idle_for_s < signals.idle_s:
        gone = judge(replace(signals, idle_for_s=signals.idle_s))
        if gone.desired < decided.desired:
            left_s = signals.idle_s - signals.idle_for_s
            yield _made(
                "idle", gone.desired, f"it scales down to {gone.desired} in {left_s:.0f} s unless a request comes"
            )
    if decided.rule == "slack":
        lower = judge(replace(signals, previous=0))
        if lower.desired < decided.desired:
            yield _made("previous=0", lower.desired, f"starting from nothing it would be {lower.desired}")


def _waiting(signals: Signals, more: int) -> Signals:
    return replace(
        signals, queued=signals.queued + more, peak=signals.peak + more, idle_for_s=None, ever_busy=True
    )


def _steady(signals: Signals, more: int) -> Signals:
    return replace(
        signals,
        in_flight=signals.in_flight + more,
        peak=signals.peak + more,
        stable_load=signals.stable_load + more,
        panic_load=signals.panic_load + more,
        idle_for_s=None,
        ever_busy=True,
    )


def _without_load(signals: Signals) -> Signals:
    quiet = replace(signals, in_flight=0, queued=0, peak=0, arriving_per_s=0.0, idle_for_s=0.0)
    return replace(quiet, stable_load=0.0, panic_load=0.0, hold=0, previous=0)


def _least(holds: Callable[[int], bool], most: int) -> int | None:
    """The least n from 1 to `most` for which `holds`, which is monotone; None if there is none."""
    if not holds(most):
        return None
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _made(change: str, desired: int, text: str) -> Alternative:
    return Alternative(change=change, desired=desired, text=text)


def _requests(count: int) -> str:
    return "request" if count == 1 else "requests"

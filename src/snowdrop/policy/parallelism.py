"""How many connections to the origin are used at a time, and how much each asks for, from what was measured.

Connections are added while that pays and taken away while that costs nothing: several are needed on a link with
delay, few on a free one, where more would only burn the processor that hashes what they bring.
"""

from __future__ import annotations

from typing import Literal

import msgspec

MIB = 1 << 20
CONNECTIONS_START = 4
RANGE_BYTES_START = 2 * MIB
"""Small while nothing is known: what comes first should not share the link with large reads of later bytes."""
RAMP_GAIN_MIN = 0.15
"""Doubling pays if it brings at least so much more."""
STEP_GAIN_MIN = 0.02
STEP_GAIN_SHARE = 0.3
"""One more pays if it brings at least this share of what a perfect one would."""
LOSS_MAX = 0.02
"""One less is free if it costs at most so much of the best rate."""
WINDOW_S_MIN = 0.001
HOLD_WINDOWS_FIRST = 4
HOLD_WINDOWS_MAX = 64
SATURATED_SHARE = 0.7
"""Windows in which fewer of the connections were busy say nothing about how many are needed."""
DELAY_FACTOR = 16.0
RANGE_S_MIN = 0.02
"""A range takes so long on its connection, or DELAY_FACTOR times the wait for its first byte if that is longer."""

Phase = Literal["ramp", "hold", "up", "down"]


class ParallelismLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of both answers. Ranges are powers of two."""

    connections_max: int
    connections_min: int = 1
    range_bytes_min: int = MIB
    range_bytes_max: int = 16 * MIB


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured since the last decision. `in_flight` and `first_byte_s` are means.

    `throttled` counts answers that asked to slow down.
    """

    bytes: int
    elapsed_s: float
    in_flight: float
    first_byte_s: float
    throttled: int = 0


class Steering(msgspec.Struct, frozen=True, kw_only=True):
    """The decision in force, and what the next one needs. `best_bytes_per_s` 0 is: nothing known yet."""

    connections: int
    range_bytes: int
    reason: str
    phase: Phase = "ramp"
    previous: int = 0
    best_bytes_per_s: float = 0.0
    held: int = 0
    hold_windows: int = HOLD_WINDOWS_FIRST
    went_down: bool = False


def start(limits: ParallelismLimits) -> Steering:
    """Before anything is measured."""
    return Steering(
        connections=_bounded(limits, CONNECTIONS_START),
        range_bytes=_power_of_two(limits, RANGE_BYTES_START),
        reason="nothing measured yet",
    )


def steer(limits: ParallelismLimits, now: Steering, window: Window) -> Steering:
    """The decision for the next window."""
    if window.throttled:
        fewer = _bounded(limits, now.connections // 2)
        return _hold(now, fewer, 0.0, f"the origin asked to slow down {window.throttled} times", longer=True)
    if window.bytes <= 0 or window.elapsed_s < WINDOW_S_MIN:
        return now
    if window.in_flight < SATURATED_SHARE * now.connections:
        return _changed(now, reason=f"only {window.in_flight:.1f} of {now.connections} connections were busy")
    rate = window.bytes / window.elapsed_s
    sized = _changed(now, range_bytes=_range_bytes(limits, rate / now.connections, window.first_byte_s))
    match now.phase:
        case "ramp":
            return _ramp(limits, sized, rate)
        case "up":
            return _judge_up(limits, sized, rate)
        case "down":
            return _judge_down(limits, sized, rate)
        case "hold":
            return _stay(limits, sized, rate)


def _ramp(limits: ParallelismLimits, now: Steering, rate: float) -> Steering:
    if now.best_bytes_per_s and rate < now.best_bytes_per_s * (1 + RAMP_GAIN_MIN):
        return _hold(now, now.previous, now.best_bytes_per_s, f"{now.connections} were no faster", longer=False)
    more = _bounded(limits, now.connections * 2)
    if more == now.connections:
        return _hold(now, more, rate, "at the most there may be", longer=False)
    return _changed(
        now, connections=more, previous=now.connections, best_bytes_per_s=rate, reason="doubled to see if it pays"
    )


def _judge_up(limits: ParallelismLimits, now: Steering, rate: float) -> Steering:
    gain = max(STEP_GAIN_MIN, STEP_GAIN_SHARE / now.previous)
    if rate < now.best_bytes_per_s * (1 + gain):
        return _hold(now, now.previous, now.best_bytes_per_s, f"{now.connections} were no faster", longer=True)
    return _try(limits, now, "up", rate) or _hold(now, now.connections, rate, "one more paid", longer=False)


def _judge_down(limits: ParallelismLimits, now: Steering, rate: float) -> Steering:
    best = now.best_bytes_per_s
    if rate < best * (1 - LOSS_MAX):
        return _hold(now, now.previous, best, f"{now.connections} were slower", longer=True)
    return _try(limits, now, "down", max(best, rate)) or _hold(
        now, now.connections, best, "as few as there may be", longer=True
    )


def _stay(limits: ParallelismLimits, now: Steering, rate: float) -> Steering:
    best = rate if now.best_bytes_per_s == 0 else 0.7 * now.best_bytes_per_s + 0.3 * rate
    if now.held + 1 < now.hold_windows:
        return _changed(now, held=now.held + 1, best_bytes_per_s=best, reason="steady")
    first: Phase = "up" if now.went_down else "down"
    second: Phase = "down" if now.went_down else "up"
    return (
        _try(limits, now, first, best)
        or _try(limits, now, second, best)
        or _changed(now, held=0, best_bytes_per_s=best, reason="only one number is allowed")
    )


def _try(limits: ParallelismLimits, now: Steering, way: Phase, best: float) -> Steering | None:
    other = _bounded(limits, now.connections + (1 if way == "up" else -1))
    if other == now.connections:
        return None
    return _changed(
        now,
        connections=other,
        previous=now.connections,
        phase=way,
        best_bytes_per_s=best,
        went_down=way == "down",
        reason=f"one {'more' if way == 'up' else 'less'} to see what it does",
    )


def _hold(now: Steering, connections: int, best: float, reason: str, *, longer: bool) -> Steering:
    windows = min(now.hold_windows * 2, HOLD_WINDOWS_MAX) if longer else HOLD_WINDOWS_FIRST
    return _changed(
        now,
        connections=connections,
        phase="hold",
        best_bytes_per_s=best,
        held=0,
        hold_windows=windows,
        reason=reason,
    )


def _changed(now: Steering, **fields: object) -> Steering:
    return msgspec.structs.replace(now, **fields)


def _range_bytes(limits: ParallelismLimits, bytes_per_s: float, first_byte_s: float) -> int:
    return _power_of_two(limits, int(bytes_per_s * max(DELAY_FACTOR * first_byte_s, RANGE_S_MIN)))


def _power_of_two(limits: ParallelismLimits, size: int) -> int:
    size = min(max(size, limits.range_bytes_min), limits.range_bytes_max)
    return int(1 << (size.bit_length() - 1))


def _bounded(limits: ParallelismLimits, connections: int) -> int:
    return min(max(connections, limits.connections_min), limits.connections_max)

"""How many replicas a deployment should have, from its load alone.

Load is concurrency: requests in flight plus queued. It is averaged over a stable window (long) and a panic
window (short); the panic window can only raise the answer. The scheme of two windows follows Knative's
autoscaler (https://knative.dev/docs/serving/autoscaling/kpa-specific/). Replicas that are still starting count
as capacity, because the decision is a total and not an increment: a slow load does not breed replicas.
"""

from __future__ import annotations

import math

import msgspec

from snowdrop.domain.service import Scale

PANIC_FACTOR = 2.0
"""Panic begins when the short window asks for this many times the capacity."""
BUCKETS_MAX = 4_000
ROUNDING = 1e-6
"""An average is a sum of floats: 2.0000000001 replicas' worth of load is two, or a constant load would flap."""


class Bucket(msgspec.Struct, frozen=True, array_like=True):
    """Load over a short stretch: its integral (request-seconds) and how many seconds it covers."""

    index: int
    integral: float
    covered_s: float


class AutoscaleState(msgspec.Struct, frozen=True, kw_only=True):
    """What the decider remembers from one call to the next."""

    buckets: tuple[Bucket, ...] = ()
    sampled_s: float | None = None
    load: float = 0.0
    busy_s: float | None = None
    panic_until_s: float | None = None
    panic_floor: int = 0


class AutoscaleInput(msgspec.Struct, frozen=True, kw_only=True):
    """What is observed now. `peak` is the highest load since the last call; counts are replicas."""

    in_flight: int
    queued: int
    peak: int
    ready: int
    starting: int
    concurrency: int
    scale: Scale


class AutoscaleDecision(msgspec.Struct, frozen=True, kw_only=True):
    """The number of replicas wanted, the signals behind it, and one sentence that says why."""

    desired: int
    reason: str
    load: float
    stable_load: float
    panic_load: float
    panicking: bool


def decide(state: AutoscaleState, seen: AutoscaleInput, now_s: float) -> tuple[AutoscaleState, AutoscaleDecision]:
    """One decision. `now_s` is monotonic; calls must not go back in time."""
    load = seen.in_flight + seen.queued
    scale = seen.scale
    if state.sampled_s is None and seen.ready + seen.starting > 0:
        # Replicas without a history: control was restarted. What they served before counts as just now.
        state = msgspec.structs.replace(state, busy_s=now_s)
    state = _sample(state, float(max(load, seen.peak)), float(load), now_s, scale)
    stable = _average(state, now_s, scale.stable_window_s, scale)
    panic = _average(state, now_s, scale.panic_window_s, scale)
    per_replica = max(1.0, seen.concurrency * scale.target)
    want_stable = math.ceil(stable / per_replica - ROUNDING)
    want_panic = math.ceil(panic / per_replica - ROUNDING)
    capacity = seen.ready + seen.starting

    desired, reason = want_stable, f"{stable:.1f} in flight or queued over {scale.stable_window_s:g} s"
    until = state.panic_until_s
    if capacity > 0 and want_panic >= PANIC_FACTOR * capacity:
        until = now_s + scale.stable_window_s
    panicking = until is not None and now_s < until
    floor = max(state.panic_floor, want_panic) if panicking else 0
    if panicking and floor > desired:
        desired, reason = floor, f"panic: {panic:.1f} in flight or queued over {scale.panic_window_s:g} s"

    at_once = math.ceil(max(load, seen.peak) / seen.concurrency)
    if seen.ready == 0 and at_once > desired:
        # No replica answers, so waiting for an average would only make the first callers wait longer.
        desired, reason = at_once, f"from zero: {max(load, seen.peak)} waiting, {seen.concurrency} a replica"
    desired, reason = _hold(state, (desired, reason), load, now_s, scale)
    bounded = min(max(desired, scale.min), scale.max)
    if bounded != desired:
        bound = f"max={scale.max}" if bounded < desired else f"min={scale.min}"
        reason = f"{reason}; {bound}"
    state = msgspec.structs.replace(
        state, panic_until_s=until if panicking else None, panic_floor=min(floor, scale.max)
    )
    return state, AutoscaleDecision(
        desired=bounded,
        reason=reason,
        load=float(load),
        stable_load=stable,
        panic_load=panic,
        panicking=panicking,
    )


def idle_at_s(state: AutoscaleState, scale: Scale) -> float | None:
    """When the deployment falls to its minimum if no request comes; None while it is busy or never was."""
    if state.load > 0 or state.busy_s is None:
        return None
    return state.busy_s + scale.idle_s


def _hold(
    state: AutoscaleState, wanted: tuple[int, str], load: int, now_s: float, scale: Scale
) -> tuple[int, str]:
    """Idle rules: the last replica stays while there is load and for `idle_s` after it; then all go."""
    desired, reason = wanted
    idle_s = now_s - state.busy_s if state.busy_s is not None else math.inf
    if load > 0:
        return max(desired, 1), reason
    if idle_s >= scale.idle_s:
        return 0, "no request yet" if state.busy_s is None else f"idle for {idle_s:.1f} s"
    if desired < 1:
        return 1, f"idle for {idle_s:.1f} s of {scale.idle_s:g} s"
    return desired, reason


def _bucket_s(scale: Scale) -> float:
    return max(scale.panic_window_s / 10.0, scale.stable_window_s / (BUCKETS_MAX - 2))


def _sample(state: AutoscaleState, peak: float, load: float, now_s: float, scale: Scale) -> AutoscaleState:
    """Adds the stretch since the last call, at the load that held through it."""
    busy = now_s if peak > 0 else state.busy_s
    if state.sampled_s is None:
        return msgspec.structs.replace(state, sampled_s=now_s, load=load, busy_s=busy)
    width = _bucket_s(scale)
    buckets = list(state.buckets)
    start = max(state.sampled_s, now_s - scale.stable_window_s)
    # The load during the stretch lies between its start and its peak; a burst inside it must not be averaged away.
    level = max(state.load, peak) if peak > load else state.load
    while start < now_s:
        index = math.floor(start / width)
        end = min(now_s, (index + 1) * width)
        if end <= start:  # a float step too small to move on: the rest belongs to the next bucket
            index, end = index + 1, min(now_s, (index + 2) * width)
        _add(buckets, index, level * (end - start), end - start)
        start = end
    oldest = math.floor((now_s - scale.stable_window_s) / width)
    kept = tuple(bucket for bucket in buckets if bucket.index >= oldest)[-BUCKETS_MAX:]
    return msgspec.structs.replace(state, buckets=kept, sampled_s=now_s, load=load, busy_s=busy)


def _add(buckets: list[Bucket], index: int, integral: float, covered_s: float) -> None:
    if buckets and buckets[-1].index == index:
        last = buckets[-1]
        buckets[-1] = Bucket(index, last.integral + integral, last.covered_s + covered_s)
    else:
        buckets.append(Bucket(index, integral, covered_s))


def _average(state: AutoscaleState, now_s: float, window_s: float, scale: Scale) -> float:
    """Mean load over the window, or over as much of it as has been observed."""
    oldest = math.floor((now_s - window_s) / _bucket_s(scale))
    taken = [bucket for bucket in state.buckets if bucket.index >= oldest]
    covered_s = sum(bucket.covered_s for bucket in taken)
    if covered_s <= 0:
        return state.load
    return sum(bucket.integral for bucket in taken) / covered_s

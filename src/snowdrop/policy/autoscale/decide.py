"""How many replicas a deployment should have.

Two steps, both pure. `observe` folds what is seen into the windows and gives `Signals`: everything that the
decision depends on, small enough to be stored. `judge` decides from signals alone; the explanation runs it again
on altered ones. The scheme of two windows follows Knative's autoscaler
(https://knative.dev/docs/serving/autoscaling/kpa-specific/); what a queue is worth is `backlog`.
"""

from __future__ import annotations

import math

import msgspec

from snowdrop.domain.scale import Scale
from snowdrop.policy.autoscale import backlog
from snowdrop.policy.autoscale.windows import Windows, arriving_per_s, average, sample

PANIC_FACTOR = 2.0
"""Panic begins when the short window asks for this many times the capacity."""
ROUNDING = 1e-6
"""An average is a sum of floats: 2.0000000001 replicas' worth of load is two, or a constant load would flap."""
SLACK = 1.1
"""One fewer only if the load, by a tenth higher, still fits: load about a boundary does not flap."""
PATIENCE_STARTS = 2.0
"""A queue that has not been empty for so many start-up times gets one more replica, whatever was predicted."""
PATIENCE_S_MIN = 5.0


class AutoscaleState(msgspec.Struct, frozen=True, kw_only=True):
    """What the decider remembers from one call to the next."""

    windows: Windows = Windows()
    load: float = 0.0
    busy_s: float | None = None
    queued_since_s: float | None = None
    previous: int = 0
    hold_until_s: float | None = None
    hold: int = 0


class AutoscaleInput(msgspec.Struct, frozen=True, kw_only=True):
    """What is observed now. Counts are replicas and requests.

    `peak` is the highest load since the last call, `arrived` the requests that came since then;
    `starting_left_s` how long starting replicas will still take (those not listed: a whole start). `idle_s`
    replaces the scale's own; `bounds` are those in force (schedules, revision); `room` is how many may stay after
    some had to make room for another deployment.
    """

    in_flight: int
    queued: int
    peak: int
    ready: int
    starting: int
    concurrency: int
    scale: Scale
    arrived: int = 0
    starting_left_s: tuple[float, ...] = ()
    start_s: float = 0.0
    service_s: float = 0.0
    bounds: Bounds | None = None
    idle_s: float | None = None
    room: int | None = None


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """What holds now of `min`, `max` and `buffer`. `source` says where it comes from, if not from the scale."""

    min: int
    max: int
    buffer: int = 0
    source: str = ""


class Signals(msgspec.Struct, frozen=True, kw_only=True):
    """All that a decision depends on. `idle_for_s` is None while there is load or if there never was any;
    `hold` replicas are kept for `hold_left_s` after a burst or a panic; `previous` is what was last decided,
    before bounds.
    """

    in_flight: int
    queued: int
    peak: int
    arriving_per_s: float
    stable_load: float
    panic_load: float
    ready: int
    starting_left_s: tuple[float, ...]
    concurrency: int
    target: float
    bounds: Bounds
    idle_s: float
    idle_for_s: float | None
    ever_busy: bool
    start_s: float
    service_s: float
    queued_for_s: float
    previous: int
    hold: int
    hold_left_s: float
    stable_window_s: float
    panic_window_s: float
    room: int | None = None

    @property
    def load(self) -> int:
        return self.in_flight + self.queued

    @property
    def capacity(self) -> int:
        return self.ready + len(self.starting_left_s)

    @property
    def per_replica(self) -> float:
        return max(1.0, self.concurrency * self.target)


class AutoscaleDecision(msgspec.Struct, frozen=True, kw_only=True):
    """The number of replicas wanted, which rule gave it, and one sentence that says why.

    `unbounded` is the number before `min` and `max`. `hold` replicas are kept for one stable window from now on if
    `holds_anew`, otherwise for as long as before.
    """

    desired: int
    reason: str
    rule: str
    load: float
    stable_load: float
    panic_load: float
    panicking: bool
    unbounded: int = 0
    hold: int = 0
    holds_anew: bool = False


def decide(state: AutoscaleState, seen: AutoscaleInput, now_s: float) -> tuple[AutoscaleState, AutoscaleDecision]:
    """One decision. `now_s` is monotonic; calls must not go back in time."""
    state, signals = observe(state, seen, now_s)
    decision = judge(signals)
    return after(state, signals, decision, now_s), decision


def observe(state: AutoscaleState, seen: AutoscaleInput, now_s: float) -> tuple[AutoscaleState, Signals]:
    """Adds what is seen to the windows; the signals of this moment."""
    load, scale = seen.in_flight + seen.queued, seen.scale
    peak = max(load, seen.peak)
    windows = state.windows
    if windows.sampled_s is None and seen.ready + seen.starting > 0:
        # Replicas without a history: control was restarted. What they served before counts as just now.
        windows = msgspec.structs.replace(windows, found=True)
        # Its load of before is not known either: none goes before a whole window was seen.
        hold, until_s = seen.ready + seen.starting, now_s + scale.stable_window_s
        state = msgspec.structs.replace(state, busy_s=now_s, previous=1, hold=hold, hold_until_s=until_s)
    # What waits holds no slot yet; a peak above the slots was a queue.
    slots = max(seen.in_flight, seen.ready * seen.concurrency)
    windows = sample(
        windows,
        level=float(seen.in_flight),
        peak=float(min(peak, slots)) if peak > load else 0.0,
        arrived=seen.arrived,
        now_s=now_s,
        scale=scale,
    )
    since_s = None if seen.queued == 0 else now_s if state.queued_since_s is None else state.queued_since_s
    busy_s = now_s if peak > 0 else state.busy_s
    holding = state.hold_until_s is not None and now_s < state.hold_until_s
    left_s = seen.starting_left_s[: seen.starting]
    left_s += (seen.start_s,) * (seen.starting - len(left_s))
    signals = Signals(
        in_flight=seen.in_flight,
        queued=seen.queued,
        peak=peak,
        arriving_per_s=arriving_per_s(windows, now_s, scale),
        stable_load=average(windows, now_s, scale.stable_window_s, scale),
        panic_load=average(windows, now_s, scale.panic_window_s, scale),
        ready=seen.ready,
        starting_left_s=left_s,
        concurrency=seen.concurrency,
        target=scale.target,
        bounds=seen.bounds or Bounds(min=scale.min, max=scale.max, buffer=scale.buffer),
        idle_s=scale.idle_s if seen.idle_s is None else seen.idle_s,
        idle_for_s=None if load > 0 or busy_s is None else now_s - busy_s,
        ever_busy=busy_s is not None,
        start_s=seen.start_s,
        service_s=seen.service_s,
        queued_for_s=0.0 if since_s is None else now_s - since_s,
        previous=state.previous,
        hold=state.hold if holding else 0,
        hold_left_s=state.hold_until_s - now_s if holding and state.hold_until_s is not None else 0.0,
        stable_window_s=scale.stable_window_s,
        panic_window_s=scale.panic_window_s,
        room=seen.room if load == 0 else None,
    )
    made = msgspec.structs.replace(state, windows=windows, load=float(load), busy_s=busy_s, queued_since_s=since_s)
    return made, signals


def judge(signals: Signals) -> AutoscaleDecision:
    """Decides from signals alone."""
    want, rule, reason = _average_want(signals)
    hold, holds_anew = signals.hold, False
    panic = math.ceil(signals.panic_load / signals.per_replica - ROUNDING)
    panicking = signals.capacity > 0 and panic >= PANIC_FACTOR * signals.capacity
    if panicking or (signals.hold > 0 and panic > signals.hold):
        hold, holds_anew = max(hold, panic), panicking
    burst, burst_reason = _burst_want(signals)
    if burst > signals.capacity:
        hold, holds_anew = max(hold, burst), True
    elif hold > 0 and signals.queued > 0:
        holds_anew = True  # the burst is not over: its time begins when nobody waits
    if want < min(panic, signals.capacity):
        want, rule = min(panic, signals.capacity), "panic-window"
        reason = f"{signals.panic_load:.1f} in flight over {signals.panic_window_s:g} s: too early for fewer"
    if hold > want:
        want, rule, reason = hold, *_hold_reason(signals, panic=panic, panicking=panicking)
    if burst > 0 and burst >= want:
        want, rule, reason = burst, "backlog", burst_reason
    want, rule, reason = _idle(signals, want, rule, reason)
    if want > 0 and signals.bounds.buffer > 0:
        want += signals.bounds.buffer
        reason += f"; {signals.bounds.buffer} standing by"
    desired, rule, reason = _bound(signals, want, rule, reason)
    return AutoscaleDecision(
        desired=desired,
        reason=reason,
        rule=rule,
        load=float(signals.load),
        stable_load=signals.stable_load,
        panic_load=signals.panic_load,
        panicking=panicking or signals.hold > 0,
        unbounded=want - (signals.bounds.buffer if want > 0 else 0),
        hold=hold,
        holds_anew=holds_anew,
    )


def after(state: AutoscaleState, signals: Signals, decision: AutoscaleDecision, now_s: float) -> AutoscaleState:
    """What to remember of a decision. A deployment that has gone idle begins anew with its next request."""
    if decision.unbounded == 0:
        windows = Windows(width_s=state.windows.width_s, sampled_s=now_s)
        return msgspec.structs.replace(state, windows=windows, previous=0, hold=0, hold_until_s=None)
    until_s = now_s + signals.stable_window_s if decision.holds_anew else state.hold_until_s
    hold = min(decision.hold, signals.bounds.max)
    if hold == 0 or until_s is None or now_s >= until_s:
        until_s, hold = None, 0
    return msgspec.structs.replace(state, previous=decision.unbounded, hold_until_s=until_s, hold=hold)


def idle_at_s(state: AutoscaleState, idle_s: float) -> float | None:
    """When the deployment falls to its minimum if no request comes; None while it is busy or never was."""
    if state.load > 0 or state.busy_s is None:
        return None
    return state.busy_s + idle_s


def _average_want(signals: Signals) -> tuple[int, str, str]:
    """By the stable window; fewer than before only with some slack."""
    stable = signals.stable_load / signals.per_replica
    want = math.ceil(stable - ROUNDING)
    window_s, each = signals.stable_window_s, signals.per_replica
    reason = f"{signals.stable_load:.1f} in flight over {window_s:g} s, {each:g} a replica"
    kept = min(signals.previous, math.ceil(stable * SLACK - ROUNDING))
    if kept > want:
        return kept, "slack", f"{reason}; one fewer would be close to full"
    return want, "stable", reason


def _burst_want(signals: Signals) -> tuple[int, str]:
    """What those who wait are worth; 0 if nobody waits."""
    if signals.ready == 0 and (signals.start_s <= 0 or signals.service_s <= 0):
        # Nothing is known and no replica answers: waiting for an average would only make the first callers wait.
        at_once = math.ceil(signals.peak / signals.concurrency - ROUNDING)
        if at_once > signals.capacity:
            return at_once, f"from zero: {signals.peak} waiting, {signals.concurrency} a replica"
    if signals.queued == 0:
        return (1, "from zero: a request came") if signals.ready == 0 and signals.peak > 0 else (0, "")
    more = backlog.more(
        in_flight=signals.in_flight,
        queued=signals.queued,
        arriving_per_s=signals.arriving_per_s,
        ready=signals.ready,
        starting_left_s=signals.starting_left_s,
        concurrency=signals.concurrency,
        start_s=signals.start_s,
        service_s=signals.service_s,
    )
    patience_s = max(PATIENCE_S_MIN, PATIENCE_STARTS * signals.start_s, signals.service_s)
    if more == 0 and not signals.starting_left_s and signals.queued_for_s > patience_s:
        return signals.capacity + 1, (
            f"{signals.queued} waiting; the queue has not been empty for {signals.queued_for_s:.0f} s"
        )
    want = max(1, signals.capacity + more)
    if more == 0:
        return want, f"{signals.queued} waiting, whom these replicas will have taken before another is ready"
    ahead = (
        f" that take {signals.service_s:.3g} s each, a start {signals.start_s:.3g} s" if signals.start_s else ""
    )
    zero = "from zero: " if signals.ready == 0 else ""
    return want, f"{zero}{signals.queued} waiting{ahead}: {more} more"


def _hold_reason(signals: Signals, *, panic: int, panicking: bool) -> tuple[str, str]:
    if panicking or panic >= signals.hold:
        return "panic", f"panic: {signals.panic_load:.1f} in flight over {signals.panic_window_s:g} s"
    return "hold", f"kept for {signals.hold_left_s:.0f} s after a burst or a restart of control"


def _idle(signals: Signals, want: int, rule: str, reason: str) -> tuple[int, str, str]:
    """The last replica stays while there is load and for `idle_s` after it; then all go."""
    if signals.load > 0:
        return (want, rule, reason) if want >= 1 else (1, "busy", reason)
    if not signals.ever_busy:
        return 0, "idle", "no request yet"
    idle_for_s = signals.idle_for_s or 0.0
    if idle_for_s >= signals.idle_s:
        return 0, "idle", f"idle for {idle_for_s:.1f} s"
    if want < 1:
        return 1, "idle", f"idle for {idle_for_s:.1f} s of {signals.idle_s:g} s"
    return want, rule, reason


def _bound(signals: Signals, want: int, rule: str, reason: str) -> tuple[int, str, str]:
    bounds = signals.bounds
    desired = min(max(want, bounds.min), bounds.max)
    if desired != want:
        of = f" ({bounds.source})" if bounds.source else ""
        bound = f"max={bounds.max}" if desired < want else f"min={bounds.min}"
        rule, reason = bound.split("=", maxsplit=1)[0], f"{reason}; {bound}{of}"
    room = signals.room
    if room is not None and max(room, bounds.min) < desired:
        return max(room, bounds.min), "room", f"{reason}; idle ones made room for others"
    return desired, rule, reason

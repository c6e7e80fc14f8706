"""When a batch starts and with how many requests. Pure: `(batch, state, learned) -> decision`.

A call costs about `fixed_s + each_s * size`. To hold `n` requests back for one more that is expected in `gap_s`
delays each of them by `gap_s + each_s`, and spares one whole call, `fixed_s`. It is worth it while

    fixed_s > (n + 1) * gap_s + n * each_s

A lull is evidence of its own: with every moment in which nobody comes the expected gap grows at least to it, and
the wait ends. So a caller that sends one request after the other is never held back, a burst is gathered within
moments, and while a batch runs the next one gathers by itself.
"""

import math

import msgspec

from snowdrop.domain.batching import Batch

KEEP = 0.9
"""What an older observation weighs against the one after it."""
GAP_KEEP = 0.8
SPREAD_MIN = 0.05
"""Variance of sizes below which the cost of one more request can't be told from the fixed cost."""


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """Forgetting sums over (size, seconds) of calls that succeeded, for a straight line through them."""

    weight: float = 0.0
    size: float = 0.0
    seconds: float = 0.0
    size_size: float = 0.0
    size_seconds: float = 0.0

    def learned(self, size: int, seconds: float) -> "Costs":
        """With one more call of `size` requests that took `seconds`."""
        return Costs(
            weight=self.weight * KEEP + 1,
            size=self.size * KEEP + size,
            seconds=self.seconds * KEEP + seconds,
            size_size=self.size_size * KEEP + size * size,
            size_seconds=self.size_seconds * KEEP + size * seconds,
        )

    def line(self) -> tuple[float, float]:
        """(fixed_s, each_s), neither negative; zeros before anything was learned.

        While all calls had about one size, all of the cost is taken for fixed: that makes larger batches worth
        a try, and they show what one more request costs.
        """
        if self.weight == 0:
            return 0.0, 0.0
        mean_size, mean_s = self.size / self.weight, self.seconds / self.weight
        variance = self.size_size / self.weight - mean_size**2
        if variance < SPREAD_MIN:
            return mean_s, 0.0
        slope = (self.size_seconds / self.weight - mean_size * mean_s) / variance
        each_s = min(max(slope, 0.0), mean_s / mean_size)
        return max(mean_s - each_s * mean_size, 0.0), each_s

    def expected_s(self, size: int) -> float:
        fixed_s, each_s = self.line()
        return fixed_s + each_s * size


class BatchState(msgspec.Struct, frozen=True, kw_only=True):
    """What waits and runs at one endpoint. Times in seconds; infinity where there is no bound or nothing known.

    `since_arrival_s` is how long ago the last request came, `gap_s` what lay between requests lately;
    `slack_s` is what is left until the earliest deadline of those who wait.
    """

    waiting: int
    running: int
    oldest_wait_s: float = 0.0
    since_arrival_s: float = 0.0
    gap_s: float = math.inf
    slack_s: float = math.inf


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """Call the method now with the `size` requests that have waited longest."""

    size: int
    reason: str


class Hold(msgspec.Struct, frozen=True, kw_only=True):
    """Ask again when a request comes, a batch ends, or after `wait_s` (infinity: not before one of these)."""

    wait_s: float
    reason: str


def next_gap_s(gap_s: float, since_arrival_s: float) -> float:
    """The typical gap, with one more that has just ended. The first one is taken as it is."""
    return since_arrival_s if math.isinf(gap_s) else GAP_KEEP * gap_s + (1 - GAP_KEEP) * since_arrival_s


def decide(batch: Batch, state: BatchState, costs: Costs) -> Start | Hold:
    """Whether a batch starts now, and how large it is."""
    if state.waiting == 0:
        return Hold(wait_s=math.inf, reason="nobody waits")
    if state.running >= batch.in_flight_max:
        return Hold(wait_s=math.inf, reason="as many batches run as may")
    size = _fitting(batch, state, costs)
    if state.waiting >= batch.size_max:
        return Start(size=size, reason="the batch is full")
    hold_s = _worth_waiting_s(batch, state, costs)
    if hold_s > 0:
        return Hold(wait_s=hold_s, reason="another request is expected soon enough")
    return Start(size=size, reason="to wait for another request would not gain anything")


def _fitting(batch: Batch, state: BatchState, costs: Costs) -> int:
    """As many as may go together, fewer where the earliest deadline would not be met otherwise."""
    most = min(state.waiting, batch.size_max)
    fixed_s, each_s = costs.line()
    if math.isinf(state.slack_s) or each_s == 0 or fixed_s + each_s * most <= state.slack_s:
        return most
    if fixed_s + each_s > state.slack_s:
        return most  # it is late in any case: a small batch would only delay the others
    return max(1, min(most, math.floor((state.slack_s - fixed_s) / each_s)))


def _worth_waiting_s(batch: Batch, state: BatchState, costs: Costs) -> float:
    """How long to hold the batch back if nobody comes meanwhile; zero or less for not at all."""
    fixed_s, each_s = costs.line()
    gap_max_s = (fixed_s - state.waiting * each_s) / (state.waiting + 1)
    if max(state.gap_s, state.since_arrival_s) >= gap_max_s:
        return 0.0
    lull_s = gap_max_s - state.since_arrival_s
    patience_s = batch.wait_ms_max / 1e3 - state.oldest_wait_s
    deadline_s = state.slack_s - costs.expected_s(state.waiting + 1)
    return min(lull_s, patience_s, deadline_s)

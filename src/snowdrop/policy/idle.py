"""How long a deployment that nobody calls is kept warm: what keeping costs against what waiting costs. Pure.

After a request ends, the next comes after an unknown gap g. Kept for t seconds, the last replica costs

    E[min(g, t)]                     seconds of running, and
    P(g > t) * wait_price * start_s  for the start that the next caller then waits for,

`wait_price` being what a second of waiting is worth in seconds of a running replica. The gaps that were seen stand
for those to come; t is the value with the least sum. Until enough are known the time given by hand holds. This is
the ski-rental problem with a known distribution (Karlin, Manasse, McGeoch, Owicki: "Competitive randomized
algorithms for nonuniform problems", Algorithmica 11, 1994); a histogram of idle times for it is from Shahrad et
al., "Serverless in the Wild" (USENIX ATC 2020). docs/explanation/autoscaling.md has an example.
"""

from __future__ import annotations

import math

import msgspec

GAP_S_MIN = 0.1
GROWTH = 1.25
BUCKETS = 62
"""From 0.1 s in steps of a quarter to about a day; longer gaps fall into the last bucket."""
GAPS_MIN = 8.0
"""So many gaps must have been seen before they are believed."""
HALF_LIFE_GAPS = 100.0
"""After so many newer ones a gap counts half: habits change."""


class Gaps(msgspec.Struct, frozen=True, kw_only=True):
    """Weights by bucket: how often a gap ended within it. Empty if none was seen."""

    weights: tuple[float, ...] = ()

    @property
    def total(self) -> float:
        return sum(self.weights)


class IdleChoice(msgspec.Struct, frozen=True, kw_only=True):
    """Keep the last replica for `idle_s` after the last request. Costs are in replica-seconds for one gap."""

    idle_s: float
    reason: str
    cost: float = 0.0
    cost_at_once: float = 0.0
    cost_always: float = 0.0


def note_gap(gaps: Gaps, gap_s: float) -> Gaps:
    """The deployment was without a request for `gap_s`."""
    if not math.isfinite(gap_s) or gap_s < 0:
        return gaps
    weights = list(gaps.weights) or [0.0] * BUCKETS
    keep = 0.5 ** (1.0 / HALF_LIFE_GAPS)
    weights = [weight * keep for weight in weights]
    weights[_bucket(gap_s)] += 1.0
    return Gaps(weights=tuple(weights))


def choose(gaps: Gaps, *, start_s: float, wait_price: float, fallback_s: float) -> IdleChoice:
    """The idle time of the least expected cost; `fallback_s` while gaps or start are not known well enough."""
    if gaps.total < GAPS_MIN:
        return IdleChoice(idle_s=fallback_s, reason=f"{gaps.total:.0f} of {GAPS_MIN:.0f} gaps seen; as set")
    if start_s <= 0:
        return IdleChoice(idle_s=fallback_s, reason="no start was seen yet; as set")
    price = wait_price * start_s
    total = gaps.total
    best_s, best, kept, gone = 0.0, price, 0.0, 0.0
    for index, weight in enumerate(gaps.weights):
        # All gaps of a bucket count as long as its upper edge: kept for that long, none of them waits.
        edge_s = _edge_s(index)
        kept += weight / total * edge_s
        gone += weight / total
        cost = kept + max(0.0, 1.0 - gone) * (edge_s + price)
        if weight > 0 and cost < best - 1e-9:
            best_s, best = edge_s, cost
    rest = f"{wait_price:g} replica-seconds for a second of waiting, a start of {start_s:.3g} s"
    share = sum(weight for index, weight in enumerate(gaps.weights) if _edge_s(index) <= best_s) / total
    kept_of = (
        f"{100 * share:.0f} % of {total:.0f} gaps end within {best_s:.3g} s" if best_s else "gaps are too long"
    )
    return IdleChoice(idle_s=best_s, reason=f"{kept_of}; {rest}", cost=best, cost_at_once=price, cost_always=kept)


def _bucket(gap_s: float) -> int:
    if gap_s <= GAP_S_MIN:
        return 0
    if gap_s >= _edge_s(BUCKETS - 1):
        return BUCKETS - 1  # also what would overflow a division by the first edge
    return min(BUCKETS - 1, math.ceil(math.log(gap_s / GAP_S_MIN) / math.log(GROWTH) - 1e-9))


def _edge_s(index: int) -> float:
    return GAP_S_MIN * GROWTH**index

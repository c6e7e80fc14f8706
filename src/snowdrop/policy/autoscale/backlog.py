"""How many replicas more a queue is worth, by what will have drained when they could be ready. Pure.

A replica that is ordered now is ready after a start-up time T. By then the replicas that are there, and those on
their way, have taken some of those who wait. For what is left a new replica is worth its cost only if it saves a
wait that is long beside T; so the queue need only be empty *half a start-up time after* the new ones are ready.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

DRAIN_FRACTION = 0.5
"""The queue should be empty so many start-up times after new replicas are ready."""
DRAIN_S_MIN = 1.0
"""With very fast starts, looking again costs less than starting too many at once."""
ROUNDING = 1e-6


def drain_s(start_s: float) -> float:
    """How long after their start new replicas may take to empty the queue."""
    return max(DRAIN_S_MIN, DRAIN_FRACTION * start_s)


def more(
    *,
    in_flight: int,
    queued: int,
    arriving_per_s: float,
    ready: int,
    starting_left_s: Sequence[float],
    concurrency: int,
    start_s: float,
    service_s: float,
) -> int:
    """New replicas that the queue is worth, beyond those that are ready or starting.

    `starting_left_s` is how long each starting replica will still take; one that is overdue counts as ready any
    moment, so that a slow load breeds nothing. With no start or no request seen yet (`start_s` or `service_s` 0)
    nothing can be predicted: everyone who waits gets a slot.
    """
    if queued <= 0:
        return 0
    if start_s <= 0 or service_s <= 0:
        slots = math.ceil((in_flight + queued) / concurrency - ROUNDING)
        return max(0, slots - ready - len(starting_left_s))
    until_s = start_s + drain_s(start_s)
    free = max(0, ready * concurrency - in_flight)
    taken = free + ready * concurrency * until_s / service_s
    taken += sum(_takes(until_s - min(left_s, start_s), concurrency, service_s) for left_s in starting_left_s)
    left = queued + arriving_per_s * start_s - taken
    if left <= ROUNDING:
        return 0
    return math.ceil(left / _takes(until_s - start_s, concurrency, service_s) - ROUNDING)


def _takes(ready_for_s: float, concurrency: int, service_s: float) -> float:
    """Requests that get a slot of an empty replica within that time: its slots at once, then one as one ends."""
    return concurrency * (1.0 + ready_for_s / service_s)

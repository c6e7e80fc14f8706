"""Whether a request may join a deployment's queue, and how long a refused caller should stay away."""

from __future__ import annotations

import math

import msgspec

from snowdrop.domain.service import QueueSpec

RETRY_AFTER_S_MIN = 1.0
RETRY_AFTER_S_MAX = 300.0


class Admit(msgspec.Struct, frozen=True):
    """The request may wait until `deadline_s` (monotonic)."""

    deadline_s: float


class Refuse(msgspec.Struct, frozen=True):
    """The queue is at its bound; trying again before `retry_after_s` is not worth it."""

    retry_after_s: float


def admit(queue: QueueSpec, *, waiting: int, drained_per_s: float, start_s: float, now_s: float) -> Admit | Refuse:
    """Decides on one arrival.

    `drained_per_s` is how fast waiting requests got slots lately (0: not at all), `start_s` how long it takes
    until a replica that is starting can take one (0: unknown, or replicas are ready).
    """
    if waiting < queue.length_max:
        return Admit(now_s + queue.wait_s_max)
    return Refuse(retry_after_s(waiting=waiting, drained_per_s=drained_per_s, start_s=start_s))


def retry_after_s(*, waiting: int, drained_per_s: float, start_s: float = 0.0) -> float:
    """Time until about half of the queue has drained, in whole seconds between the two bounds."""
    drain_s = waiting / 2 / drained_per_s if drained_per_s > 0 else 0.0
    return min(
        max(float(math.ceil(min(start_s + drain_s, RETRY_AFTER_S_MAX))), RETRY_AFTER_S_MIN), RETRY_AFTER_S_MAX
    )

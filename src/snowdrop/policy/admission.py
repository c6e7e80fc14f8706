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


def admit(queue: QueueSpec, *, waiting: int, drained_per_s: float, now_s: float) -> Admit | Refuse:
    """Decides on one arrival. `drained_per_s` is how fast waiting requests got slots lately (0: unknown)."""
    if waiting < queue.length_max:
        return Admit(now_s + queue.wait_s_max)
    return Refuse(retry_after_s(waiting=waiting, drained_per_s=drained_per_s))


def retry_after_s(*, waiting: int, drained_per_s: float) -> float:
    """Time until about half of the queue has drained, in whole seconds between the two bounds."""
    if drained_per_s <= 0:
        return RETRY_AFTER_S_MIN
    seconds = min(waiting / 2 / drained_per_s, RETRY_AFTER_S_MAX)  # a tiny rate makes this infinite
    return float(max(math.ceil(seconds), RETRY_AFTER_S_MIN))

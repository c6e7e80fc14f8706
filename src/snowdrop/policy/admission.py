"""Whether a request may join a deployment's queue, and when a refused caller should come back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from snowdrop.domain.service import QueueSpec
from snowdrop.policy.waiting import Outlook, latest_turn_s, retry_after_s, turn_s

MARGIN_S = 0.1
"""A client's timer may be a little early, and what it is told to wait for a little late."""
_ROUNDING_S = 1e-6
"""A whole number of seconds does not become the next one by the rounding of sums."""


class Admit(msgspec.Struct, frozen=True):
    """The request may wait until `deadline_s` (monotonic)."""

    deadline_s: float


class Refuse(msgspec.Struct, frozen=True):
    """The queue is at its bound; trying again before `retry_after_s` is not worth it."""

    retry_after_s: float


def admit(
    queue: QueueSpec,
    outlook: Callable[[], Outlook],
    *,
    waiting: int,
    promised: int,
    wait_s_max: float | None,
    waited_s: float,
    now_s: float,
) -> Admit | Refuse:
    """Decides on one arrival, which asks to wait `wait_s_max` at most (None: as long as the deployment lets it).

    The `outlook` is asked for only if it is refused.
    `waited_s` is how long it has waited before, when it had a turn at a replica that could not be reached (0: it
    has just come): it is not refused for the length of the queue. `promised` others were refused before and told
    to come back, and have not had their time yet: places that become free are theirs first.
    """
    if waiting < queue.length_max or waited_s > 0:
        bound_s = queue.wait_s_max if wait_s_max is None else min(queue.wait_s_max, wait_s_max)
        return Admit(now_s + max(0.0, bound_s - waited_s))
    later_s = latest_turn_s(outlook(), promised)
    return Refuse(retry_after_s(None if later_s is None else later_s + MARGIN_S))


def spread_s(
    told_s: float, promises: Sequence[float], *, slots: int, length_max: int, service_s: float, now_s: float
) -> float:
    """When one that was told `told_s` from now may really come back, after those that were told before.

    `promises` are the times (monotonic, in order) that were told and have not come yet. Times are told in whole
    seconds: no more may come in any one than there are places to be served or wait in, nor more than `slots` in
    any `service_s`, for those who come are served from then on and not from when a slot came free.
    """
    at_s = now_s + told_s
    if promises:
        at_s = max(at_s, promises[-1])
        if len(promises) >= slots + length_max:
            at_s = max(at_s, promises[-slots - length_max] + 1.0)
        if 0 < slots <= len(promises):
            at_s = max(at_s, promises[-slots] + service_s + MARGIN_S)
    return retry_after_s(at_s - now_s - _ROUNDING_S)


def come_back_s(outlook: Outlook, *, waiting: int, wait_s_max: float) -> float:
    """When one that waited `wait_s_max` in vain should come back: when as long a wait would get it its turn."""
    expected_s = turn_s(outlook, waiting)
    return retry_after_s(None if expected_s is None else expected_s - wait_s_max)

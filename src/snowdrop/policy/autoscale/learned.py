"""What was learned of a deployment: how long a start takes, how long a request, how long it is quiet. Pure."""

from __future__ import annotations

import math

import msgspec

from snowdrop.policy.idle import Gaps
from snowdrop.policy.waiting import slot_time_s

STARTS_KEPT = 20
"""The latest starts: enough for a median that one odd start does not move, few enough to follow a new model."""
REQUESTS_HALF_LIFE = 200.0
"""After so many newer requests one counts half in the service time."""


class Learned(msgspec.Struct, frozen=True, kw_only=True):
    """`starts_s` are the latest start-up times, the newest last; `slot_s` over `done` is the service time."""

    starts_s: tuple[float, ...] = ()
    done: float = 0.0
    slot_s: float = 0.0
    gaps: Gaps = Gaps()

    @property
    def start_s(self) -> float:
        """The median; 0 if no start was seen."""
        return _quantile(self.starts_s, 0.5)

    @property
    def start_high_s(self) -> float:
        """Nine of ten starts took no longer."""
        return _quantile(self.starts_s, 0.9)

    def service_s(self, *, in_flight: int = 0, running_s: float = 0.0) -> float:
        """Mean seconds that a request holds its slot; 0 if not known.

        Requests that run longer than that already are evidence too: their mean age is the least it can be.
        """
        known = self.slot_s / self.done if self.done > 0 else 0.0
        return slot_time_s(known, in_flight=in_flight, running_s=running_s)


def note_start(learned: Learned, start_s: float) -> Learned:
    """One more replica became ready, so long after it was ordered."""
    if not math.isfinite(start_s) or start_s <= 0:
        return learned
    return msgspec.structs.replace(learned, starts_s=(*learned.starts_s, start_s)[-STARTS_KEPT:])


def note_done(learned: Learned, *, done: int, slot_s: float) -> Learned:
    """`done` more requests ended, which held their slots for `slot_s` seconds in all."""
    if done <= 0 or slot_s < 0 or not math.isfinite(slot_s):
        return learned
    keep = 0.5 ** (done / REQUESTS_HALF_LIFE)
    return msgspec.structs.replace(learned, done=learned.done * keep + done, slot_s=learned.slot_s * keep + slot_s)


def _quantile(values: tuple[float, ...], share: float) -> float:
    """The smallest value that `share` of all do not exceed."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

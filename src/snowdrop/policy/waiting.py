"""How long it will be until a waiting request has its turn, by what has been learned. Pure."""

from __future__ import annotations

import math

import msgspec

RETRY_AFTER_S_MIN = 1.0
RETRY_AFTER_S_MAX = 300.0
RETRY_AFTER_UNKNOWN_S = 5.0
"""When nothing has been learned yet: short enough for a small service; who comes too early is told again."""


_HALVINGS = 16


class Outlook(msgspec.Struct, frozen=True, kw_only=True):
    """What a deployment can do now and soon.

    `slots` of replicas that take requests, `service_s` how long a request holds one (0: unknown), `drained_per_s`
    how fast waiting requests got slots lately (0: none did). `coming_s` is when replicas that are starting will be
    ready, from now, the first one first; each brings `coming_slots`.
    """

    slots: int
    service_s: float = 0.0
    drained_per_s: float = 0.0
    coming_s: tuple[float, ...] = ()
    coming_slots: int = 1


def slot_time_s(known_s: float, *, in_flight: int, running_s: float) -> float:
    """How long a request holds its slot: `known_s` by those that have ended; 0 if not known.

    Those that still run are evidence too: `in_flight` of them for `running_s` in all, and so long it is at least.
    """
    return max(known_s, running_s / in_flight) if in_flight > 0 and known_s > 0 else known_s


def turn_s(outlook: Outlook, ahead: int) -> float | None:
    """Seconds until a request has its turn that waits behind `ahead` others; None if nothing tells.

    While slots are ready, turns come at slots / service time. A replica that comes takes as many at once as it has
    slots, and adds to the pace. It is a forecast of steady work, not a promise.
    """
    turns = float(ahead + 1)
    slots, at_s = outlook.slots, 0.0
    for ready_s in outlook.coming_s:
        pace = _pace(outlook, slots)
        if pace and turns <= pace * (ready_s - at_s):
            return at_s + turns / pace
        turns -= pace * (ready_s - at_s) + outlook.coming_slots
        slots, at_s = slots + outlook.coming_slots, max(at_s, ready_s)
        if turns <= 0:
            return at_s
    pace = _pace(outlook, slots)
    if pace:
        return at_s + turns / pace
    # All that is known is when somebody will be there.
    return at_s if outlook.coming_s else None


def latest_turn_s(outlook: Outlook, ahead: int) -> float | None:
    """As `turn_s`, but with each slot coming free as late as it may: whoever comes then is not too early.

    That is a service time later at most: slots that were all taken at once come free all at once.
    """
    soon_s, service_s = turn_s(outlook, ahead), outlook.service_s
    if soon_s is None or service_s <= 0:
        return soon_s
    low_s, high_s = soon_s, soon_s + service_s
    if _turns_by(outlook, low_s) > ahead:
        return low_s
    for _ in range(_HALVINGS):
        middle_s = (low_s + high_s) / 2
        if _turns_by(outlook, middle_s) > ahead:
            high_s = middle_s
        else:
            low_s = middle_s
    return high_s


def _turns_by(outlook: Outlook, at_s: float) -> int:
    """How many turns there have been for sure after `at_s`."""
    turns = outlook.slots * math.floor(at_s / outlook.service_s)
    for ready_s in outlook.coming_s:
        if ready_s <= at_s:
            turns += outlook.coming_slots * (1 + math.floor((at_s - ready_s) / outlook.service_s))
    return turns


def retry_after_s(expected_s: float | None) -> float:
    """For a Retry-After header: whole seconds between the two bounds."""
    if expected_s is None:
        return RETRY_AFTER_UNKNOWN_S
    return max(RETRY_AFTER_S_MIN, float(math.ceil(min(expected_s, RETRY_AFTER_S_MAX))))


def percent(waited_s: float, expected_s: float | None) -> int | None:
    """How much of the wait is over, 0 to 99; None if its end is not known."""
    if expected_s is None:
        return None
    whole_s = waited_s + expected_s
    return min(99, int(100 * waited_s / whole_s)) if whole_s > 0 else 99


def start_left_s(elapsed_s: float, *, start_s: float, start_high_s: float) -> float | None:
    """How long a start will still take that began `elapsed_s` ago; None if nothing is learned, or it is overdue.

    As long as it is not later than usual, the usual time counts; then that which nine of ten stay below.
    """
    for usual_s in (start_s, start_high_s):
        if usual_s > elapsed_s:
            return usual_s - elapsed_s
    return None


def _pace(outlook: Outlook, slots: int) -> float:
    """Turns a second with so many slots."""
    if slots <= 0:
        return 0.0
    if outlook.service_s > 0:
        return slots / outlook.service_s
    return outlook.drained_per_s * slots / outlook.slots if outlook.slots else 0.0

"""How long requests hold their slots, as it is told to control: one odd request must not pass for the rule.

A websocket that stays open for an hour beside requests of 0.1 s says nothing of how fast the other slots turn
over. As part of a plain mean it would make control start replicas that nobody needs.
"""

from __future__ import annotations

from itertools import islice

from snowdrop.gateway.effects import TicketKey

ODD_FACTOR = 20.0
"""A request counts for as many times the usual at most: what became slow for good is learned in some steps."""
ODD_S_MIN = 10.0
"""Up to so long none is odd."""


class SlotTimes:
    """Of one deployment. `done` requests held their slots for `slot_s` seconds in all."""

    def __init__(self) -> None:
        self.done = 0
        self.slot_s = 0.0
        self._granted_s: dict[TicketKey, float] = {}

    def lent(self, ticket: TicketKey, now_s: float) -> None:
        self._granted_s[ticket] = now_s

    def back(self, ticket: TicketKey, now_s: float, *, done: bool, usual_s: float) -> None:
        """A slot is back. Only of a request that was carried out (`done`) is anything learned."""
        granted_s = self._granted_s.pop(ticket)
        if done:
            self.done += 1
            self.slot_s += min(max(0.0, now_s - granted_s), max(ODD_S_MIN, ODD_FACTOR * usual_s))

    def running_s(self, now_s: float) -> float:
        """For those in flight together, as if each had its slot for as long as half of them have at least."""
        count = len(self._granted_s)
        if not count:
            return 0.0
        # They are in the order in which they were granted: the older half first.
        middle_s = next(islice(self._granted_s.values(), count // 2, None))
        return count * max(0.0, now_s - middle_s)

"""When waits end that last too long: a heap of deadlines, of which those who left earlier are passed over."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sized
from heapq import heapify, heappop, heappush
from typing import Protocol

from snowdrop.gateway.effects import TicketKey

STALE_MAX = 1_024
"""Outdated deadlines that may be kept beside two for each ticket."""


class Tickets(Container[TicketKey], Sized, Protocol):
    """The tickets that are known: who waits or is served."""


class Deadlines:
    """Deadlines by ticket; the same one always comes out in the order in which it was put in."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, TicketKey]] = []
        self._number = 0

    def put(self, deadline_s: float, ticket: TicketKey, tickets: Tickets) -> None:
        if len(self._heap) > STALE_MAX + 2 * len(tickets):
            self._heap = [entry for entry in self._heap if entry[2] in tickets]
            heapify(self._heap)
        self._number += 1
        heappush(self._heap, (deadline_s, self._number, ticket))

    def due(self, now_s: float) -> Iterator[TicketKey]:
        """Takes out what has come; each is to be looked at, for it may wait no longer."""
        while self._heap and self._heap[0][0] <= now_s:
            yield heappop(self._heap)[2]

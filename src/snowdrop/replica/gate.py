"""Bounded concurrency: how many requests work at once, how many may wait here for their turn."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import anyio
import msgspec

from snowdrop.domain.errors import UnavailableError

RETRY_AFTER_S = 1.0


class GateStats(msgspec.Struct, frozen=True, kw_only=True):
    """What `/-/stats` shows. Counts of requests; `served` counts those that held a slot and gave it back."""

    concurrency: int
    in_flight: int
    in_flight_peak: int
    waiting: int
    served: int


class Gate:
    """Slots of one replica. The gateway keeps to them; the small overhang is for what crosses on the way."""

    def __init__(self, concurrency: int, *, waiting_max: int) -> None:
        self._slots = anyio.Semaphore(concurrency, max_value=concurrency)
        self._concurrency = concurrency
        self._admitted_max = concurrency + waiting_max
        self._admitted = 0
        self._in_flight = 0
        self._in_flight_peak = 0
        self._served = 0

    @contextmanager
    def admission(self) -> Iterator[None]:
        """A place to wait or work in. Raises UnavailableError, retryable, when all are taken."""
        if self._admitted >= self._admitted_max:
            raise UnavailableError(
                f"the replica has {self._admitted} requests, its bound",
                where=f"concurrency={self._concurrency}",
                next_step="send it again, to the deployment's address",
                retry_after_s=RETRY_AFTER_S,
            )
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Waits for a slot and holds it."""
        async with self._slots:
            self._in_flight += 1
            assert self._in_flight <= self._concurrency, "more in flight than `concurrency`"
            self._in_flight_peak = max(self._in_flight_peak, self._in_flight)
            try:
                yield
            finally:
                self._in_flight -= 1
                self._served += 1

    def stats(self) -> GateStats:
        return GateStats(
            concurrency=self._concurrency,
            in_flight=self._in_flight,
            in_flight_peak=self._in_flight_peak,
            waiting=self._admitted - self._in_flight,
            served=self._served,
        )

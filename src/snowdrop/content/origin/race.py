"""One attempt at a range: an exchange, and a second one for the rest of it if the first is late.

One thread serves both, so the loser is closed before anybody else looks at the memory. The hedge brings its bytes
into memory of its own; they are copied into place if it wins.
"""

from __future__ import annotations

import select
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from snowdrop.content.origin.connection import Pool
from snowdrop.content.origin.exchange import (
    Exchange,
    FailedError,
    RedirectedError,
    RefusedError,
    TooShortError,
    UnusableError,
)
from snowdrop.content.origin.recent import ReadRecord
from snowdrop.content.origin.target import Located
from snowdrop.domain.cancel import cancelled
from snowdrop.policy.hedge import Hedge, HedgeLimits, ReadProgress, verdict

LOOK_S_MAX = 0.25
"""How often a read looks up from its socket: whether it is late, and whether it is still wanted."""
LOOK_S_MIN = 0.005


class RaceLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one attempt. `stall_s_max` is without any byte; `head_s_max` from its start to the whole head."""

    connect_s_max: float = 5.0
    head_s_max: float = 30.0
    stall_s_max: float = 15.0
    hedge: HedgeLimits = HedgeLimits()


_LaneError = FailedError | RedirectedError | RefusedError | TooShortError | UnusableError


class CancelledReadError(Exception):
    """Nobody wants the bytes any more."""


class RaceCourse(NamedTuple):
    """What the reads of one origin share."""

    pool: Pool
    limits: RaceLimits
    record: ReadRecord


@dataclass
class _Lane:
    """An exchange that brings what belongs at `base`: in place, or into `scratch`."""

    exchange: Exchange
    base: int
    scratch: memoryview | None = None


class Race:
    """Brings bytes from `offset` on to the front of `into`. `moved` of them are there, also after an error."""

    def __init__(
        self, course: RaceCourse, located: Located, offset: int, into: memoryview, *, may_end: bool = False
    ) -> None:
        """With `may_end` an object that ends before is all that was wanted."""
        self.moved = 0
        self.first_byte_s = 0.0
        self.total_bytes = -1
        self._pool, self._limits, self._record = course
        self._located = located
        self._offset = offset
        self._into = into
        self._lanes: list[_Lane] = []
        self._hedged = False
        self._may_end = may_end

    def run(self, until_s: float) -> None:
        """Until the answer has ended. Raises FailedError and its siblings, CancelledReadError."""
        try:
            self._enter(0, None)
            look_s = 0.0
            while True:
                self._advance(look_s)
                for lane in self._lanes:
                    if lane.scratch is None:
                        self.moved = max(self.moved, lane.exchange.done)
                won = next((lane for lane in self._lanes if lane.exchange.complete), None)
                if won is not None:
                    self._finish(won)
                    return
                now_s = time.monotonic()
                if cancelled():
                    raise CancelledReadError
                if now_s >= until_s:
                    raise FailedError("stalled", "its time is over")
                look_s = self._consider(now_s)
        finally:
            for lane in self._lanes:
                self._leave(lane.exchange)

    def _enter(self, base: int, scratch: memoryview | None, *, fresh: bool = False) -> None:
        try:
            connection = self._pool.take(self._located.target.server, fresh=fresh)
        except OSError as error:
            raise FailedError("connect", error.strerror or str(error)) from error
        into = self._into if scratch is None else scratch
        now_s = time.monotonic()
        exchange = Exchange(connection, self._located, self._offset + base, into, now_s, may_end=self._may_end)
        self._record.count(requests=1)
        self._lanes.append(_Lane(exchange, base, scratch))

    def _advance(self, look_s: float) -> None:
        """Goes on with every lane, waiting up to `look_s`. Raises when the last one has failed."""
        alone = self._lanes[0] if len(self._lanes) == 1 else None
        waits = alone is not None and alone.exchange.in_body and look_s > 0
        for lane in self._lanes[:1] if waits else self._poll(look_s):
            exchange = lane.exchange
            try:
                if waits:
                    exchange.receive(time.monotonic(), look_s)
                else:
                    exchange.step(time.monotonic())
            except (FailedError, RedirectedError, RefusedError, TooShortError, UnusableError) as error:
                self._lost(lane, error)
        now_s = time.monotonic()
        for lane in list(self._lanes):
            late = self._overdue(lane.exchange, now_s)
            if late is not None and not lane.exchange.complete:
                self._lost(lane, late)

    def _poll(self, look_s: float) -> list[_Lane]:
        poller = select.poll()
        wait_s = look_s
        for lane in self._lanes:
            poller.register(lane.exchange.connection, lane.exchange.events)
            if lane.exchange.connection.pending():
                wait_s = 0.0
        ready = {fd for fd, _ in poller.poll(wait_s * 1_000)}
        return [
            lane
            for lane in self._lanes
            if lane.exchange.connection.fileno() in ready or lane.exchange.connection.pending()
        ]

    def _lost(self, lane: _Lane, error: _LaneError) -> None:
        """Drops a lane that failed, or that got another answer than bytes; raises if no other one goes on."""
        self._lanes.remove(lane)
        self._leave(lane.exchange)
        if lane.scratch is None:
            self.moved = max(self.moved, lane.exchange.done)
        is_reset = isinstance(error, FailedError) and error.kind == "reset"
        if is_reset and not lane.exchange.connection.fresh and not lane.exchange.answered:
            # The server had closed it while it was idle: that says nothing of the server.
            self._enter(lane.base, lane.scratch, fresh=True)
        elif not self._lanes:
            raise error

    def _overdue(self, exchange: Exchange, now_s: float) -> FailedError | None:
        limits = self._limits
        if not exchange.connected and now_s - exchange.started_s > limits.connect_s_max:
            return FailedError("connect", f"no connection (connect_s_max={limits.connect_s_max:g})")
        if not exchange.answered and now_s - exchange.started_s > limits.head_s_max:
            return FailedError("stalled", f"no answer (head_s_max={limits.head_s_max:g})")
        if now_s - exchange.moved_s > limits.stall_s_max:
            return FailedError("stalled", f"no byte came (stall_s_max={limits.stall_s_max:g})")
        return None

    def _consider(self, now_s: float) -> float:
        """Hedges if it is time for that; how long to wait for bytes before the next look."""
        first = self._lanes[0].exchange
        if self._hedged:
            return LOOK_S_MAX
        progress = ReadProgress(
            started_s=first.started_s, moved_s=first.moved_s, done_bytes=first.done, total_bytes=len(self._into)
        )
        what = verdict(self._limits.hedge, self._record.recent, self._record.spent, progress, now_s=now_s)
        if not isinstance(what, Hedge):
            return min(max(what.until_s - now_s, LOOK_S_MIN), LOOK_S_MAX)
        self._hedged = True
        self._record.count(hedges=1)
        with suppress(FailedError):  # the first one may still come
            self._enter(first.done, memoryview(bytearray(len(self._into) - first.done)))
        return LOOK_S_MIN

    def _finish(self, won: _Lane) -> None:
        exchange = won.exchange
        self.first_byte_s = exchange.first_byte_s - exchange.started_s
        self.total_bytes = exchange.total_bytes
        if won.scratch is not None:
            end = won.base + exchange.done
            self._into[won.base : end] = won.scratch[: exchange.done]
            self.moved = max(self.moved, end)
            self._record.count(hedges_won=1)
        elif not self._hedged:
            body_s = exchange.moved_s - exchange.first_byte_s
            self._record.sample(exchange.first_byte_s - exchange.started_s, body_s, exchange.done)
        if exchange.ignored_range:
            self._record.count(ignored_ranges=1)

    def _leave(self, exchange: Exchange) -> None:
        if exchange.reusable:
            self._pool.give_back(exchange.connection)
        else:
            exchange.connection.close()

"""Measures reads from the origin; `policy.parallelism` decides how many there are at a time, and how large."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from snowdrop.policy.parallelism import ParallelismLimits, Steering, Window, start, steer

WINDOW_S_MIN = 0.25
WINDOW_BUSY_S_MIN = 0.05
WINDOW_BUSY_REQUESTS = 8
"""So many reads of each connection are enough sooner: a fast link would be asked for little at a time for long."""
REQUESTS_PER_CONNECTION_MIN = 2
"""A window is long enough to be judged when so many reads of each connection ended in it."""
IDLE_S_MIN = 0.1
"""A pause so long between two reads is no part of any window."""


class Steer:
    """Readers call `began` and `ended`; who starts reads keeps to `connections` and `range_bytes`. Thread-safe."""

    def __init__(self, connections_max: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = ParallelismLimits(connections_max=connections_max)
        self._clock = clock
        self._lock = threading.Lock()
        self._steering = start(self._limits)
        self._in_flight = 0
        self._changed_s = 0.0
        self._restart(0.0)

    @property
    def connections(self) -> int:
        """How many reads of the origin may be under way now."""
        return self._steering.connections

    @property
    def range_bytes(self) -> int:
        """How much one read should bring: a power of two."""
        return self._steering.range_bytes

    @property
    def steering(self) -> Steering:
        """The decision in force, with its reason."""
        return self._steering

    def began(self) -> None:
        """A read of the origin begins."""
        with self._lock:
            now_s = self._clock()
            if self._in_flight == 0 and now_s - self._changed_s > IDLE_S_MIN:
                self._restart(now_s)  # time in which nobody wanted anything says nothing
            self._integrate(now_s)
            self._in_flight += 1

    def ended(self, size_bytes: int, first_byte_s: float, *, throttled: int = 0) -> None:
        """It ended; `size_bytes` is 0 if it failed, `throttled` how often it was told to slow down."""
        with self._lock:
            now_s = self._clock()
            self._integrate(now_s)
            self._in_flight -= 1
            self._bytes += size_bytes
            self._reads += 1
            self._first_byte_s += first_byte_s
            self._throttled += throttled
            elapsed_s = now_s - self._began_s
            share = self._reads / self._steering.connections
            is_long = elapsed_s >= WINDOW_S_MIN and (share >= REQUESTS_PER_CONNECTION_MIN or self._throttled)
            if not is_long and not (elapsed_s >= WINDOW_BUSY_S_MIN and share >= WINDOW_BUSY_REQUESTS):
                return
            window = Window(
                bytes=self._bytes,
                elapsed_s=elapsed_s,
                in_flight=self._busy_s / elapsed_s,
                first_byte_s=self._first_byte_s / self._reads,
                throttled=self._throttled,
            )
            self._steering = steer(self._limits, self._steering, window)
            self._restart(now_s)

    def _integrate(self, now_s: float) -> None:
        self._busy_s += self._in_flight * (now_s - self._changed_s)
        self._changed_s = now_s

    def _restart(self, now_s: float) -> None:
        self._began_s = self._changed_s = now_s
        self._busy_s = self._first_byte_s = 0.0
        self._bytes = self._reads = self._throttled = 0

"""Reading a range of a remote file whole: attempts that go on where the last one ended, with pauses between."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from snowdrop.domain.errors import UnavailableError
from snowdrop.policy.retry import Failure, FailureKind, GiveUp, ReadHistory, RetryLimits, after_failure

LIMITS = RetryLimits(retry_after_s_max=300.0, elapsed_s_max=1_800.0)
"""A hub's rate limit counts in windows of five minutes: waiting for the next one is better than failing."""


class PassingError(Exception):
    """An attempt failed in a way that may pass."""

    def __init__(self, kind: FailureKind, reason: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.kind = kind
        self.retry_after_s = retry_after_s


class Window:
    """The part of a buffer that is still to be filled."""

    def __init__(self, offset: int, into: memoryview) -> None:
        self._start = offset
        self._into = into
        self._done = 0

    @property
    def offset(self) -> int:
        return self._start + self._done

    @property
    def left(self) -> int:
        return len(self._into) - self._done

    @property
    def done(self) -> int:
        return self._done

    def take(self, data: bytes | memoryview) -> None:
        """Raises PassingError for more bytes than were asked for: that answer is not to be believed."""
        if len(data) > self.left:
            raise PassingError("garbled", "more bytes came than were asked for")
        self._into[self._done : self._done + len(data)] = data
        self._done += len(data)


class Attempts:
    """Repeats what may pass, until it is stopped. `pause`, `clock_s` and `draw` are the outside world."""

    def __init__(
        self,
        limits: RetryLimits = LIMITS,
        *,
        pause: Callable[[float], object] | None = None,
        clock_s: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._limits = limits
        self._stopped = threading.Event()
        self._pause = pause or self._stopped.wait
        self._clock_s = clock_s
        self._draw = draw

    def stop(self) -> None:
        """For good: whoever pauses now or fails later raises UnavailableError at once."""
        self._stopped.set()

    def fill(self, window: Window, attempt: Callable[[Window], None], *, where: str) -> None:
        """Calls `attempt` until the window is full."""

        def once() -> None:
            attempt(window)
            if window.left:
                raise PassingError("truncated", f"{window.left} bytes are missing at the end")

        self.run(once, where=where, moved=lambda: window.done)

    def run(self, attempt: Callable[[], None], *, where: str, moved: Callable[[], int] = lambda: 0) -> None:
        """Calls `attempt` until it raises no PassingError; UnavailableError when a limit has run out."""
        history = ReadHistory(started_s=self._clock_s())
        while True:
            if self._stopped.is_set():
                raise UnavailableError("source: the push has ended", where=where, next_step="push again")
            before = moved()
            try:
                return attempt()
            except PassingError as error:
                failure = Failure(kind=error.kind, moved_bytes=moved() - before, retry_after_s=error.retry_after_s)
                decision = after_failure(self._limits, history, failure, now_s=self._clock_s(), draw=self._draw())
                if isinstance(decision, GiveUp):
                    raise UnavailableError(
                        f"source: {error} ({decision.reason})",
                        where=f"{where}: {decision.bound}",
                        next_step="see that the source can be reached, then run the command again: it goes on",
                        retry_after_s=error.retry_after_s,
                    ) from error
                history = decision.history
                self._pause(decision.pause_s)


class Memo:
    """A small map that several threads share."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, str] = {}

    def get(self, key: str) -> str | None:
        with self._lock:
            return self._values.get(key)

    def put(self, key: str, value: str) -> None:
        with self._lock:
            self._values[key] = value

    def drop(self, key: str) -> None:
        with self._lock:
            self._values.pop(key, None)

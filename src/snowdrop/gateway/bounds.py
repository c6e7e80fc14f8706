"""Time limits on tasks that nearly always end long before: one timer of the event loop for all of them.

`asyncio.timeout` makes and cancels a timer each time, which costs a relayed request more than its place in the
queue. Here the only timer is that of the earliest limit when it was set; who leaves in time only leaves a set.
"""

from __future__ import annotations

import asyncio
import math
from types import TracebackType

TIMER_STEP_S = 0.001
"""Timers are no finer; what is due within it is due now, so that no timer is set for less."""


class Bounds:
    """The limits of one event loop's tasks."""

    def __init__(self) -> None:
        self._open: set[Bound] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = math.inf

    def within(self, seconds: float) -> Bound:
        """A context that ends with TimeoutError after `seconds`, as `asyncio.timeout` does."""
        return Bound(self, seconds)

    def enter(self, bound: Bound) -> None:
        self._open.add(bound)
        if bound.until_s < self._timer_s:
            self._set(bound.until_s)

    def leave(self, bound: Bound) -> None:
        # The timer stays: it finds nothing to do, and is set anew for those who are here by then.
        self._open.discard(bound)

    def _set(self, when_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_s = asyncio.get_running_loop().call_at(when_s, self._due), when_s

    def _due(self) -> None:
        due_s = asyncio.get_running_loop().time() + TIMER_STEP_S
        self._timer, self._timer_s = None, math.inf
        for bound in [each for each in self._open if each.until_s <= due_s]:
            self._open.discard(bound)
            bound.expire()
        if self._open:
            self._set(min(bound.until_s for bound in self._open))


class Bound:
    """One limit, around what the current task does."""

    __slots__ = ("_bounds", "_cancelling", "_expired", "_seconds", "_task", "until_s")

    def __init__(self, bounds: Bounds, seconds: float) -> None:
        self._bounds = bounds
        self._seconds = seconds
        self._expired = False
        self._task: asyncio.Task[object]
        self._cancelling = 0
        self.until_s = 0.0

    def __enter__(self) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a bound is on a task")
        self._task, self._cancelling = task, task.cancelling()
        self.until_s = asyncio.get_running_loop().time() + self._seconds
        self._bounds.enter(self)

    def expire(self) -> None:
        """The time is over: the task is cancelled, which becomes a TimeoutError where the context ends."""
        self._expired = True
        self._task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._expired:
            self._bounds.leave(self)
        # Somebody else may have cancelled it as well: then it is that cancellation which goes on.
        elif self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

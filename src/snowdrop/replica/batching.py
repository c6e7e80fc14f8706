"""Requests to one endpoint, put together: one call of the user's method for many of them.

There is no task that runs batches: the request that has waited longest leads. It asks the decider
(`policy.batching`), holds the batch back or starts it, and runs it in its own task, shielded, so that a leader
whose caller goes away still answers the others. Whoever leaves the queue hands the lead to the next.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import anyio
import msgspec

from snowdrop.domain.batching import Batch
from snowdrop.domain.calling import CALL_CONTEXT, CallContext
from snowdrop.domain.cancel import CANCEL_FLAG
from snowdrop.domain.errors import TimedOutError, UserCodeError
from snowdrop.policy.batching import BatchState, Costs, Hold, decide, next_gap_s
from snowdrop.replica.call import Raised

Arguments = dict[str, Any]
Call = Callable[[Arguments], Awaitable[object]]
"""The user's method, given a list for each parameter. Raises Raised."""


class BatchStats(msgspec.Struct, kw_only=True):
    """Since the replica started. `sizes` counts calls by size, up to each power of two; times in seconds.

    `items` are the requests that went into calls, `failed` those of them that got an error, `waited_s` how long
    they waited for their call all together, `busy_s` how long calls took, `reasons` why they started.
    """

    batches: int = 0
    items: int = 0
    failed: int = 0
    waited_s: float = 0.0
    busy_s: float = 0.0
    sizes: dict[str, int] = msgspec.field(default_factory=dict)
    reasons: dict[str, int] = msgspec.field(default_factory=dict)

    def note(self, size: int, seconds: float) -> None:
        self.batches += 1
        self.busy_s += seconds
        bucket = str(1 << (size - 1).bit_length())
        self.sizes[bucket] = self.sizes.get(bucket, 0) + 1


class _Item:
    """One request. `outcome` is its result, or a Raised; `ran` the batch that took it."""

    __slots__ = ("arguments", "arrived_s", "context", "group", "has_outcome", "is_gone", "news", "outcome")

    def __init__(self, arguments: Arguments, arrived_s: float, context: CallContext) -> None:
        self.arguments = arguments
        self.arrived_s = arrived_s
        self.context = context
        self.news = anyio.Event()
        self.group: _Group | None = None
        self.has_outcome = False
        self.is_gone = False
        self.outcome: object = None

    def settle(self, outcome: object) -> None:
        self.outcome = outcome
        self.has_outcome = True
        self.news.set()


class _Group:
    """A batch that has started. Ends early when none of its callers is there any more."""

    def __init__(self, items: Sequence[_Item]) -> None:
        self.items = items
        self.scope = anyio.CancelScope(shield=True)
        self.flag = threading.Event()

    def one_left(self) -> None:
        if all(item.is_gone or item.has_outcome for item in self.items):
            self.flag.set()
            self.scope.cancel()


class Batcher:
    """The batches of one endpoint. All on one event loop."""

    def __init__(
        self,
        batch: Batch,
        call: Call,
        where: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._batch = batch
        self._call = call
        self._where = where
        self._clock = clock
        self._wall = wall
        self._waiting: deque[_Item] = deque()
        self._running = 0
        self._costs = Costs()
        self._gap_s = math.inf
        self._arrived_s = -math.inf
        self.stats = BatchStats()

    async def submit(self, arguments: Arguments) -> object:
        """The result for one request. Raises Raised, or TimedOutError if its deadline passed before its turn."""
        item = _Item(arguments, self._clock(), CALL_CONTEXT.get() or CallContext())
        if not math.isinf(self._arrived_s):
            self._gap_s = next_gap_s(self._gap_s, item.arrived_s - self._arrived_s)
        self._arrived_s = item.arrived_s
        self._waiting.append(item)
        try:
            self._wake_leader()
            while not item.has_outcome:
                await self._lead_or_wait(item)
        except anyio.get_cancelled_exc_class():
            self._left(item)
            raise
        if isinstance(item.outcome, Raised | TimedOutError):
            raise item.outcome
        return item.outcome

    def _left(self, item: _Item) -> None:
        """Its caller has gone: not started, it is dropped; started, its result is."""
        item.is_gone = True
        if item.has_outcome:
            return
        if item.group is None:
            self._waiting.remove(item)
            self._wake_leader()
        else:
            item.group.one_left()

    def _wake_leader(self) -> None:
        if self._waiting:
            self._waiting[0].news.set()

    async def _lead_or_wait(self, item: _Item) -> None:
        item.news = anyio.Event()
        if item.group is not None or self._waiting[0] is not item:
            await item.news.wait()
            return
        self._drop_late()
        if item.has_outcome:
            return
        decision = decide(self._batch, self._state(), self._costs)
        if isinstance(decision, Hold):
            with anyio.move_on_after(decision.wait_s):
                await item.news.wait()
            return
        self.stats.reasons[decision.reason] = self.stats.reasons.get(decision.reason, 0) + 1
        group = self._take(decision.size)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._run, group)
            while not item.has_outcome:
                item.news = anyio.Event()
                try:
                    await item.news.wait()
                except anyio.get_cancelled_exc_class():
                    item.is_gone = True  # at once: the end of this task group waits for the batch
                    group.one_left()
                    raise

    def _state(self) -> BatchState:
        now_s = self._clock()
        deadlines = [
            item.context.deadline_unix_s for item in self._waiting if item.context.deadline_unix_s is not None
        ]
        return BatchState(
            waiting=len(self._waiting),
            running=self._running,
            oldest_wait_s=now_s - self._waiting[0].arrived_s,
            since_arrival_s=now_s - self._arrived_s,
            gap_s=self._gap_s,
            slack_s=min(deadlines) - self._wall() if deadlines else math.inf,
        )

    def _drop_late(self) -> None:
        """Who waits beyond its deadline gets no place in a batch: nobody would take the result."""
        now_s = self._wall()
        late = [
            item
            for item in self._waiting
            if item.context.deadline_unix_s is not None and item.context.deadline_unix_s <= now_s
        ]
        for item in late:
            self._waiting.remove(item)
            item.settle(
                TimedOutError(
                    "the caller's time was over before a batch could take the request",
                    where=f"batch of {self._where}",
                    next_step="allow more time, or raise scale.max so that requests wait less",
                )
            )
        if late:
            self._wake_leader()

    def _take(self, size: int) -> _Group:
        group = _Group([self._waiting.popleft() for _ in range(size)])
        now_s = self._clock()
        for item in group.items:
            item.group = group
            self.stats.waited_s += now_s - item.arrived_s
        self.stats.items += size
        self._running += 1
        self._wake_leader()
        return group

    async def _run(self, group: _Group) -> None:
        with group.scope:
            try:
                CALL_CONTEXT.set(_shared_context(group.items))
                CANCEL_FLAG.set(group.flag)
                await self._run_part(group.items)
            finally:
                self._running -= 1
                self._wake_leader()

    async def _run_part(self, items: Sequence[_Item]) -> None:
        """One call, or with `on_error="split"` as many as it takes to find out whose request fails."""
        items = [item for item in items if not item.is_gone]
        if not items:
            return
        names = items[0].arguments
        began_s = self._clock()
        try:
            results = await self._call({name: [item.arguments[name] for item in items] for name in names})
        except Raised as raised:
            self.stats.note(len(items), self._clock() - began_s)
            if self._batch.on_error == "split" and len(items) > 1:
                middle = len(items) // 2
                await self._run_part(items[:middle])
                await self._run_part(items[middle:])
                return
            self._fail(items, raised)
            return
        seconds = self._clock() - began_s
        self.stats.note(len(items), seconds)
        if not isinstance(results, list | tuple) or len(results) != len(items):
            self._fail(items, Raised(self._wrong_results(results, len(items))))
            return
        self._costs = self._costs.learned(len(items), seconds)
        for item, result in zip(items, results, strict=True):
            if isinstance(result, BaseException):
                self._fail([item], Raised(result))
            else:
                item.settle(result)

    def _fail(self, items: Sequence[_Item], raised: Raised) -> None:
        self.stats.failed += len(items)
        for item in items:
            # Each gets a carrier of its own: raising one from many tasks would mix up their tracebacks.
            item.settle(Raised(raised.cause))

    def _wrong_results(self, results: object, count: int) -> UserCodeError:
        got = f"{len(results)} results" if isinstance(results, list | tuple) else type(results).__name__
        return UserCodeError(
            f"{self._where} returned {got} for a batch of {count} requests",
            where=self._where,
            next_step="return a list with one result for each request, in their order",
        )


def _shared_context(items: Sequence[_Item]) -> CallContext:
    """For calls that the batch makes to other services: the first request's, with the time of the most patient."""
    deadlines = [item.context.deadline_unix_s for item in items]
    known = [each for each in deadlines if each is not None]
    latest = max(known) if len(known) == len(items) else None
    return msgspec.structs.replace(items[0].context, deadline_unix_s=latest)

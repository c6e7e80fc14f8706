"""Calling user code: coroutines on the loop, everything else in threads, generators step by step."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread

from snowdrop.domain.signature import Signature
from snowdrop.replica.userfault import UserRaised, log_traceback

ASYNC_CLOSE_S_MAX = 10.0
"""How long the clean-up of an asynchronous generator may take after its caller has gone."""

T = TypeVar("T")


class Raised(Exception):  # noqa: N818 -- a carrier, not an error of its own
    """User code raised `cause`. Keeps its SystemExit, StopIteration and the like out of the loop's hands."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Done:
    """The type of DONE."""


DONE = Done()
"""What `Items.next` returns after the last item."""


async def in_thread(limiter: anyio.CapacityLimiter, function: Callable[..., T], *args: Any) -> T:
    """`function(*args)` in a thread; returns or is cancelled only when the thread is done with it."""
    value = await anyio.to_thread.run_sync(_guarded, function, args, limiter=limiter)
    await anyio.lowlevel.checkpoint_if_cancelled()  # the thread was shielded from a cancellation meanwhile
    return value


async def stage(function: Callable[..., Any], arguments: Mapping[str, object]) -> Any:
    """A stage's method or the class itself, called: coroutines on the loop, others in a thread. Raises Raised.

    When cancelled, the thread is abandoned: the process ends right after.
    """
    call = partial(function, **arguments)
    if inspect.iscoroutinefunction(function):
        return await on_loop(call())
    return await anyio.to_thread.run_sync(_guarded, call, (), abandon_on_cancel=True)


def _guarded(function: Callable[..., T], args: tuple[Any, ...]) -> T:
    try:
        return function(*args)
    except UserRaised as error:
        raise Raised(error) from error


async def on_loop(awaitable: Awaitable[T]) -> T:
    """The result of user code's awaitable."""
    try:
        return await awaitable
    except UserRaised as error:
        raise Raised(error) from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling() == 0:
            # Not ours: user code awaited something that was cancelled, and its caller waits for an answer.
            raise Raised(error) from error
        raise


class Items(Protocol):
    """A stream of items from user code; both methods raise nothing of its but Raised."""

    async def next(self) -> object:
        """The next item, or DONE."""

    async def close(self) -> None:
        """Ends the generator, wherever it stands. Never raises; a failing clean-up goes to the log."""


class AsyncItems:
    """Items of an asynchronous iterator, on the loop."""

    def __init__(self, iterator: AsyncIterator[object]) -> None:
        self._iterator = iterator

    async def next(self) -> object:
        return await on_loop(anext(self._iterator, DONE))

    async def close(self) -> None:
        close = getattr(self._iterator, "aclose", None)
        if close is None:
            return
        with anyio.move_on_after(ASYNC_CLOSE_S_MAX, shield=True):
            try:
                await on_loop(close())
            except Raised as error:
                log_traceback(error.cause, "closing a generator failed")


class ThreadItems:
    """Items of a plain iterator: each step runs in a thread, never two at once."""

    def __init__(self, iterator: Iterator[object], limiter: anyio.CapacityLimiter) -> None:
        self._iterator = iterator
        self._limiter = limiter
        self._is_done = False

    async def next(self) -> object:
        item = await in_thread(self._limiter, next, self._iterator, DONE)
        self._is_done = item is DONE
        return item

    async def close(self) -> None:
        close = getattr(self._iterator, "close", None)
        if close is None or self._is_done:
            return
        # No bound: a thread can't be ended from outside, and its slot is taken for as long as it runs.
        with anyio.CancelScope(shield=True):
            try:
                await in_thread(self._limiter, close)
            except Raised as error:
                log_traceback(error.cause, "closing a generator failed")


class Decoder(Protocol):
    """From a request to a method's arguments. Raises InvalidInputError."""

    def from_body(self, body: bytes) -> dict[str, Any]: ...
    def from_query(self, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]: ...


class Endpoint:
    """One endpoint method of one instance. `limiter` bounds the threads of all endpoints together."""

    def __init__(self, path: str, signature: Signature, decoder: Decoder) -> None:
        self.path = path
        self.signature = signature
        self.decoder = decoder

    async def call(
        self, method: Callable[..., object], arguments: dict[str, Any], limiter: anyio.CapacityLimiter
    ) -> object:
        """The method's return value. Raises Raised."""
        if self.signature.on_loop:
            return await on_loop(_call_on_loop(method, arguments))
        return await in_thread(limiter, partial(method, **arguments))

    async def open(
        self, method: Callable[..., object], arguments: dict[str, Any], limiter: anyio.CapacityLimiter
    ) -> Items:
        """The items that the method streams; nothing has been asked of them yet. Raises Raised."""
        value = await self.call(method, arguments, limiter)
        if hasattr(value, "__aiter__"):
            return AsyncItems(aiter(value))
        if hasattr(value, "__iter__"):
            return ThreadItems(iter(value), limiter)
        raise Raised(TypeError(f"{self.signature.where} returned {type(value).__name__}, not an iterator"))


async def _call_on_loop(method: Callable[..., object], arguments: dict[str, Any]) -> object:
    value = method(**arguments)
    return await value if inspect.isawaitable(value) else value

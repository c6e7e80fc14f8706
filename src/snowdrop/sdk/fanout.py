"""Several calls at a time, in a task group: results in order, the first failure ends the others."""

import inspect
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, Literal, ParamSpec, TypeVar, overload

import anyio
import anyio.to_thread

from snowdrop.sdk.typed import BoundCall

P = ParamSpec("P")
T = TypeVar("T")


@overload
async def gather(
    *calls: Awaitable[T], at_once_max: int | None = None, return_errors: Literal[False] = False
) -> list[T]: ...
@overload
async def gather(
    *calls: Awaitable[T], at_once_max: int | None = None, return_errors: Literal[True]
) -> list[T | Exception]: ...
async def gather(*calls: Awaitable[Any], at_once_max: int | None = None, return_errors: bool = False) -> list[Any]:
    """The results of `calls`, in their order, at most `at_once_max` of them under way at a time.

    The first one that fails cancels the others, and its error is raised as it is; with `return_errors` all run to
    their end, and the errors stand among the results.
    """
    results: list[Any] = [None] * len(calls)
    failed: list[Exception] = []
    limiter = anyio.CapacityLimiter(max(1, len(calls)) if at_once_max is None else at_once_max)

    async def run(place: int, call: Awaitable[Any]) -> None:
        async with limiter:
            try:
                results[place] = await call
            except Exception as error:  # noqa: BLE001 -- whatever it is, it is the caller's: raised below, or returned
                if return_errors:
                    results[place] = error
                else:
                    failed.append(error)
                    tasks.cancel_scope.cancel()

    try:
        async with anyio.create_task_group() as tasks:
            for place, call in enumerate(calls):
                tasks.start_soon(run, place, call)
    finally:
        for call in calls:
            if inspect.iscoroutine(call):
                call.close()  # one that never began would be complained about
    if failed:
        raise failed[0]
    return results


@overload
async def acall(method: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
@overload
async def acall(method: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
async def acall(method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Awaits a plain method of a typed `ref`, which otherwise would wait in a thread.

    A stand-in works as well: coroutines are awaited, anything else runs in a thread.
    """
    if isinstance(method, BoundCall):
        return await method.on_loop(*args, **kwargs)
    if inspect.iscoroutinefunction(method):
        return await method(*args, **kwargs)
    return await anyio.to_thread.run_sync(partial(method, *args, **kwargs))

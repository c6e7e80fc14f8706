"""Serves an aiohttp application on a unix socket."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
from aiohttp import web

SHUTDOWN_S_MAX = 2.0
BACKLOG = 1_024
FIELD_BYTES_MAX = 128 << 10
"""Longest header field: a task travels beside its body in one."""


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def cancelled_in_scopes(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Makes the cancellation by a client that goes away one of anyio's, which respects shields.

    aiohttp cancels the task itself, which breaks into a shielded transaction, though others wait for its outcome.
    A task group turns that into the cancellation of its scope, and waits for what is shielded inside.
    """
    response: web.StreamResponse | None = None
    failure: Exception | None = None

    async def handle() -> None:
        nonlocal response, failure
        try:
            response = await handler(request)
        except Exception as error:  # noqa: BLE001 -- raised outside, or the group would wrap it
            failure = error

    async with anyio.create_task_group() as group:
        group.start_soon(handle)
    if failure is not None:
        raise failure
    assert response is not None, "a handler that was cancelled leaves the group by its cancellation"
    return response


@asynccontextmanager
async def serving_unix(app: web.Application, path: Path) -> AsyncIterator[None]:
    """Serves while inside. Only the owner of the state folder can connect."""
    app.middlewares.insert(0, cancelled_in_scopes)
    path.unlink(missing_ok=True)
    runner = web.AppRunner(
        app,
        access_log=None,
        handler_cancellation=True,
        shutdown_timeout=SHUTDOWN_S_MAX,
        max_field_size=FIELD_BYTES_MAX,
    )
    await runner.setup()
    try:
        await web.UnixSite(runner, str(path), backlog=BACKLOG).start()
        path.chmod(0o600)
        yield
    finally:
        await runner.cleanup()
        path.unlink(missing_ok=True)

"""Serves an aiohttp application on a unix socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web

SHUTDOWN_S_MAX = 2.0
BACKLOG = 1_024
FIELD_BYTES_MAX = 128 << 10
"""Longest header field: a task travels beside its body in one."""


@asynccontextmanager
async def serving_unix(app: web.Application, path: Path) -> AsyncIterator[None]:
    """Serves while inside. Only the owner of the state folder can connect."""
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

"""Serves an aiohttp application on a unix socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web

SHUTDOWN_S_MAX = 2.0
BACKLOG = 1_024


@asynccontextmanager
async def serving_unix(app: web.Application, path: Path) -> AsyncIterator[None]:
    """Serves while inside. Only the owner of the state folder can connect."""
    path.unlink(missing_ok=True)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=SHUTDOWN_S_MAX)
    await runner.setup()
    try:
        await web.UnixSite(runner, str(path), backlog=BACKLOG).start()
        path.chmod(0o600)
        yield
    finally:
        await runner.cleanup()
        path.unlink(missing_ok=True)

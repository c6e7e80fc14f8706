"""The gateway's HTTP server: `/{deployment}/{path}` for requests, `/healthz` and `/readyz` for probes."""

from __future__ import annotations

import gc
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
from aiohttp import web

from snowdrop.domain.errors import NotFoundError
from snowdrop.domain.ids import fresh_id
from snowdrop.gateway.httpsink import error_response
from snowdrop.gateway.relay import Relay

BACKLOG = 1024
# Requests make few cycles; looking for them after every 700 new objects cost about a tenth of the throughput.
COLLECT_AFTER_OBJECTS = 20_000
COLLECT_OLDER_EVERY = 20


def build_app(relay: Relay, *, ready: Callable[[], bool]) -> web.Application:
    """The application of one worker. `ready` says whether the gateway has heard from control."""

    async def healthz(_request: web.Request) -> web.Response:
        return web.json_response({"ok": True})

    async def readyz(_request: web.Request) -> web.Response:
        return web.json_response({"ready": ready()}, status=200 if ready() else 503)

    async def unknown(request: web.Request) -> web.Response:
        error = NotFoundError(
            f"nothing is served at {request.path!r}",
            where="request path",
            next_step="services are at /DEPLOYMENT/ENDPOINT; `snowdrop ps` lists deployments",
        )
        return error_response(error, fresh_id("req"))

    app = web.Application(client_max_size=relay.request_bytes_max)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_route("*", "/{deployment}/{path:.*}", relay.handle)
    app.router.add_route("*", "/{tail:.*}", unknown)
    return app


def spare_collector() -> None:
    """For a process that only relays: what exists by now stays for good, and cycles are looked for seldom."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER_OBJECTS, COLLECT_OLDER_EVERY, COLLECT_OLDER_EVERY)


@asynccontextmanager
async def serving(app: web.Application, listener: socket.socket, *, shutdown_s_max: float) -> AsyncIterator[None]:
    """Serves on `listener` while inside; on leaving, lets requests in flight end within the bound."""
    runner = web.AppRunner(
        app,
        access_log=None,
        # A client that goes away cancels its handler, which cancels the work in the replica.
        handler_cancellation=True,
        shutdown_timeout=shutdown_s_max,
        keepalive_timeout=75.0,
    )
    await runner.setup()
    try:
        await web.SockSite(runner, listener, backlog=BACKLOG).start()
        yield
    finally:
        # We are being stopped, which cancels whatever waits: requests in flight get their time all the same.
        with anyio.CancelScope(shield=True):
            await runner.cleanup()

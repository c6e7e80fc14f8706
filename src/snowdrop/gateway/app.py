"""The gateway's HTTP server: `/{deployment}/{path}` for requests, `/healthz` and `/readyz` for probes."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

from snowdrop.domain.errors import NotFoundError
from snowdrop.domain.ids import fresh_id
from snowdrop.gateway.httpsink import error_response
from snowdrop.gateway.openai.routes import add_routes as add_openai_routes
from snowdrop.gateway.readiness import Readiness
from snowdrop.gateway.relay import Relay
from snowdrop.gateway.tasks.edge import TaskEdge


def build_app(relay: Relay, *, ready: Callable[[], bool], tasks: TaskEdge | None = None) -> web.Application:
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
    add_openai_routes(app, relay)
    if tasks is not None:
        tasks.add_routes(app)
        relay.respond_async = tasks.respond_async
    app.router.add_get("/{deployment}/readyz", Readiness(relay).handle)  # HEAD as well
    app.router.add_route("*", "/{deployment}/{path:.*}", relay.handle)
    app.router.add_route("*", "/{tail:.*}", unknown)
    return app

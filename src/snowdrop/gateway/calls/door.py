"""Serves calls that services make: HTTP on connections whose caller the agent has introduced.

The first request of a connection comes from the agent and says who will call on it (`wire.calls`). From then on
the connection is a replica's: every request `/{deployment}/{path}` is a call of its tenant, carried as any other
one, if the replica's service declares that it calls this deployment.
"""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import anyio
import msgspec
from aiohttp import web

from snowdrop.domain.calling import LEASE_HEADER
from snowdrop.domain.errors import ConflictError, ForbiddenError, NotFoundError, SnowdropError, UnavailableError
from snowdrop.domain.ids import DeploymentName
from snowdrop.gateway.bodies import IncomingBody
from snowdrop.gateway.call import Call, Caller, CallerGoneError
from snowdrop.gateway.carrier import Carrier
from snowdrop.gateway.httpsink import HttpSink, error_response
from snowdrop.gateway.preferences import read_preferences
from snowdrop.gateway.relay import headers_up, request_id_of, target_of
from snowdrop.wire.calls import INTRODUCTION_BYTES_MAX, INTRODUCTION_PATH, Introduction

BACKLOG = 256
KEEPALIVE_S = 75.0
"""Above that of replicas, which so are the ones to close a connection."""
CONNECTIONS_MAX = 512
"""Of one replica, at a time."""
LEASE_DIGITS_MAX = 19


class CallDoor:
    """The handlers of one worker."""

    def __init__(self, carrier: Carrier, *, request_bytes_max: int) -> None:
        self._carrier = carrier
        self._request_bytes_max = request_bytes_max
        self._callers: dict[object, Introduction] = {}

    def app(self) -> web.Application:
        app = web.Application(client_max_size=INTRODUCTION_BYTES_MAX)
        app.router.add_post(INTRODUCTION_PATH, self.introduce)
        app.router.add_route("*", "/{deployment}/{path:.*}", self.handle)
        app.router.add_route("*", "/{tail:.*}", self.unknown)
        return app

    async def introduce(self, request: web.Request) -> web.Response:
        """The agent says whose the connection is. Once: what comes later comes from the replica."""
        try:
            if request.protocol in self._callers:
                raise ConflictError("this connection has a caller already", where=INTRODUCTION_PATH)
            introduction = msgspec.json.decode(await request.read(), type=Introduction)
            self._drop_closed()
            if (
                sum(1 for each in self._callers.values() if each.replica == introduction.replica)
                >= CONNECTIONS_MAX
            ):
                raise UnavailableError(
                    "the replica has too many connections",
                    where=f"connections_max={CONNECTIONS_MAX}",
                    next_step="let calls end before more are made",
                )
        except SnowdropError as error:
            return error_response(error, request_id_of(request))
        self._callers[request.protocol] = introduction
        return web.Response(status=204)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """One call. Errors become typed answers; a caller that goes away cancels the work."""
        request_id = request_id_of(request)
        try:
            call = await self._call(request, request_id)
            sink = HttpSink(request, call)
            await self._carrier.carry(call, sink)
        except SnowdropError as error:
            return error_response(error, request_id)
        except CallerGoneError:
            return sink.abandoned()
        return sink.response

    async def unknown(self, request: web.Request) -> web.Response:
        error = NotFoundError("a call names a deployment and a path", where="request path")
        return error_response(error, request_id_of(request))

    async def _call(self, request: web.Request, request_id: str) -> Call:
        arrived_unix_ns = time.time_ns()
        caller = self._callers.get(request.protocol)
        if caller is None:
            raise ForbiddenError("nobody has said who calls here", where="connection")
        deployment = DeploymentName(request.match_info["deployment"])
        if deployment not in caller.calls:
            known = ", ".join(repr(name) for name in caller.calls) or "none"
            raise ForbiddenError(
                f"{caller.deployment!r} does not declare that it calls {deployment!r}",
                where=f"service(calls) of {caller.deployment!r}",
                next_step=f'keep `sd.ref("{deployment}")` in its class or module, or add it to '
                f"`@sd.service(calls=...)`, and deploy again; declared are: {known}",
            )
        body = await IncomingBody.begin(request, self._request_bytes_max)
        asked = read_preferences(request.headers)
        headers = headers_up(request)
        headers["x-request-id"] = request_id
        headers["x-forwarded-prefix"] = f"/{deployment}"
        return Call(
            deployment=deployment,
            method=request.method,
            target=target_of(request.rel_url),
            headers=headers,
            body=body,
            caller=Caller(
                tenant=caller.tenant,
                label=f"call:{caller.deployment}",
                replica=caller.replica,
                parent_lease=_lease(request.headers.get(LEASE_HEADER, "")),
            ),
            request_id=request_id,
            arrived_unix_ns=arrived_unix_ns,
            wait=asked.wait,
            deadline_unix_s=asked.deadline_unix_s,
            kind="call",
        )

    def _drop_closed(self) -> None:
        """Nobody tells us when a connection ends; a new one is the time to look."""
        self._callers = {
            protocol: caller
            for protocol, caller in self._callers.items()
            if cast("web.RequestHandler", protocol).transport is not None
        }


def _lease(text: str) -> int:
    """A lease's number; 0 for what is none, as for a call that belongs to no request."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= LEASE_DIGITS_MAX else 0


@asynccontextmanager
async def serving_calls(
    carrier: Carrier, path: Path, *, request_bytes_max: int, shutdown_s_max: float
) -> AsyncIterator[None]:
    """Takes calls at the socket `path` while inside; on leaving, lets those under way end within the bound.

    To be around the server of clients: their requests may depend on calls that are yet to come.
    """
    runner = web.AppRunner(
        CallDoor(carrier, request_bytes_max=request_bytes_max).app(),
        access_log=None,
        handler_cancellation=True,
        shutdown_timeout=shutdown_s_max,
        keepalive_timeout=KEEPALIVE_S,
        auto_decompress=False,
    )
    await runner.setup()
    try:
        await web.SockSite(runner, _listen(path), backlog=BACKLOG).start()
        yield
    finally:
        path.unlink(missing_ok=True)  # no agent shall come here any more
        with anyio.CancelScope(shield=True):
            await runner.cleanup()


def _listen(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)  # of a worker that was killed
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener

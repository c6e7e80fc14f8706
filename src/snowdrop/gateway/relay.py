"""The HTTP edge of one worker: a request becomes a call, its answer goes back into the client's connection."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from random import Random

import msgspec
from aiohttp import hdrs, web
from multidict import CIMultiDict, istr
from yarl import URL

from snowdrop.domain.errors import SnowdropError
from snowdrop.domain.ids import DeploymentName
from snowdrop.gateway.bodies import IncomingBody
from snowdrop.gateway.call import Body, Call, Caller, CallerGoneError
from snowdrop.gateway.carrier import HOP_BY_HOP, Carrier, without
from snowdrop.gateway.edge.websocket import Websocket, wants_websocket
from snowdrop.gateway.httpsink import HttpSink, error_response
from snowdrop.gateway.preferences import Preferences, read_preferences, text_of
from snowdrop.tenancy.keys import bearer, key_sha256

REQUEST_ID_CHARS_MAX = 128
WEBSOCKET_IDLE_S_MAX = 3_600.0
REVISION_HEADER = "snowdrop-revision"
"""Which revision alone may answer: its id, `stable` or `candidate`."""
# The key is for the gateway; a tenant's code never sees it.
DROPPED_UP = HOP_BY_HOP | {istr(name) for name in ("authorization", "host", "content-length", "expect")}

RespondAsync = Callable[[web.Request, Call], Awaitable[web.StreamResponse]]
"""Makes a task of a call and answers 202 (`Prefer: respond-async`)."""

_labels = Random()  # noqa: S311 -- seeded from the system's randomness; makes labels, not secrets


class Relay:
    """Relays for one worker process."""

    def __init__(
        self, carrier: Carrier, *, request_bytes_max: int, websocket_idle_s_max: float = WEBSOCKET_IDLE_S_MAX
    ) -> None:
        self.carrier = carrier
        self._websocket_idle_s_max = websocket_idle_s_max
        self.request_bytes_max = request_bytes_max
        self.respond_async: RespondAsync | None = None
        self.draining = False
        self._websockets: set[Websocket] = set()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """The handler for `/{deployment}/{path}`. Errors become typed answers; cancellation passes through."""
        arrived_unix_ns = time.time_ns()
        request_id = request_id_of(request)
        extra: dict[str, str] | None = None
        try:
            body = await IncomingBody.begin(request, self.request_bytes_max)
            deployment = DeploymentName(request.match_info["deployment"])
            asked = read_preferences(request.headers)
            target = target_of(request.rel_url)
            call = make_call(
                request,
                deployment,
                target,
                body,
                request_id=request_id,
                arrived_unix_ns=arrived_unix_ns,
                asked=asked,
            )
            if hdrs.UPGRADE in request.headers and wants_websocket(request):
                return await self._converse(request, call)
            if asked.respond_async and self.respond_async is not None:
                return await self.respond_async(request, call)
            extra = asked.applied
            sink = HttpSink(request, call, extra)
            await self.carrier.carry(call, sink)
        except SnowdropError as error:
            return error_response(error, request_id, extra)
        except CallerGoneError:
            return sink.abandoned()
        if self.draining:
            # The next request on this connection is for whoever takes over.
            sink.response.force_close()
        return sink.response

    async def _converse(self, request: web.Request, call: Call) -> web.StreamResponse:
        websocket = Websocket(self.carrier, request, call, idle_s_max=self._websocket_idle_s_max)
        self._websockets.add(websocket)
        try:
            return await websocket.run()
        finally:
            self._websockets.discard(websocket)

    def cut(self) -> None:
        """The time of what is still open is over: says so where it can be said."""
        for websocket in tuple(self._websockets):
            websocket.cut()


def make_call(
    request: web.Request,
    deployment: DeploymentName,
    target: str,
    body: Body,
    *,
    request_id: str,
    arrived_unix_ns: int,
    asked: Preferences,
) -> Call:
    """The call that a request asks for. Raises UnauthorisedError for a header of another scheme than Bearer."""
    secret = bearer(request.headers.get(hdrs.AUTHORIZATION))
    headers = headers_up(request)
    headers["x-request-id"] = request_id
    headers["x-forwarded-prefix"] = f"/{deployment}"
    return Call(
        deployment=deployment,
        method=request.method,
        target=target,
        headers=headers,
        body=body,
        caller=Caller(key_sha256=key_sha256(secret) if secret is not None else None, label=asked.caller),
        request_id=request_id,
        arrived_unix_ns=arrived_unix_ns,
        wait=asked.wait
        if request.method != hdrs.METH_HEAD
        else msgspec.structs.replace(asked.wait, progress=False),
        deadline_unix_s=asked.deadline_unix_s,
        revision=text_of(REVISION_HEADER, request.headers.get(REVISION_HEADER, "")),
    )


def headers_up(request: web.Request) -> CIMultiDict[str]:
    """What of a request's headers a replica gets."""
    headers = without(request.headers, DROPPED_UP)
    headers["x-forwarded-host"] = request.host
    client = request.remote
    if client:  # none on the unix socket of the HTTP/2 listener, which has said it
        before = headers.get("x-forwarded-for")
        headers["x-forwarded-for"] = f"{before}, {client}" if before else client
    if "x-forwarded-proto" not in headers:
        headers["x-forwarded-proto"] = request.scheme
    return headers


def request_id_of(request: web.Request) -> str:
    """The client's own id for it, or a new one."""
    given = request.headers.get("x-request-id", "")[:REQUEST_ID_CHARS_MAX]
    # It goes into logs, records and terminals: what does not print is none.
    return given if given and given.isascii() and given.isprintable() else fresh_request_id()


def fresh_request_id() -> str:
    """A label for logs, of the form of `fresh_id`, but not worth a system call: nothing is protected by it."""
    return f"req-{_labels.getrandbits(48):012x}"


def target_of(relative: URL) -> str:
    """What the replica is asked for: path after the deployment and query, as the client wrote them."""
    raw = relative.raw_path
    path = raw[raw.find("/", 1) :]
    query = relative.raw_query_string
    return f"{path}?{query}" if query else path

"""One request, from the client's socket to a replica's and back.

Walk: `Relay.handle` -> slot from the broker -> connect -> stream the body up, the answer down -> slot back.
The request goes to a second replica only if no connection to the first could be made: nothing can have been
started then. Once headers have gone out, a failure can only be told inside the stream or by cutting it.
"""

from __future__ import annotations

import asyncio
import math
import time
from random import Random

import aiohttp
import msgspec
from aiohttp import HttpVersion11, hdrs, web
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from snowdrop.domain.errors import ReplicaDiedError, SnowdropError, TimedOutError
from snowdrop.domain.ids import DeploymentName
from snowdrop.domain.receipt import CallerTimes, Span, join_caller
from snowdrop.gateway.bodies import BODY_WHOLE_BYTES_MAX, IncomingBody
from snowdrop.gateway.broker import Broker
from snowdrop.gateway.connections import Connections
from snowdrop.tenancy.keys import bearer, key_sha256
from snowdrop.wire.slots import Granted

ATTEMPTS_MAX = 5
REQUEST_ID_CHARS_MAX = 128

# RFC 9110, section 7.6.1: connection-level headers that an intermediary does not pass on.
HOP_BY_HOP = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection"),
        *("te", "trailer", "transfer-encoding", "upgrade"),
    }
)
# The key is for the gateway; a tenant's code never sees it.
DROPPED_UP = HOP_BY_HOP | {"authorization", "host", "content-length", "expect"}
DROPPED_DOWN = HOP_BY_HOP | {"content-length", "date", "server"}

# A connection that took too long to make is a TimeoutError as well, so this is to be caught before that.
UNCONNECTED = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)

_labels = Random()  # noqa: S311 -- seeded from the system's randomness; makes labels, not secrets
_encode = msgspec.json.Encoder().encode


class Relay:
    """Relays for one worker process."""

    def __init__(self, broker: Broker, connections: Connections, *, request_bytes_max: int) -> None:
        self._broker = broker
        self._connections = connections
        self._request_bytes_max = request_bytes_max

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """The handler for `/{deployment}/{path}`. Errors become typed answers; cancellation passes through."""
        arrived_unix_ns = time.time_ns()
        request_id = request.headers.get("x-request-id", "")[:REQUEST_ID_CHARS_MAX] or fresh_request_id()
        try:
            body = await IncomingBody.begin(request, self._request_bytes_max)
            return await self._relay(request, body, request_id, arrived_unix_ns)
        except SnowdropError as error:
            return error_response(error, request_id)

    async def _relay(
        self, request: web.Request, body: IncomingBody, request_id: str, arrived_unix_ns: int
    ) -> web.StreamResponse:
        secret = bearer(request.headers.get(hdrs.AUTHORIZATION))
        digest = key_sha256(secret) if secret is not None else None
        deployment = DeploymentName(request.match_info["deployment"])
        for _attempt in range(ATTEMPTS_MAX):
            granted = await self._broker.acquire(digest, deployment, arrived_unix_ns=arrived_unix_ns)
            exchange = _Exchange(self, request, granted, request_id, arrived_unix_ns)
            try:
                return await exchange.run(body)
            except UNCONNECTED as error:
                # No connection, so the replica has seen nothing of it: another one may be asked.
                exchange.hand_back_unreachable(str(error))
            finally:
                exchange.hand_back()
        raise ReplicaDiedError(
            f"no replica of {deployment!r} could be reached in {ATTEMPTS_MAX} attempts", next_step="try again"
        )

    @property
    def broker(self) -> Broker:
        return self._broker

    @property
    def connections(self) -> Connections:
        return self._connections

    @property
    def request_bytes_max(self) -> int:
        return self._request_bytes_max


class _Exchange:
    """One attempt at one replica, under one lease."""

    def __init__(
        self, relay: Relay, request: web.Request, granted: Granted, request_id: str, arrived_unix_ns: int
    ) -> None:
        self._relay = relay
        self._request = request
        self._granted = granted
        self._request_id = request_id
        self._arrived_unix_ns = arrived_unix_ns
        self._held = True
        self._answer: web.StreamResponse | None = None

    def hand_back(self) -> None:
        if self._held:
            self._held = False
            self._relay.broker.release(self._granted)

    def hand_back_unreachable(self, message: str) -> None:
        self._held = False
        self._relay.broker.unreachable(self._granted, message)

    async def run(self, body: IncomingBody) -> web.StreamResponse:
        """Relays; raises one of UNCONNECTED if no connection was made, a typed error before headers went out."""
        bound_s = self._granted.request_s_max
        try:
            async with (
                asyncio.timeout(bound_s),
                self._relay.connections.using(self._granted.socket_path) as session,
                session.request(
                    self._request.method,
                    upstream_url(self._request.rel_url),
                    headers=self._headers_up(),
                    data=body.stream() if body.whole is None else body.whole,
                    allow_redirects=False,
                ) as response,
            ):
                return await self._download(response)
        except UNCONNECTED:
            raise
        except TimeoutError as error:
            return await self._failed(
                TimedOutError(
                    f"no full answer within {bound_s:g} s of the request's turn",
                    where=f"queue.request_s_max={bound_s:g}",
                    next_step="raise it in @sd.service(queue=...), or ask for less",
                ),
                error,
            )
        except aiohttp.ClientError as error:
            if body.refused is not None:  # raised in the upload; the client library wraps it
                return await self._failed(body.refused, error)
            died = ReplicaDiedError(
                "the replica died while it worked on this request, which is therefore not sent again",
                where=f"replica {self._granted.replica}",
                next_step="send it again if that is safe; `snowdrop logs` shows the replica's last words",
            )
            if (
                body.whole is not None
            ):  # otherwise the upload may have broken off, which says nothing of the replica
                # Its socket may still take connections while it dies: those who wait are not sent there now.
                self.hand_back_unreachable(str(error))
            return await self._failed(died, error)

    def _headers_up(self) -> CIMultiDict[str]:
        headers = _without(self._request.headers, DROPPED_UP)
        headers["x-request-id"] = self._request_id
        headers["x-forwarded-host"] = self._request.host
        headers["x-forwarded-prefix"] = "/" + self._request.match_info["deployment"]
        return headers

    async def _download(self, response: aiohttp.ClientResponse) -> web.StreamResponse:
        first_byte_unix_ns = time.time_ns()
        headers = _without(response.headers, DROPPED_DOWN)
        headers["x-request-id"] = self._request_id
        self._note_cold_start(headers, first_byte_unix_ns)
        length = response.content_length
        if length is not None and length <= BODY_WHOLE_BYTES_MAX and self._request.method != hdrs.METH_HEAD:
            whole = await response.read()
            return web.Response(status=response.status, headers=headers, body=whole)
        answer = self._answer = web.StreamResponse(status=response.status, headers=headers)
        if length is not None:
            answer.content_length = length
        elif response.status not in {204, 304} and self._request.version >= HttpVersion11:
            answer.enable_chunked_encoding()
        await answer.prepare(self._request)
        async for chunk in response.content.iter_any():
            await answer.write(chunk)
        await answer.write_eof()
        return answer

    def _note_cold_start(self, headers: CIMultiDict[str], first_byte_unix_ns: int) -> None:
        """Tells the caller what it waited for, and the receipt who waited."""
        granted = self._granted
        if granted.receipt is None:
            return
        caller = CallerTimes(
            request_id=self._request_id,
            arrived_unix_ns=self._arrived_unix_ns,
            admitted_unix_ns=granted.granted_unix_ns,
            first_byte_unix_ns=first_byte_unix_ns,
        )
        headers["snowdrop-receipt"] = granted.receipt
        spans = join_caller(
            granted.spans, caller, ordered_unix_ns=granted.ordered_unix_ns, ready_unix_ns=granted.ready_unix_ns
        )
        headers["server-timing"] = server_timing(spans)
        self._relay.broker.served(granted.receipt, caller)

    async def _failed(self, error: SnowdropError, cause: BaseException) -> web.StreamResponse:
        """Before headers: raises, for a proper answer. After: says it in the stream, or cuts the stream."""
        answer = self._answer
        if answer is None or not answer.prepared:
            raise error from cause
        if answer.headers.get(hdrs.CONTENT_TYPE, "").startswith("text/event-stream"):
            event = b"event: error\ndata: " + _encode({"error": error.body(request_id=self._request_id)}) + b"\n\n"
            await answer.write(event)
            await answer.write_eof()
        elif self._request.transport is not None:
            # A chunked or sized body that ends early must not look complete.
            self._request.transport.abort()
        return answer


def fresh_request_id() -> str:
    """A label for logs, of the form of `fresh_id`, but not worth a system call: nothing is protected by it."""
    return f"req-{_labels.getrandbits(48):012x}"


def upstream_url(relative: URL) -> URL:
    """What the replica is asked for: path after the deployment and query, as the client wrote them."""
    raw = relative.raw_path
    path = raw[raw.find("/", 1) :]
    query = relative.raw_query_string
    return URL(f"http://replica{path}?{query}" if query else f"http://replica{path}", encoded=True)


def server_timing(spans: tuple[Span, ...]) -> str:
    """A Server-Timing header value (https://www.w3.org/TR/server-timing/), durations in milliseconds."""
    return ", ".join(f"{span.name};dur={span.duration_ns / 1e6:.1f}" for span in spans)


def error_response(error: SnowdropError, request_id: str) -> web.Response:
    """The JSON answer for a typed error, with Retry-After where trying again helps."""
    headers = {"x-request-id": request_id}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    elif error.retryable and error.http_status in {429, 503}:
        headers["retry-after"] = "1"
    return web.Response(
        status=error.http_status,
        headers=headers,
        body=_encode({"error": error.body(request_id=request_id)}),
        content_type="application/json",
    )


def _without(headers: CIMultiDictProxy[str], dropped: frozenset[str]) -> CIMultiDict[str]:
    """A copy less the dropped names and those that the Connection header lists."""
    listed = headers.get(hdrs.CONNECTION)
    if listed:
        dropped = dropped | {name.strip().lower() for name in listed.split(",")}
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in dropped)

"""The HTTP/2 listener: a process of its own in which hypercorn serves; each stream becomes a request of HTTP/1.1.

That goes to the gateway's workers over a unix socket, so that queue, relay and every dialect are theirs alone. A
stream that its client resets closes its connection to the worker, which cancels the work.
"""

from __future__ import annotations

import logging
import re
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import anyio
import hypercorn.protocol
import msgspec
from h2.errors import ErrorCodes
from h2.events import Event, RequestReceived
from h2.exceptions import ProtocolError
from hypercorn.asyncio import serve
from hypercorn.config import Config, Sockets
from hypercorn.protocol.h2 import H2Protocol
from multidict import CIMultiDict

from snowdrop.domain.errors import PlatformDownError, SnowdropError
from snowdrop.domain.layout import StateLayout
from snowdrop.domain.settings import Settings
from snowdrop.gateway.carrier import HOP_BY_HOP
from snowdrop.gateway.edge.tls import Certificate, open_certificate
from snowdrop.gateway.upstream.connection import BrokenError, UnconnectedError
from snowdrop.gateway.upstream.pool import Exchange, Upstreams

STREAMS_MAX = 128
"""Streams at a time on one connection."""
IDLE_S_MAX = 75.0
HANDSHAKE_S_MAX = 10.0
SWALLOW_BYTES_MAX = 64 << 20
SWALLOW_S_MAX = 10.0
# RFC 9113, section 8.2.2: what HTTP/1.1 says of its connection has no place in HTTP/2.
DROPPED = HOP_BY_HOP | {"server", "host"}
_NO_ASCII = re.compile(rb"[\x80-\xff]")
log = logging.getLogger("snowdrop.gateway.http2")

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Front:
    """The ASGI application that hypercorn serves."""

    def __init__(self, upstreams: Upstreams, socket_path: str) -> None:
        self._upstreams = upstreams
        self._socket_path = socket_path

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await _Stream(scope, receive, send).run(self._upstreams, self._socket_path)
        elif scope["type"] == "lifespan":
            for word in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{word}.complete"})
        else:  # a websocket belongs on the port of HTTP/1.1
            await send({"type": "websocket.close"})


class _Stream:
    """One request."""

    def __init__(self, scope: Any, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._begun = False
        self._taken = anyio.Event()

    async def run(self, upstreams: Upstreams, socket_path: str) -> None:
        """Relays it; ends when it is answered, or its client has reset it."""
        first = await self._receive()
        if first["type"] == "http.disconnect":
            return
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._until_reset, tasks.cancel_scope)
            await self._relay(upstreams, socket_path, self._body(first))
            tasks.cancel_scope.cancel()

    async def _relay(self, upstreams: Upstreams, socket_path: str, body: bytes | AsyncIterator[bytes]) -> None:
        scope = self._scope
        target: str = scope["raw_path"].decode("ascii")
        if scope["query_string"]:
            target += "?" + scope["query_string"].decode(
                "utf-8", "surrogateescape"
            )  # the worker refuses what is none
        try:
            async with upstreams.exchange(socket_path, scope["method"], target, self._headers(), body) as answer:
                await self._answer(answer)
            if self._taken.is_set() or await self._swallow():
                await self._send({"type": "http.response.body", "body": b"", "more_body": False})
            else:
                await _reset(self._send, ErrorCodes.NO_ERROR)
        except UnconnectedError as error:
            down = PlatformDownError("the gateway's workers cannot be reached", next_step="try again")
            await self._fail(down, error)
        except BrokenError as error:
            await self._fail(PlatformDownError("a worker of the gateway ended", next_step="try again"), error)

    def _headers(self) -> CIMultiDict[str]:
        headers: CIMultiDict[str] = CIMultiDict()
        cookies: list[str] = []
        for raw_name, raw_value in self._scope["headers"]:
            name, value = raw_name.decode("latin-1"), raw_value.decode("utf-8", "surrogateescape")
            if name == "cookie":  # may come in pieces (RFC 9113, section 8.2.3)
                cookies.append(value)
            elif name not in HOP_BY_HOP:
                headers.add(name, value)
        if cookies:
            headers["cookie"] = "; ".join(cookies)
        client = self._scope.get("client")
        if client:
            before = headers.get("x-forwarded-for")
            headers["x-forwarded-for"] = f"{before}, {client[0]}" if before else client[0]
        headers.setdefault("x-forwarded-proto", self._scope["scheme"])
        return headers

    def _body(self, first: Message) -> bytes | AsyncIterator[bytes]:
        if first.get("more_body"):
            return self._pieces(first)
        self._taken.set()
        body: bytes = first.get("body", b"")
        return body

    async def _pieces(self, message: Message) -> AsyncIterator[bytes]:
        while True:
            if message["type"] == "http.disconnect":
                raise ConnectionResetError("the client has gone")
            if message.get("body"):
                yield message["body"]
            if not message.get("more_body"):
                self._taken.set()
                return
            message = await self._receive()

    async def _until_reset(self, scope: anyio.CancelScope) -> None:
        await self._taken.wait()  # until then whoever takes the body hears of it
        while (await self._receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    async def _answer(self, answer: Exchange) -> None:
        headers = [
            (name.lower().encode("latin-1"), value.encode("utf-8", "surrogateescape"))
            for name, value in answer.headers.items()
            if name.lower() not in DROPPED
        ]
        self._begun = True
        await self._send({"type": "http.response.start", "status": answer.status, "headers": headers})
        async for chunk in answer:
            await self._send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def _swallow(self) -> bool:
        """Takes, within bounds, the rest of a body that was answered early: many clients read only then."""
        left = SWALLOW_BYTES_MAX
        with anyio.move_on_after(SWALLOW_S_MAX):
            while left > 0:
                message = await self._receive()
                if message["type"] == "http.disconnect":
                    return False
                left -= len(message.get("body", b""))
                if not message.get("more_body"):
                    return True
        return False

    async def _fail(self, error: SnowdropError, cause: Exception) -> None:
        log.warning("%s: %s", error, cause)
        if self._begun:
            await _reset(self._send, ErrorCodes.INTERNAL_ERROR)
            return
        body = msgspec.json.encode({"error": error.body()})
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await self._send({"type": "http.response.start", "status": error.http_status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


async def _reset(send: Send, code: ErrorCodes) -> None:
    """Cuts a stream: one whose answer broke off would otherwise pass for whole, or never end.

    ASGI has no word for it, and hypercorn leaves such a stream open. On HTTP/1.1 it closes the connection itself.
    """
    stream = getattr(send, "__self__", None)
    protocol = getattr(getattr(stream, "send", None), "__self__", None)
    if isinstance(protocol, H2Protocol):
        with suppress(ProtocolError):  # it is closed by now
            protocol.connection.reset_stream(stream.stream_id, code)  # type: ignore[union-attr]
        await protocol._flush()  # noqa: SLF001 -- see above; tests/unit/test_gateway_http2.py holds it


class _H2(H2Protocol):
    """hypercorn's, which ends the whole connection where a path or method is no ASCII."""

    async def _handle_events(self, events: list[Event]) -> None:
        reset: set[int] = set()
        for event in events:
            if isinstance(event, RequestReceived) and not self._made_ascii(event):
                self.connection.reset_stream(event.stream_id, ErrorCodes.PROTOCOL_ERROR)
                reset.add(event.stream_id)
        await super()._handle_events([event for event in events if getattr(event, "stream_id", 0) not in reset])

    @staticmethod
    def _made_ascii(request: RequestReceived) -> bool:
        """Quotes bytes in the path as the listener for HTTP/1.1 does. False if the method is no ASCII either."""
        headers = [(bytes(name), bytes(value)) for name, value in request.headers]
        if not dict(headers)[b":method"].isascii():
            return False
        if any(name == b":path" and not value.isascii() for name, value in headers):
            request.headers = [(name, _quoted(value) if name == b":path" else value) for name, value in headers]
        return True


def _quoted(target: bytes) -> bytes:
    path, question, query = target.partition(b"?")
    return _NO_ASCII.sub(lambda found: b"%%%02X" % found[0][0], path) + question + query


# hypercorn has no other way to say which class speaks HTTP/2; tests/unit/test_gateway_http2.py holds it.
hypercorn.protocol.H2Protocol = _H2  # type: ignore[attr-defined]


class _Config(Config):
    """hypercorn's, over sockets and a TLS context that are there already."""

    def __init__(self, listener: socket.socket, certificate: Certificate | None) -> None:
        super().__init__()
        self._listener = listener
        self._certificate = certificate
        self.errorlog = log
        self.accesslog = None
        self.include_server_header = False
        self.include_date_header = False  # the worker has said it
        self.h2_max_concurrent_streams = STREAMS_MAX
        self.keep_alive_timeout = IDLE_S_MAX
        self.keep_alive_max_requests = 1 << 62  # a connection is not cut after so many
        self.ssl_handshake_timeout = HANDSHAKE_S_MAX

    @property
    def ssl_enabled(self) -> bool:
        return self._certificate is not None

    def create_ssl_context(self) -> ssl.SSLContext | None:
        return self._certificate.context if self._certificate is not None else None

    def create_sockets(self) -> Sockets:
        if self._certificate is not None:
            return Sockets([self._listener], [], [])
        return Sockets([], [self._listener], [])


async def run_http2(
    layout: StateLayout,
    settings: Settings,
    *,
    listen_fd: int,
    ready: Callable[[], None],
    until_stopped: Callable[[anyio.CancelScope], Awaitable[None]],
) -> None:
    """The listener's process. At SIGHUP it loads the certificate again; connections go on."""
    gateway = settings.gateway
    certificate = open_certificate(gateway, alpn=("h2", "http/1.1"))
    upstreams = Upstreams()
    with socket.socket(fileno=listen_fd) as listener:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(upstreams.run)
            if certificate is not None:
                tasks.start_soon(certificate.watch)
                tasks.start_soon(_reload_at_hangup, certificate)
            await serve_front(
                Front(upstreams, str(layout.edge_socket)),
                listener,
                certificate,
                shutdown_s_max=gateway.shutdown_s_max,
                until_stopped=until_stopped,
                ready=ready,
            )
            tasks.cancel_scope.cancel()
    upstreams.close()


async def serve_front(
    front: Front,
    listener: socket.socket,
    certificate: Certificate | None,
    *,
    shutdown_s_max: float,
    until_stopped: Callable[[anyio.CancelScope], Awaitable[None]],
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serves on `listener`, which it closes, until `until_stopped` cancels what it is given."""
    config = _Config(listener, certificate)
    config.graceful_timeout = shutdown_s_max

    async def stopped() -> None:
        ready()
        with anyio.CancelScope() as scope:
            await until_stopped(scope)

    await serve(front, config, shutdown_trigger=stopped, mode="asgi")  # type: ignore[arg-type]


async def _reload_at_hangup(certificate: Certificate) -> None:
    with anyio.open_signal_receiver(signal.SIGHUP) as signals:
        async for _signal in signals:
            try:
                certificate.reload()
            except SnowdropError as error:
                log.error("%s; the certificate before it stays in use", error)

"""What services share that are no classes of the SDK: bounds on calls, an end to those that outlast a drain."""

from __future__ import annotations

import anyio

from snowdrop.domain.errors import NotFoundError, SnowdropError
from snowdrop.domain.service import ServiceSpec
from snowdrop.domain.signature import encode_json
from snowdrop.replica.exchange import JSON, REQUEST_ID_CHARS_MAX
from snowdrop.replica.gate import Gate
from snowdrop.replica.servable import AsgiMessage, Receive, Scope, Send
from snowdrop.replica.userfault import UserRaised, request_error

STATS_PATH = "/-/stats"
PLATFORM_PREFIX = "/-/"
POLICY_VIOLATION = 1008
TRY_AGAIN_LATER = 1013


class BoundedServable:
    """Base of services that take any path: `handle` answers one request or websocket within a slot.

    Both hold a slot of the replica until they end. Errors become typed answers if nothing has gone out yet; an
    answer that has begun is left incomplete, which cuts its connection.
    """

    has_websockets = True

    def __init__(self, spec: ServiceSpec) -> None:
        self._spec = spec
        self._running: set[anyio.CancelScope] = set()
        self._cut: SnowdropError | None = None

    def open_gate(self) -> None:
        """To be called when the loop runs, before the first request."""
        self._gate = Gate(self._spec.concurrency, waiting_max=self._spec.concurrency)

    def cut(self, error: SnowdropError) -> None:
        """Cancels every call and answers it with `error` where it can still be said."""
        self._cut = error
        for scope in tuple(self._running):
            scope.cancel()

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError

    async def asgi(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = _Answer(scope, send)
        if scope["type"] == "http" and scope["path"].startswith(PLATFORM_PREFIX):
            await self._platform_path(scope["path"], answer)
            return
        failure: SnowdropError | None = None
        with anyio.CancelScope() as cancelled:
            self._running.add(cancelled)
            try:
                with self._gate.admission():
                    async with self._gate.slot():
                        await self.handle(scope, receive, answer.send)
            except SnowdropError as error:
                failure = error
            except UserRaised as error:
                failure = request_error(error, scope["path"], answer.request_id)
            finally:
                self._running.discard(cancelled)
        if cancelled.cancel_called:
            failure = self._cut
        if failure is not None:
            await answer.refuse(failure)

    async def _platform_path(self, path: str, answer: _Answer) -> None:
        if path == STATS_PATH:
            await answer.whole(200, encode_json(self._gate.stats()))
            return
        error = NotFoundError(
            f"nothing of the platform is at {path!r}",
            where=path,
            next_step="the service is no class with endpoints, so only /-/stats is here",
        )
        await answer.refuse(error)


class _Answer:
    """Knows whether something of an answer has gone out."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._is_websocket = scope["type"] == "websocket"
        self._send = send
        self._has_begun = False
        named = (value for name, value in scope["headers"] if name.lower() == b"x-request-id")
        self.request_id = next(named, b"").decode("latin-1")[:REQUEST_ID_CHARS_MAX]

    async def send(self, message: AsgiMessage) -> None:
        self._has_begun = True
        await self._send(message)

    async def refuse(self, error: SnowdropError) -> None:
        if self._is_websocket:
            # Before the handshake this is an HTTP 403; afterwards the code says whether to come back.
            code = TRY_AGAIN_LATER if error.retryable else POLICY_VIOLATION
            await self._send({"type": "websocket.close", "code": code, "reason": error.message[:120]})
        elif not self._has_begun:
            await self.whole(error.http_status, encode_json({"error": error.body(request_id=self.request_id)}))

    async def whole(self, status: int, body: bytes) -> None:
        headers = [(b"content-type", JSON.encode()), (b"content-length", str(len(body)).encode())]
        if self.request_id:
            headers.append((b"x-request-id", self.request_id.encode("latin-1")))
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

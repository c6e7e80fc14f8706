"""One HTTP request over ASGI: what is read from it, and the forms of an answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import msgspec

from snowdrop.domain import openai_errors
from snowdrop.domain.calling import CallContext
from snowdrop.domain.errors import SnowdropError, TimedOutError, TooLargeError
from snowdrop.domain.ids import fresh_id
from snowdrop.domain.openai_errors import status_of
from snowdrop.domain.signature import encode_json
from snowdrop.replica.callcontext import context_of
from snowdrop.replica.servable import AsgiMessage, Receive, Send

REQUEST_BYTES_MAX = 64 << 20
BODY_S_MAX = 300.0
"""Longest time that a client may take to send its body; it holds a place in the replica meanwhile."""
REQUEST_ID_CHARS_MAX = 128
NDJSON = "application/x-ndjson"
SSE = "text/event-stream"
OCTETS = "application/octet-stream"
JSON = "application/json"


class Disconnected(Exception):  # noqa: N818 -- an outcome, not an error
    """The client has gone before its request was whole."""


class Refused(Exception):  # noqa: N818 -- an answer on its way out
    """An error whose answer has headers of its own."""

    def __init__(self, error: SnowdropError, headers: dict[str, str]) -> None:
        super().__init__(str(error))
        self.error = error
        self.headers = headers


class StreamForm(msgspec.Struct, frozen=True, kw_only=True):
    """How items become bytes. `failure` is None where a stream can only say that it failed by being cut."""

    content_type: str
    item: Callable[[object], bytes]
    failure: Callable[[SnowdropError, str], bytes] | None


class Exchange:
    """A request and the way back to its caller."""

    def __init__(self, scope: Any, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: bytes = scope["query_string"]
        self.headers: dict[str, str] = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        self.request_id = self.headers.get("x-request-id", "")[:REQUEST_ID_CHARS_MAX] or fresh_id("req")
        self.has_begun = False
        self.speaks_openai = False
        self._is_complete = False
        self._form: StreamForm | None = None
        self._receive = receive
        self._send = send

    def context(self) -> CallContext:
        """What calls that are made for this request go on with."""
        return context_of(self.headers, self.request_id)

    async def body(self) -> bytes:
        """The whole body.

        Raises TooLargeError as Refused, TimedOutError after BODY_S_MAX, Disconnected if the client goes.
        """
        try:
            with anyio.fail_after(BODY_S_MAX):
                return await self._read_body()
        except TimeoutError as error:
            raise TimedOutError(
                "the body did not arrive in time",
                where=f"body_s_max={BODY_S_MAX:g}",
                next_step="send the request again, or less at once",
            ) from error

    async def _read_body(self) -> bytes:
        declared = self.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > REQUEST_BYTES_MAX:
            raise _too_large(int(declared))
        parts: list[bytes] = []
        size = 0
        while True:
            message: AsgiMessage = await self._receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            part: bytes = message.get("body", b"")
            size += len(part)
            if size > REQUEST_BYTES_MAX:
                raise _too_large(size)
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    async def disconnected(self) -> None:
        """Returns when the client has gone; to be awaited after `body`."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def answer(
        self, body: bytes, *, content_type: str = JSON, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        """The whole answer at once."""
        await self._begin(status, content_type, {"content-length": str(len(body)), **(headers or {})})
        await self.write(body, more=False)

    async def refuse(self, error: SnowdropError, *, headers: dict[str, str] | None = None) -> None:
        """A typed error in the form that still fits: an answer of its own, or the last item of the stream.

        Raw bytes have no place for one: left incomplete, the connection is cut and can't pass for whole.
        """
        if self._is_complete:
            return
        if self.has_begun:
            if self._form is not None and self._form.failure is not None:
                await self.write(self._form.failure(error, self.request_id), more=False)
            return
        extra = dict(headers or {})
        if error.retry_after_s is not None:
            extra["retry-after"] = str(max(1, round(error.retry_after_s)))
        if self.speaks_openai:
            body, status = openai_errors.encoded(openai_errors.shape(error, self.request_id)), status_of(error)
            extra = {**openai_errors.headers_of(error, self.request_id), **extra}
        else:
            body, status = self._error(error), error.http_status
        await self.answer(body, status=status, headers=extra)

    async def begin_stream(self, form: StreamForm) -> None:
        self._form = form
        await self._begin(200, form.content_type, {"cache-control": "no-cache"})

    async def write(self, body: bytes, *, more: bool = True) -> None:
        self._is_complete = not more
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    def stream_form(self, kind: str) -> StreamForm:
        """Bytes as they are; else what the caller accepts, server-sent events by default."""
        if kind == "chunked":
            return StreamForm(content_type=OCTETS, item=octets, failure=None)
        if NDJSON in self.headers.get("accept", ""):
            return StreamForm(content_type=NDJSON, item=_ndjson_item, failure=_ndjson_failure)
        return StreamForm(content_type=SSE, item=_sse_item, failure=_sse_failure)

    def _error(self, error: SnowdropError) -> bytes:
        return encode_json({"error": error.body(request_id=self.request_id)})

    async def _begin(self, status: int, content_type: str, headers: dict[str, str]) -> None:
        self.has_begun = True
        named = {"content-type": content_type, "x-request-id": self.request_id, **headers}
        encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in named.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": encoded})


def octets(value: object) -> bytes:
    """`value` as bytes; raises TypeError if it is no buffer (bytes(5) would be five zeros)."""
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    raise TypeError(f"expected bytes, got {type(value).__name__}")


def _sse_item(value: object) -> bytes:
    # JSON for strings, too: a newline in a bare one would end the event.
    return b"data: " + encode_json(value) + b"\n\n"


def _sse_failure(error: SnowdropError, request_id: str) -> bytes:
    return b"event: error\ndata: " + encode_json({"error": error.body(request_id=request_id)}) + b"\n\n"


def _ndjson_item(value: object) -> bytes:
    return encode_json(value) + b"\n"


def _ndjson_failure(error: SnowdropError, request_id: str) -> bytes:
    return encode_json({"error": error.body(request_id=request_id)}) + b"\n"


def _too_large(size: int) -> Refused:
    error = TooLargeError(
        f"the body has {size} bytes or more",
        where=f"request_bytes_max={REQUEST_BYTES_MAX}",
        next_step="send less at once",
    )
    return Refused(error, {"connection": "close"})

"""The sink of an HTTP request: an answer of its own, or one inside an event stream begun while it waited."""

from __future__ import annotations

import math

import msgspec
from aiohttp import HttpVersion11, hdrs, web
from multidict import CIMultiDict

from snowdrop.domain.errors import SnowdropError, TooLargeError
from snowdrop.gateway.call import Call, CallerGoneError
from snowdrop.gateway.edge.answer import whole_answer
from snowdrop.wire.slots import WaitNews

EVENT_STREAM = "text/event-stream"
CALLER_GONE = 499
"""nginx's status for a client that did not wait; nobody sees it."""
LATE_BYTES_MAX = 1 << 20
"""An answer that comes as one event is held until it is whole, and is no larger than this."""
_encode = msgspec.json.Encoder().encode


class HttpSink:
    """Answers one request; `response` is what its handler returns.

    A stream that waits gets status 200 and comments before its replica is known. What comes then is put into that
    stream: events as they are, anything else as one event, a failure as an error event.
    """

    def __init__(self, request: web.Request, call: Call, extra: dict[str, str] | None = None) -> None:
        self._request = request
        self._call = call
        self._extra = extra
        self._answer: web.StreamResponse | None = None
        self._whole: web.StreamResponse | None = None
        self._early = False
        self._held: list[bytes] | None = None
        self._held_status = 200
        self._held_bytes = 0

    @property
    def begun(self) -> bool:
        return self._answer is not None

    @property
    def response(self) -> web.StreamResponse:
        answer = self._answer if self._whole is None else self._whole
        if answer is None:
            raise AssertionError("asked for the answer before there was one")
        return answer

    def abandoned(self) -> web.StreamResponse:
        """What the handler returns when its client has gone: never a second head after one that went out."""
        return self._answer or web.Response(status=CALLER_GONE)

    async def whole(self, status: int, headers: CIMultiDict[str], body: bytes) -> None:
        if self._early:
            await self.begin(status, headers, len(body))
            await self.write(body)
            await self.end()
            return
        if self._extra:
            headers.update(self._extra)
        self._whole = whole_answer(self._request, status, headers, body)

    async def begin(self, status: int, headers: CIMultiDict[str], length: int | None) -> None:
        if self._early:
            await self._write(self.receipt_comment(headers))
            if status != 200 or not _is_event_stream(headers):
                self._held, self._held_status = [], status
            return
        if self._extra:
            headers.update(self._extra)
        answer = web.StreamResponse(status=status, headers=headers)
        if length is not None:
            answer.content_length = length
        elif status not in {204, 304} and self._request.version >= HttpVersion11:
            answer.enable_chunked_encoding()
        await self._prepare(answer)

    async def write(self, chunk: bytes) -> None:
        if self._held is not None:
            self._held_bytes += len(chunk)
            if self._held_bytes > LATE_BYTES_MAX:
                raise TooLargeError(
                    "the answer is no event stream, and too large for one event of the stream that has begun",
                    where=f"late_bytes_max={LATE_BYTES_MAX}",
                    next_step="ask without `accept: text/event-stream`, or set queue.progress_first_s=None",
                )
            self._held.append(chunk)
        else:
            await self._write(chunk)

    async def end(self) -> None:
        if self._held is not None:
            held, self._held = b"".join(self._held), None
            await self._write(self.late_event(self._held_status, held))
        try:
            await self.response.write_eof()
        except ConnectionError as error:
            raise CallerGoneError from error

    async def progress(self, news: WaitNews) -> None:
        if self._answer is None:
            headers = {
                "content-type": EVENT_STREAM,
                "cache-control": "no-cache",
                "x-accel-buffering": "no",
                "x-request-id": self._call.request_id,
                **(self._extra or {}),
            }
            answer = web.StreamResponse(status=200, headers=headers)
            if self._request.version >= HttpVersion11:
                answer.enable_chunked_encoding()
            self._early = True
            await self._prepare(answer)
        await self._write(wait_comment(news))

    async def broken(self, error: SnowdropError) -> None:
        answer = self.response
        if answer.headers.get(hdrs.CONTENT_TYPE, "").startswith(EVENT_STREAM):
            self._held = None
            await self._write(self.error_event(error))
            await self.end()
        elif self._request.transport is not None:
            # A chunked or sized body that ends early must not look complete.
            self._request.transport.abort()

    def error_event(self, error: SnowdropError) -> bytes:
        """How a failure is told inside an event stream."""
        body = {"error": error.body(request_id=self._call.request_id)}
        return b"event: error\ndata: " + _encode(body) + b"\n\n"

    def late_event(self, status: int, body: bytes) -> bytes:
        """How an answer that is no event stream is told inside one that has begun while it waited."""
        name = b"event: error\n" if status >= 400 else b""
        lines = body.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        return name + b"".join(b"data: " + line + b"\n" for line in lines) + b"\n"

    def receipt_comment(self, headers: CIMultiDict[str]) -> bytes:
        """What would have stood in the headers, had they not gone out before."""
        receipt = headers.get("snowdrop-receipt")
        return f": snowdrop phase=answer percent=100 expected_s=0 receipt={receipt or '-'}\n\n".encode()

    async def _prepare(self, answer: web.StreamResponse) -> None:
        # From here on the head may have gone out, also if that fails half-way.
        self._answer = answer
        try:
            await answer.prepare(self._request)
        except ConnectionError as error:
            raise CallerGoneError from error

    async def _write(self, chunk: bytes) -> None:
        answer = self._answer
        if answer is None:
            raise AssertionError("written to before it began")
        try:
            await answer.write(chunk)
        except ConnectionError as error:
            raise CallerGoneError from error


def wait_comment(news: WaitNews) -> bytes:
    """A comment, which clients of event streams pass over by the standard."""
    expected = f" expected_s={news.expected_s:.1f}" if news.expected_s is not None else ""
    percent = f" percent={news.percent}" if news.percent is not None else ""
    return f": snowdrop phase={news.phase}{percent}{expected} position={news.position}\n\n".encode()


def error_response(error: SnowdropError, request_id: str, extra: dict[str, str] | None = None) -> web.Response:
    """The JSON answer for a typed error, with Retry-After where trying again helps."""
    headers = {"x-request-id": request_id, **(extra or {})}
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


def _is_event_stream(headers: CIMultiDict[str]) -> bool:
    return headers.get(hdrs.CONTENT_TYPE, "").startswith(EVENT_STREAM)

"""The sink of a request in the dialect: answers pass untouched; errors, and only they, are put into its shape."""

from __future__ import annotations

from aiohttp import web
from multidict import CIMultiDict

from snowdrop.domain.errors import SnowdropError
from snowdrop.domain.openai_errors import encoded, foreign, headers_of, ours, shape, status_of
from snowdrop.gateway.call import Call
from snowdrop.gateway.httpsink import HttpSink

DONE = b"data: [DONE]\n\n"


class OpenAiSink(HttpSink):
    """As HttpSink, with failures as their clients look for them: `data: {"error": ...}` inside a stream."""

    def __init__(self, request: web.Request, call: Call, extra: dict[str, str] | None = None) -> None:
        super().__init__(request, call, extra)
        self._request_id = call.request_id

    async def whole(self, status: int, headers: CIMultiDict[str], body: bytes) -> None:
        error = ours(body) if status >= 400 else None
        if error is not None:
            status, body = status_of(error), encoded(shape(error, self._request_id))
            headers.update(headers_of(error, self._request_id))
        await super().whole(status, headers, body)

    def error_event(self, error: SnowdropError) -> bytes:
        return b"data: " + encoded(shape(error, self._request_id)) + b"\n\n"

    def late_event(self, status: int, body: bytes) -> bytes:
        error = ours(body) if status >= 400 else None
        if error is not None:
            return self.error_event(error)
        if status >= 400:
            body = foreign(status, body, self._request_id)
        lines = body.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        event = b"".join(b"data: " + line + b"\n" for line in lines) + b"\n"
        return event if status >= 400 else event + DONE

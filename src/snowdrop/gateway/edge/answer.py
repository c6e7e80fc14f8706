"""A small answer that is there as a whole: its head and body leave in one write, with nothing asked in between."""

from __future__ import annotations

import time
from email.utils import formatdate
from http import HTTPStatus

from aiohttp import HttpVersion11, hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import SERVER_SOFTWARE
from multidict import CIMultiDict

BODILESS = frozenset({204, 304})
_REASONS = {status.value: status.phrase for status in HTTPStatus}


def whole_answer(
    request: web.BaseRequest, status: int, headers: CIMultiDict[str], body: bytes
) -> web.StreamResponse:
    """The cheapest answer that says this to this client."""
    plain = request.version == HttpVersion11 and request.method != hdrs.METH_HEAD and status not in BODILESS
    if plain and status >= HTTPStatus.OK:
        return WholeAnswer(status, headers, body)
    return web.Response(status=status, headers=headers, body=body)


class WholeAnswer(web.StreamResponse):
    """What `web.Response` is for bytes to an HTTP/1.1 client, without cookies, compression, signals or pieces."""

    def __init__(self, status: int, headers: CIMultiDict[str], body: bytes) -> None:
        super().__init__(status=status, headers=headers)
        self._whole = body
        self._closes = False
        self._stays: bool | None = None

    @property
    def keep_alive(self) -> bool | None:
        """Whether the connection stays open; known once the answer has gone out."""
        return self._stays

    def force_close(self) -> None:
        self._closes = True

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Sends all of it."""
        if self._stays is not None:
            return None
        self._stays = request.keep_alive and not self._closes
        status, headers, body = self.status, self.headers, self._whole
        headers[hdrs.CONTENT_LENGTH] = str(len(body))
        if body and hdrs.CONTENT_TYPE not in headers:
            headers[hdrs.CONTENT_TYPE] = "application/octet-stream"
        headers[hdrs.DATE] = _clock.date()
        headers[hdrs.SERVER] = SERVER_SOFTWARE
        if not self._stays:
            headers[hdrs.CONNECTION] = "close"
        writer = request.writer
        await writer.write_headers(f"HTTP/1.1 {status} {_REASONS.get(status, '')}", headers)
        await writer.write_eof(body)
        return writer

    async def write_eof(self, data: bytes = b"") -> None:
        """It has its end already."""


class _Clock:
    """The date as answers say it, made once a second."""

    def __init__(self) -> None:
        self._second = 0
        self._date = ""

    def date(self) -> str:
        second = int(time.time())
        if second != self._second:
            self._second, self._date = second, formatdate(second, usegmt=True)
        return self._date


_clock = _Clock()

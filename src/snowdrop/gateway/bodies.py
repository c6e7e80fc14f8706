"""A request's body as the gateway takes it: small ones whole, large ones as they come, none without bounds.

What fits into BODY_WHOLE_BYTES_MAX, or the first part of what does not, is read before a slot is asked for: a
client that opens a request and sends nothing holds no replica. Then a least pace is asked of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from aiohttp import StreamReader, web

from snowdrop.domain.errors import InvalidInputError, SnowdropError, TimedOutError, TooLargeError

BODY_WHOLE_BYTES_MAX = 64 << 10
"""Bodies up to this size are relayed in one piece: one write instead of several."""
BODY_STALL_S_MAX = 30.0
ERROR_CHARS_MAX = 200
BODY_PACE_BYTES_S_MIN = 16 << 10
"""After the first BODY_STALL_S_MAX a body must have come at least this fast on average."""


class IncomingBody:
    """Made by `begin`. `whole` is None for a body that must be streamed; `refused` says why a stream broke off."""

    def __init__(self, request: web.Request, bytes_max: int, start: bytes, *, ended: bool) -> None:
        self._request = request
        self._bytes_max = bytes_max
        self._start = start
        self._began_s = time.monotonic()
        self.whole: bytes | None = start if ended else None
        self.refused: SnowdropError | None = None
        self.received_bytes = len(start)

    @classmethod
    async def begin(cls, request: web.Request, bytes_max: int) -> IncomingBody:
        """Reads the body, or its first part. Raises TooLargeError or TimedOutError."""
        length = request.content_length
        if length is not None and length > bytes_max:
            raise _too_large(bytes_max, f"the request has {length} bytes")
        if not request.can_read_body:
            return cls(request, bytes_max, b"", ended=True)
        content = request.content
        if content.is_eof() and (length is None or length <= BODY_WHOLE_BYTES_MAX):
            start, ended = content.read_nowait(), True  # it came with the head, as small ones do
        else:
            start, ended = await _first_part(content, length)
        if len(start) > bytes_max:
            raise _too_large(bytes_max, "the request's body is too large")
        return cls(request, bytes_max, start, ended=ended)

    async def stream(self) -> AsyncIterator[bytes]:
        """The whole body as it comes; stops with `refused` set when it grows too large or too slow."""
        yield self._start
        content = self._request.content
        while True:
            left_s = (
                self._began_s + BODY_STALL_S_MAX + self.received_bytes / BODY_PACE_BYTES_S_MIN - time.monotonic()
            )
            try:
                async with asyncio.timeout(max(0.0, left_s)):
                    chunk = await content.readany()
            except TimeoutError as error:
                self.refused = _too_slow()
                raise self.refused from error
            except web.RequestPayloadError as error:
                self.refused = _broken(error)  # the client's fault, and no sign against its replica
                raise self.refused from error
            if not chunk:
                return
            self.received_bytes += len(chunk)
            if self.received_bytes > self._bytes_max:
                self.refused = _too_large(self._bytes_max, "the request's body is too large")
                raise self.refused
            yield chunk


async def _first_part(content: StreamReader, length: int | None) -> tuple[bytes, bool]:
    """As much as is needed before a slot is asked for, and whether that is all. Raises TimedOutError."""
    try:
        async with asyncio.timeout(BODY_STALL_S_MAX):
            if length is None:
                # Of unknown length it may be one side of a conversation: one piece must be enough to begin.
                start = await content.readany()
                return start, content.at_eof()
            start = await content.readexactly(min(length, BODY_WHOLE_BYTES_MAX))
            return start, length == len(start)
    except asyncio.IncompleteReadError as error:
        raise _broken(error) from error  # less than it said is not all of it
    except TimeoutError as error:
        raise _too_slow() from error
    except web.RequestPayloadError as error:
        raise _broken(error) from error


def _too_large(bytes_max: int, message: str) -> TooLargeError:
    return TooLargeError(
        message, where=f"gateway.request_bytes_max={bytes_max}", next_step="send less, or raise the setting"
    )


def _broken(error: Exception) -> InvalidInputError:
    return InvalidInputError(
        "the request's body is not as its headers say", where=f"request body: {str(error)[:ERROR_CHARS_MAX]}"
    )


def _too_slow() -> TimedOutError:
    return TimedOutError(
        "the request's body did not arrive in time",
        where=f"body_stall_s_max={BODY_STALL_S_MAX:g}, body_pace_bytes_s_min={BODY_PACE_BYTES_S_MIN}",
        next_step="send it without pauses",
    )

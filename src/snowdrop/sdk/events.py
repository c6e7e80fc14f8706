"""Streams of other services, read item by item: server-sent events, lines of JSON, bytes."""

from collections.abc import AsyncIterator

import msgspec

from snowdrop.domain.errors import ErrorBody, SnowdropError, TooLargeError, error_from_body

EVENT_BYTES_MAX = 64 << 20
DONE = b"[DONE]"
"""How OpenAI-speaking servers end a stream."""


class _Failure(msgspec.Struct):
    error: ErrorBody


async def lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Lines without their ends (LF or CRLF). Raises TooLargeError for one above EVENT_BYTES_MAX."""
    rest = b""
    async for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r")
        if len(rest) > EVENT_BYTES_MAX:
            raise TooLargeError(
                "one event of the stream is too large",
                where=f"event_bytes_max={EVENT_BYTES_MAX}",
                next_step="send less in one item",
            )
    if rest:
        yield rest


async def events(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of each server-sent event. Raises the typed error of an error event."""
    name, data = b"", []
    async for line in lines(chunks):
        if line:
            field, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if field == b"data":
                data.append(value)
            elif field == b"event":
                name = value
            continue
        if data:
            joined = b"\n".join(data)
            if name == b"error":
                raise failure(joined)
            if joined == DONE:
                return
            yield joined
        name, data = b"", []


def failure(body: bytes) -> SnowdropError:
    """The error in an answer's body or an error event; any other text becomes the message of a plain one."""
    try:
        return error_from_body(msgspec.json.decode(body, type=_Failure).error)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return SnowdropError(body[:500].decode("utf-8", "replace").strip() or "no reason was given")

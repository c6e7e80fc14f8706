"""One connection to a replica, as a protocol of the event loop over httptools' parser.

aiohttp's client took more than half of the relay's time (docs/adr/0031-upstream-client.md). What is here does what
a relay needs of a client and no more: one request at a time, headers as they are, bodies as they come, the raw
connection after a 101. Nothing is decoded, followed, stored or sent again.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from typing import cast

import httptools
from multidict import CIMultiDict

from snowdrop.gateway.upstream.pulse import HELD_BYTES_MAX, PULSE_S, Pulse

HEAD_BYTES_MAX = 256 << 10
BUFFER_BYTES_HIGH = 256 << 10
"""More of an answer than this is not read from the replica until its caller has taken some."""
BUFFER_BYTES_LOW = 64 << 10
WRITE_BYTES_HIGH = 256 << 10
SWITCHING_PROTOCOLS = 101
_BODILESS = frozenset({204, 304})


class UnconnectedError(OSError):
    """No connection could be made, so nothing can have been sent."""


class BrokenError(OSError):
    """The connection ended, or became unusable, before the answer was whole."""


class Connection(asyncio.Protocol):
    """A connection that carries one exchange at a time: `begin`, the answer's head, its chunks."""

    def __init__(self, pulse: Pulse) -> None:
        self._loop = asyncio.get_running_loop()
        self._pulse = pulse
        self._may_hold = False
        self._held = False
        self._taken_s = -math.inf
        self._transport: asyncio.Transport
        self._parser = httptools.HttpResponseParser(self)
        self._headers: list[tuple[str, str]] = []
        self._head_bytes = 0
        self._head: asyncio.Future[None] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._chunks: deque[bytes] = deque()
        self._buffered = 0
        self._reading_paused = False
        self._lost: BrokenError | None = None
        self._interim = False
        self._is_head_request = False
        self._until_close = False
        self._keep_alive = True
        self.raw = False
        self.ended = True
        self.status = 0
        self.headers: CIMultiDict[str] = CIMultiDict()
        self.content_length: int | None = None
        self.idle_since_s = 0.0

    # --- an exchange ---------------------------------------------------------------------------------------

    def begin(self, head: bytes, *, method: str, whole: bool) -> None:
        """Sends a request's head, with its body if that is `whole`. The rest goes by `write`."""
        self.ended = False
        self._taken_s = -math.inf
        self._may_hold = whole  # otherwise both sides may speak in turns, and would wait for each other's beats
        self.content_length = None
        self._until_close = False
        self._is_head_request = method == "HEAD"
        self._head = self._loop.create_future()
        if self._lost is not None:  # lost between being taken and being used
            raise self._lost
        self._transport.write(head)

    async def answered(self) -> None:
        """Returns when `status`, `headers` and `content_length` are there. Raises BrokenError."""
        assert self._head is not None
        await self._head

    async def chunk(self) -> bytes:
        """The next piece of the answer's body or of the tunnel; empty at its end. Raises BrokenError."""
        while self._held or not self._chunks:
            if self.ended:
                return b""
            if self._lost is not None:
                raise self._lost
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        taken = self._chunks.popleft() if len(self._chunks) == 1 else self._all_chunks()
        self._taken_s = self._loop.time()
        self._buffered -= len(taken)
        if self._reading_paused and self._buffered <= BUFFER_BYTES_LOW and self._lost is None:
            self._reading_paused = False
            self._transport.resume_reading()
        return taken

    def _all_chunks(self) -> bytes:
        joined = b"".join(self._chunks)
        self._chunks.clear()
        return joined

    async def write(self, data: bytes) -> None:
        """Sends bytes as they are; waits while the replica takes none. Raises BrokenError."""
        if self._lost is not None:
            raise self._lost
        self._transport.write(data)
        if self._writable is not None:
            await asyncio.shield(self._writable)

    def write_eof(self) -> None:
        """Nothing more will be sent on the tunnel."""
        if self._lost is None and self._transport.can_write_eof():
            self._transport.write_eof()

    @property
    def reusable(self) -> bool:
        """Whether another exchange may follow."""
        whole = self.ended and not self._chunks and not self.raw
        return whole and self._keep_alive and self._lost is None and not self._is_head_request

    @property
    def is_lost(self) -> bool:
        return self._lost is not None

    def fail(self, message: str) -> None:
        """Ends the connection; whoever waits on it gets a BrokenError."""
        self._lose(BrokenError(message))
        self.abort()

    def abort(self) -> None:
        """Ends the connection at once; the replica sees that its caller is gone."""
        self._transport.abort()

    def close(self) -> None:
        self._transport.close()

    # --- asyncio.Protocol ----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=WRITE_BYTES_HIGH)

    def data_received(self, data: bytes) -> None:
        if self.raw:
            self._keep(data)
            return
        if self.ended:
            self.fail("the replica sent something that nobody had asked for")
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._switch(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            self.fail(f"the replica's answer is not HTTP: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        if (self._until_close or self.raw) and exc is None:
            self.ended = True
        self._lose(BrokenError(str(exc) if exc is not None else "the replica closed the connection"))

    def pause_writing(self) -> None:
        self._writable = self._loop.create_future()

    def resume_writing(self) -> None:
        if self._writable is not None:
            self._writable.set_result(None)
            self._writable = None

    # --- httptools -----------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.ended:  # it would be taken for the answer to the next request
            raise ValueError("a second answer to one request")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > HEAD_BYTES_MAX:
            raise ValueError(f"more than {HEAD_BYTES_MAX} bytes of headers")
        if self.ended or (self._head is not None and not self._head.done()):
            self._headers.append(
                (name.decode("utf-8", "surrogateescape"), value.decode("utf-8", "surrogateescape"))
            )  # those after the body are trailers, which are dropped

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        headers, self._headers, self._head_bytes = self._headers, [], 0
        self._interim = 100 <= status < 200 and status != SWITCHING_PROTOCOLS
        if self._interim:
            return
        self.status = status
        self.headers = CIMultiDict(headers)
        length = self.headers.get("content-length")
        self.content_length = int(length) if length is not None and length.isdecimal() else None
        if status in _BODILESS or self._is_head_request:
            self.ended = True
        elif length is None and "transfer-encoding" not in self.headers and status != SWITCHING_PROTOCOLS:
            self._until_close = True
        if self._head is not None and not self._head.done():
            self._head.set_result(None)

    def on_body(self, body: bytes) -> None:
        self._keep(body)

    def on_message_complete(self) -> None:
        if self._interim:
            self._interim = False
            return
        if self.status == SWITCHING_PROTOCOLS:
            return
        self._keep_alive = self._parser.should_keep_alive()
        self.ended = True
        self._wake()

    # --- inside --------------------------------------------------------------------------------------------

    def _switch(self, first: bytes) -> None:
        if self.status != SWITCHING_PROTOCOLS:
            self.fail("the replica changed the protocol without being asked")
            return
        self.raw, self._may_hold = True, False
        if first:
            self._keep(first)

    def _keep(self, data: bytes) -> None:
        self._chunks.append(data)
        self._buffered += len(data)
        if self._buffered > BUFFER_BYTES_HIGH and not self._reading_paused:
            self._reading_paused = True
            self._transport.pause_reading()
        if self._held:
            if self._buffered >= HELD_BYTES_MAX:
                self._wake()
        elif self._may_hold and len(data) < HELD_BYTES_MAX and self._loop.time() < self._taken_s + PULSE_S:
            self._held = True
            self._pulse.hold(self._wake)
        else:
            self._wake()

    def _wake(self) -> None:
        self._held = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _lose(self, error: BrokenError) -> None:
        if self._lost is None:
            self._lost = error
        if self._head is not None and not self._head.done():
            self._head.set_exception(self._lost)
            self._head.exception()  # whoever waited may have been cancelled
        if self._writable is not None and not self._writable.done():
            self._writable.set_exception(self._lost)
            self._writable.exception()
            self._writable = None
        self._wake()

"""Websockets: after the replica's 101 their bytes pass as they are, under a lease, with both sides held back.

Frames are not taken apart, so close codes, pings, fragments and extensions are the two ends' own affair. All that
is read of them is where a frame ends, so that a close frame of the gateway's own can be put behind it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque

import anyio
from aiohttp import HttpVersion11, hdrs, web

from snowdrop.domain.errors import InvalidInputError, ReplicaDiedError, SnowdropError, TimedOutError
from snowdrop.gateway.bodies import BODY_WHOLE_BYTES_MAX
from snowdrop.gateway.call import Call, WholeBody
from snowdrop.gateway.carrier import DROPPED_DOWN, Carrier, Lease, without
from snowdrop.gateway.upstream.connection import SWITCHING_PROTOCOLS, BrokenError, Connection
from snowdrop.gateway.upstream.pool import Exchange

HANDSHAKE_S_MAX = 60.0
"""From the slot to the replica's 101."""
BUFFER_BYTES_HIGH = 256 << 10
BUFFER_BYTES_LOW = 64 << 10
CLOSE_S_MAX = 5.0
"""How long the other side may take to take what is left when one side has gone."""
# RFC 6455, section 7.4.1, and the registry of close codes.
GOING_AWAY, SERVICE_RESTART, BAD_GATEWAY = 1001, 1012, 1014
_OPCODE_CLOSE = 0x8
_REASON_BYTES_MAX = 123


def wants_websocket(request: web.Request) -> bool:
    """Whether a request asks for the connection to become a websocket."""
    return request.headers.get(hdrs.UPGRADE, "").lower() == "websocket"


class Frames:
    """Follows the frames in a stream of bytes, as far as to know where they end (RFC 6455, section 5.2)."""

    def __init__(self) -> None:
        self._head = b""
        self._left = 0
        self.closed = False

    @property
    def between(self) -> bool:
        """No frame has begun and not ended."""
        return not self._left and not self._head

    def feed(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            if self._left:
                taken = min(self._left, len(data) - at)
                self._left -= taken
                at += taken
                continue
            self._head += data[at : at + 1]
            at += 1
            self._read_head()

    def _read_head(self) -> None:
        head = self._head
        if len(head) < 2:
            return
        length = head[1] & 0x7F
        extra = {126: 2, 127: 8}.get(length, 0)
        masked = 4 if head[1] & 0x80 else 0
        if len(head) < 2 + extra + masked:
            return
        self._left = int.from_bytes(head[2 : 2 + extra]) if extra else length
        self.closed = self.closed or head[0] & 0x0F == _OPCODE_CLOSE
        self._head = b""


def close_frame(code: int, reason: str) -> bytes:
    """A close frame of a server."""
    payload = code.to_bytes(2) + reason.encode()[:_REASON_BYTES_MAX]
    return bytes((0x80 | _OPCODE_CLOSE, len(payload))) + payload


class _ClientBytes:
    """What the client sends, as aiohttp's server hands it over (the interface of its websocket reader)."""

    def __init__(self, request: web.Request) -> None:
        self._protocol = request.protocol
        self._chunks: deque[bytes] = deque()
        self._buffered = 0
        self._paused = False
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        self._chunks.append(bytes(data))
        self._buffered += len(data)
        if self._buffered > BUFFER_BYTES_HIGH and not self._paused:
            self._paused = True
            self._protocol.pause_reading()
        self._wake()
        return False, b""

    def feed_eof(self) -> None:
        self._ended = True
        self._wake()

    async def chunk(self) -> bytes:
        """The next bytes; empty at the end."""
        while not self._chunks:
            if self._ended:
                return b""
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        taken = b"".join(self._chunks)
        self._chunks.clear()
        self._buffered = 0
        if self._paused:
            self._paused = False
            self._protocol.resume_reading()
        return taken

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Websocket:
    """One websocket, from its request to its end."""

    def __init__(self, carrier: Carrier, request: web.Request, call: Call, *, idle_s_max: float) -> None:
        self._carrier = carrier
        self._request = request
        self._call = call
        self._idle_s_max = idle_s_max
        self._ways: anyio.CancelScope | None = None
        self._frames = Frames()
        self._moved_s = 0.0
        self._body = WholeBody(b"")
        call.kind, call.body = "websocket", self._body

    async def run(self) -> web.StreamResponse:
        """Relays it to its end. Raises a typed error before the handshake is through."""
        if self._request.method != hdrs.METH_GET or self._request.version < HttpVersion11:
            raise InvalidInputError(
                "a websocket begins with a GET of HTTP/1.1", where="upgrade", next_step="use a websocket client"
            )
        call = self._call
        call.headers["connection"] = "Upgrade"
        call.headers["upgrade"] = "websocket"
        return await self._carrier.attended(call, self._attempt)

    async def _attempt(self, lease: Lease) -> tuple[web.StreamResponse, SnowdropError | None]:
        call = self._call
        granted = lease.granted
        try:
            async with asyncio.timeout(min(HANDSHAKE_S_MAX, granted.request_s_max)) as bound:
                async with self._carrier.upstreams.exchange(
                    granted.socket_path, call.method, call.target, call.headers, b""
                ) as exchange:
                    call.status, call.first_byte_unix_ns = exchange.status, time.time_ns()
                    if exchange.status != SWITCHING_PROTOCOLS:
                        return await self._declined(exchange), None
                    bound.reschedule(None)  # from here on the bound of idleness holds
                    answer = await self._accept(exchange)
                    return answer, await self._converse(answer, exchange.connection)
        except TimeoutError as error:
            raise TimedOutError(
                "the replica did not take the websocket in time",
                where=f"handshake_s_max={HANDSHAKE_S_MAX:g}",
                next_step="`snowdrop logs` shows what it is doing",
            ) from error
        except BrokenError as error:
            died = ReplicaDiedError(
                "the replica died before it took the websocket",
                where=f"replica {granted.replica}",
                next_step="connect again; `snowdrop logs` shows the replica's last words",
            )
            lease.unreachable(str(error))
            raise died from error

    async def _declined(self, exchange: Exchange) -> web.StreamResponse:
        """The replica's own answer, as to any request; a long one is cut short."""
        body = b""
        async for chunk in exchange:
            body += chunk
            if len(body) > BODY_WHOLE_BYTES_MAX:
                break
        headers = without(exchange.headers, DROPPED_DOWN)
        headers["x-request-id"] = self._call.request_id
        self._call.sent_bytes = len(body)
        return web.Response(status=exchange.status, headers=headers, body=body[:BODY_WHOLE_BYTES_MAX])

    async def _accept(self, exchange: Exchange) -> web.StreamResponse:
        headers = without(exchange.headers, DROPPED_DOWN)
        headers["connection"] = "Upgrade"
        headers["upgrade"] = "websocket"
        headers["x-request-id"] = self._call.request_id
        answer = web.StreamResponse(status=SWITCHING_PROTOCOLS, headers=headers)
        answer.force_close()
        await answer.prepare(self._request)
        return answer

    async def _converse(self, answer: web.StreamResponse, replica: Connection) -> SnowdropError | None:
        """Carries bytes both ways until one side ends; says why, if it was not one of the two."""
        client = _ClientBytes(self._request)
        # The interface that aiohttp's own websockets use; it only calls feed_data and feed_eof.
        self._request.protocol.set_parser(client)  # type: ignore[arg-type]
        self._moved_s = time.monotonic()
        told: list[SnowdropError] = []
        async with anyio.create_task_group() as ways:
            self._ways = ways.cancel_scope

            async def up() -> None:
                try:
                    while chunk := await client.chunk():
                        self._moved_s = time.monotonic()
                        self._body.received_bytes += len(chunk)
                        await replica.write(chunk)
                except BrokenError:
                    return  # the other way has it, too, with what the replica said before
                ways.cancel_scope.cancel()

            async def down() -> None:
                try:
                    while chunk := await replica.chunk():
                        self._moved_s = time.monotonic()
                        self._call.sent_bytes += len(chunk)
                        self._frames.feed(chunk)
                        await answer.write(chunk)
                except BrokenError as error:
                    told.append(self._replica_died(error))
                except ConnectionError:
                    pass  # the client has gone
                ways.cancel_scope.cancel()

            async def watch() -> None:
                await self._until_idle()
                told.append(self._idle())
                ways.cancel_scope.cancel()

            ways.start_soon(up)
            ways.start_soon(down)
            ways.start_soon(watch)
        if told:
            code = GOING_AWAY if isinstance(told[0], TimedOutError) else BAD_GATEWAY
            self._say_close(code, str(told[0]))
        elif not self._frames.closed:
            # The replica's end without a close frame is passed on as what it is.
            self._say_close(BAD_GATEWAY, "the replica closed the connection")
        return told[0] if told else None

    def cut(self) -> None:
        """Ends it with a close frame, because the gateway stops."""
        self._say_close(SERVICE_RESTART, "the gateway is stopping")
        if self._ways is not None:
            self._ways.cancel()

    async def _until_idle(self) -> None:
        idle_s = 0.0
        while idle_s < self._idle_s_max:
            await anyio.sleep(self._idle_s_max - idle_s)
            idle_s = time.monotonic() - self._moved_s

    def _replica_died(self, error: BrokenError) -> SnowdropError:
        return ReplicaDiedError(f"the replica died: {error}", where="websocket", next_step="connect again")

    def _idle(self) -> SnowdropError:
        return TimedOutError(
            f"nothing came for {self._idle_s_max:g} s",
            where=f"gateway.websocket_idle_s_max={self._idle_s_max:g}",
            next_step="send pings, or raise the setting",
        )

    def _say_close(self, code: int, reason: str) -> None:
        """A close frame of our own, where one fits: behind a whole frame, and only if none has gone before."""
        transport = self._request.transport
        if (
            transport is not None
            and not transport.is_closing()
            and self._frames.between
            and not self._frames.closed
        ):
            transport.write(close_frame(code, reason))

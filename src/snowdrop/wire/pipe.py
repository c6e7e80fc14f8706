"""Framed messages as an event loop's protocol: for the one channel that every request of several workers crosses.

The frames are those of `stream.py`, whose tasks, locks and time-outs cost more than the messages. Here a message
is handled in the callback that received it, and everything said in one turn of the loop goes out in one write.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Generic, TypeVar, cast

import anyio.abc

from snowdrop.domain.errors import ProtocolError
from snowdrop.wire.codec import FRAME_BYTES_MAX, Codec, Message
from snowdrop.wire.stream import SEND_S_MAX

OUTBOX_BYTES_MAX = 64 << 20
"""A peer that leaves so much waiting is treated as gone."""
_LENGTH = struct.Struct("<I")
In = TypeVar("In")


class MessagePipe(asyncio.Protocol, Generic[In]):
    """One connection. `open`, `first` for the peer's hello, then `run` until it ends; `send` at any time."""

    def __init__(self, codec: Codec[In]) -> None:
        self._codec = codec
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._buffer = b""
        self._outgoing: list[bytes] = []
        self._stalled: asyncio.TimerHandle | None = None
        self._early: list[In] = []
        self._handler: Callable[[In], None] | None = None
        self._told: asyncio.Future[None] = self._loop.create_future()
        self._error: Exception | None = None
        self._lost = False

    async def open(self, stream: anyio.abc.ByteStream) -> None:
        """Takes a unix connection of anyio over."""
        raw = stream.extra(anyio.abc.SocketAttribute.raw_socket).dup()  # noqa: S610 -- anyio's, not a database's
        raw.setblocking(False)
        await stream.aclose()
        await self._loop.create_unix_connection(lambda: self, sock=raw)

    async def first(self) -> In:
        """The peer's first message. Raises anyio.EndOfStream if there is none, ProtocolError if it is none."""
        while not self._early:
            if self._error is not None:
                raise self._error
            if self._lost:
                raise anyio.EndOfStream
            await self._something()
        return self._early.pop(0)

    async def run(self, handler: Callable[[In], None]) -> None:
        """Hands every message to `handler` until the connection ends.

        Raises ProtocolError for a broken frame, and what the handler raises.
        """
        early, self._early = self._early, []
        for message in early:
            handler(message)
        self._handler = handler
        while not self._lost and self._error is None:
            await self._something()
        if self._error is not None:
            raise self._error

    def send(self, message: Message) -> None:
        """Says something; to a peer that is gone, nothing."""
        if self._lost:
            return
        data = self._codec.encode(message)
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing += (_LENGTH.pack(len(data)), data)

    def close(self) -> None:
        """Sends what has been said and ends the connection."""
        self._flush()
        self._transport.close()

    # --- asyncio.Protocol ----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._error is not None:
            return
        buffer = self._buffer + data if self._buffer else data
        at = 0
        try:
            while len(buffer) - at >= 4:
                (length,) = _LENGTH.unpack_from(buffer, at)
                if length > FRAME_BYTES_MAX:
                    raise ProtocolError(f"frame of {length} bytes", where=f"frame_bytes_max={FRAME_BYTES_MAX}")
                if len(buffer) - at - 4 < length:
                    break
                message = self._codec.decode(buffer[at + 4 : at + 4 + length])
                at += 4 + length
                if self._handler is not None:
                    self._handler(message)
                else:
                    self._early.append(message)
                    self._tell()
        except Exception as error:  # noqa: BLE001 -- raised again by whoever runs the pipe
            self._error = error
            self._tell()
            return
        self._buffer = buffer[at:]

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._outgoing.clear()
        if self._stalled is not None:
            self._stalled.cancel()
        self._tell()

    def pause_writing(self) -> None:
        self._stalled = self._loop.call_later(SEND_S_MAX, self._transport.abort)

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    # --- inside --------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        if not self._outgoing or self._lost:
            return
        data = b"".join(self._outgoing)
        self._outgoing.clear()
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > OUTBOX_BYTES_MAX:
            self._transport.abort()

    async def _something(self) -> None:
        await self._told
        self._told = self._loop.create_future()

    def _tell(self) -> None:
        if not self._told.done():
            self._told.set_result(None)

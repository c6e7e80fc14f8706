"""Framed messages over a byte stream: a 4-byte little-endian length, then the message."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Iterable
from typing import Generic, TypeVar

import anyio
import anyio.abc
from anyio.streams.buffered import BufferedByteReceiveStream

from snowdrop.domain.errors import ProtocolError
from snowdrop.wire.codec import FRAME_BYTES_MAX, Codec, Message

_LENGTH = struct.Struct("<I")
In = TypeVar("In")

SEND_S_MAX = 10.0
"""A peer that takes nothing for so long is treated as gone."""


class MessageStream(Generic[In]):
    """One connection. `send` may be called by several tasks; `async for` yields what the peer sends.

    The iteration ends when the peer closes; a broken frame raises ProtocolError.
    """

    def __init__(self, stream: anyio.abc.ByteStream, codec: Codec[In]) -> None:
        self._stream = stream
        self._codec = codec
        self._buffered = BufferedByteReceiveStream(stream)
        self._send_lock = anyio.Lock()

    async def send(self, message: Message) -> None:
        """Sends one message; raises anyio.BrokenResourceError if the peer is gone or takes nothing."""
        await self.send_all((message,))

    async def send_all(self, messages: Iterable[Message]) -> None:
        """Sends several in one write, which costs little more than one; raises as `send` does."""
        frames: list[bytes] = []
        for message in messages:
            data = self._codec.encode(message)
            frames += (_LENGTH.pack(len(data)), data)
        async with self._send_lock:
            try:
                with anyio.fail_after(SEND_S_MAX):
                    await self._stream.send(b"".join(frames))
            except TimeoutError as error:
                # Half a frame may be out: the connection is of no more use.
                with anyio.CancelScope(shield=True):
                    await anyio.aclose_forcefully(self._stream)
                raise anyio.BrokenResourceError from error

    async def receive(self) -> In:
        """The next message; raises anyio.EndOfStream when the peer has closed."""
        try:
            (length,) = _LENGTH.unpack(await self._buffered.receive_exactly(4))
            if length > FRAME_BYTES_MAX:
                raise ProtocolError(f"frame of {length} bytes", where=f"frame_bytes_max={FRAME_BYTES_MAX}")
            return self._codec.decode(await self._buffered.receive_exactly(length))
        except (anyio.IncompleteRead, anyio.BrokenResourceError, ConnectionError) as error:
            raise anyio.EndOfStream from error

    async def __aiter__(self) -> AsyncIterator[In]:
        while True:
            try:
                message = await self.receive()
            except (anyio.EndOfStream, anyio.ClosedResourceError):
                return
            yield message

    async def aclose(self) -> None:
        await anyio.aclose_forcefully(self._stream)

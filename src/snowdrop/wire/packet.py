"""Messages with file descriptors, over a SOCK_SEQPACKET unix socket: one packet is one message.

Used where descriptors travel: data plane -> agent (landing areas) and agent -> replica (areas, listening
socket). Both a blocking and an async reader exist, because the replica reads its first message before it has
an event loop. A forked replica can be handed the same socket as one that was executed.
"""

from __future__ import annotations

import os
import socket
from typing import Generic, TypeVar

import anyio

from snowdrop.domain.errors import ProtocolError
from snowdrop.wire.codec import Codec, Message

PACKET_BYTES_MAX = 192 << 10
"""Below the default socket buffer, so that a packet never fails for its size alone."""
PACKET_FDS_MAX = 250
"""The kernel's own limit is 253."""

In = TypeVar("In")


def packet_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends. Neither is inherited by children unless passed on by name."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class PacketChannel(Generic[In]):
    """One end of a packet socket. Descriptors received belong to the caller, who must close them."""

    def __init__(self, sock: socket.socket, codec: Codec[In]) -> None:
        self._sock = sock
        self._codec = codec

    def fileno(self) -> int:
        return self._sock.fileno()

    def send_blocking(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        """Raises OSError (EPIPE, ECONNRESET) if the other end is gone."""
        data = self._encode(message, fds)
        self._sock.setblocking(True)
        socket.send_fds(self._sock, [data], list(fds))

    def receive_blocking(self) -> tuple[In, tuple[int, ...]]:
        """The next message and its descriptors; raises EOFError when the other end has closed."""
        self._sock.setblocking(True)
        return self._decode(*socket.recv_fds(self._sock, PACKET_BYTES_MAX, PACKET_FDS_MAX))

    async def send(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        data = self._encode(message, fds)
        self._sock.setblocking(False)
        while True:
            try:
                socket.send_fds(self._sock, [data], list(fds))
                return
            except BlockingIOError:
                await anyio.wait_writable(self._sock)

    async def receive(self) -> tuple[In, tuple[int, ...]]:
        """As `receive_blocking`, without holding the event loop."""
        self._sock.setblocking(False)
        while True:
            try:
                got = socket.recv_fds(self._sock, PACKET_BYTES_MAX, PACKET_FDS_MAX)
            except BlockingIOError:
                await anyio.wait_readable(self._sock)
                continue
            except ConnectionError as error:
                raise EOFError("peer is gone") from error
            return self._decode(*got)

    def close(self) -> None:
        self._sock.close()

    def _encode(self, message: Message, fds: tuple[int, ...]) -> bytes:
        data = self._codec.encode(message)
        if len(data) > PACKET_BYTES_MAX:
            raise ProtocolError(
                f"{type(message).__name__} has {len(data)} bytes",
                where=f"packet_bytes_max={PACKET_BYTES_MAX}",
            )
        if len(fds) > PACKET_FDS_MAX:
            raise ProtocolError(f"{len(fds)} descriptors in one packet", where=f"packet_fds_max={PACKET_FDS_MAX}")
        return data

    def _decode(self, data: bytes, fds: list[int], flags: int, _address: object) -> tuple[In, tuple[int, ...]]:
        if not data and not fds:
            raise EOFError("peer closed")
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            for fd in fds:
                os.close(fd)
            raise ProtocolError("packet was cut short", where=f"packet_bytes_max={PACKET_BYTES_MAX}")
        try:
            return self._codec.decode(data), tuple(fds)
        except ProtocolError:
            for fd in fds:
                os.close(fd)
            raise

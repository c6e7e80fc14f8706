"""Connections for calls between services: opened to a gateway, introduced, given to the replica that asked.

The replica's sandbox has no way out of its own. It gets connections one by one, each bound to its identity by what
is said here, before it has the descriptor.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import msgspec

from snowdrop.domain.errors import PlatformDownError, SnowdropError
from snowdrop.wire.calls import INTRODUCTION_PATH, SOCKET_SUFFIX, Introduction
from snowdrop.wire.control import StartReplica
from snowdrop.wire.replica import CallOpened

INTRODUCE_S_MAX = 3.0
OPENING_MAX = 32
"""Connections that are being opened for one replica at a time; it is told to try again beyond that."""
ANSWER_BYTES_MAX = 4_096

Tell = Callable[[CallOpened, tuple[int, ...]], Awaitable[None]]


class CallDoor:
    """The way out of one replica. `sockets` is the folder where gateway workers listen for it."""

    def __init__(self, sockets: Path, order: StartReplica) -> None:
        self._sockets = sockets
        self._introduction = Introduction(
            tenant=order.key.tenant,
            deployment=order.key.deployment,
            replica=order.key.replica,
            calls=order.revision.spec.calls,
        )
        self._opening = 0

    async def answer(self, number: int, tell: Tell) -> None:
        """Gives the replica a connection, or tells it why there is none."""
        if self._opening >= OPENING_MAX:
            error = PlatformDownError("too many connections at a time", where=f"opening_max={OPENING_MAX}")
            await tell(CallOpened(number=number, error=error.body()), ())
            return
        self._opening += 1
        try:
            connection = await self.open()
        except SnowdropError as error:
            await tell(CallOpened(number=number, error=error.body()), ())
        else:
            with connection:
                await tell(CallOpened(number=number), (connection.fileno(),))
        finally:
            self._opening -= 1

    async def open(self) -> socket.socket:
        """A connection on which this replica may call. Raises PlatformDownError if no gateway takes it."""
        paths = [path for path in self._sockets.glob(f"*{SOCKET_SUFFIX}") if path.is_socket()]
        random.shuffle(paths)  # spreads calls over the workers
        for path in paths:
            try:
                with anyio.fail_after(INTRODUCE_S_MAX):
                    return await self._introduced(path)
            except (OSError, TimeoutError):
                continue  # of a worker that has ended, or is ending: another may live
        raise PlatformDownError(
            "no gateway takes calls",
            where=str(self._sockets),
            next_step="try again: is the gateway being started?",
        )

    async def _introduced(self, path: Path) -> socket.socket:
        loop = asyncio.get_running_loop()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            await loop.sock_connect(sock, str(path))
            body = msgspec.json.encode(self._introduction)
            head = f"POST {INTRODUCTION_PATH} HTTP/1.1\r\nHost: gateway\r\nContent-Length: {len(body)}\r\n\r\n"
            await loop.sock_sendall(sock, head.encode() + body)
            answer = b""
            # If it takes us, its head's end is its end: what comes after is for the replica.
            while b"\r\n\r\n" not in answer:
                part = await loop.sock_recv(sock, ANSWER_BYTES_MAX)
                answer += part
                if not part or len(answer) > ANSWER_BYTES_MAX:
                    raise ConnectionError("no whole answer")
            if not answer.startswith(b"HTTP/1.1 204 "):
                raise ConnectionError(answer[:80].decode("latin-1"))
        except BaseException:
            sock.close()
            raise
        return sock

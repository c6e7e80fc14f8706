"""Kept-alive connections to replicas by socket path, and one exchange over one of them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator
from types import TracebackType

import aiohttp
import anyio
import anyio.abc
from aiohttp.http import HttpProcessingError
from multidict import CIMultiDict

from snowdrop.domain.errors import InvalidInputError, SnowdropError
from snowdrop.gateway.upstream.connection import BrokenError, Connection, UnconnectedError
from snowdrop.gateway.upstream.pulse import Pulse

IDLE_S_MAX = 60.0
"""Below the replica's own keep-alive bound, so that a connection is never closed under a request."""
SWEEP_S = 15.0
CONNECT_S_MAX = 5.0
IDLE_MAX = 1_024
"""Idle connections kept to one replica."""
_CHUNKED = "transfer-encoding: chunked"
_CHUNKED_END = _CHUNKED.encode() + b"\r\n\r\n"
_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})


class Upstreams:
    """All connections of one worker to replicas."""

    def __init__(self) -> None:
        self._idle: dict[str, deque[Connection]] = {}
        self._pulse = Pulse()

    def exchange(
        self,
        socket_path: str,
        method: str,
        target: str,
        headers: CIMultiDict[str],
        body: bytes | AsyncIterable[bytes],
    ) -> Exchange:
        """A request, sent when the context is entered; leaving early tells the replica that its caller is gone.

        Entering raises UnconnectedError if nothing can have been sent, BrokenError if the answer did not come.
        """
        return Exchange(self, socket_path, _head(method, target, headers, body), body, method=method)

    async def take(self, socket_path: str) -> Connection:
        """A connection that nobody uses. Raises UnconnectedError."""
        idle = self._idle.get(socket_path)
        while idle:
            connection = idle.pop()
            if not connection.is_lost:
                return connection
        try:
            async with asyncio.timeout(CONNECT_S_MAX):
                _transport, connection = await asyncio.get_running_loop().create_unix_connection(
                    lambda: Connection(self._pulse), socket_path
                )
        except (OSError, TimeoutError) as error:
            raise UnconnectedError(str(error) or f"no connection in {CONNECT_S_MAX:g} s") from error
        return connection

    def give_back(self, socket_path: str, connection: Connection) -> None:
        """The exchange is over: the connection is kept if another may follow."""
        if not connection.reusable:
            connection.abort()
            return
        idle = self._idle.setdefault(socket_path, deque())
        if len(idle) >= IDLE_MAX:
            connection.close()
            return
        connection.idle_since_s = time.monotonic()
        idle.append(connection)

    @property
    def open_paths(self) -> frozenset[str]:
        """Sockets to which an idle connection is kept."""
        return frozenset(self._idle)

    async def run(self) -> None:
        """Closes what has been idle for long, for ever."""
        while True:
            await anyio.sleep(SWEEP_S)
            self.sweep(time.monotonic())

    def sweep(self, now_s: float) -> None:
        """Closes what has been idle for IDLE_S_MAX. What was used last is taken first: the oldest are in front."""
        for path, idle in list(self._idle.items()):
            while idle and (idle[0].is_lost or idle[0].idle_since_s < now_s - IDLE_S_MAX):
                idle.popleft().close()
            if not idle:
                del self._idle[path]

    def close(self) -> None:
        """Closes all idle connections."""
        for idle in self._idle.values():
            for connection in idle:
                connection.close()
        self._idle.clear()


class Exchange:
    """One request and its answer. `status`, `headers`, `content_length` are there inside the context."""

    def __init__(
        self,
        pool: Upstreams,
        socket_path: str,
        head: bytes,
        body: bytes | AsyncIterable[bytes],
        *,
        method: str,
    ) -> None:
        self._pool = pool
        self._path = socket_path
        self._method = method
        self._body = body
        self._head = head
        self._connection: Connection
        self._tasks: anyio.abc.TaskGroup | None = None
        self._sent = False

    async def __aenter__(self) -> Exchange:
        self._connection = await self._pool.take(self._path)
        try:
            if isinstance(self._body, bytes):
                self._connection.begin(self._head + self._body, method=self._method, whole=True)
                self._sent = True
            else:
                self._connection.begin(self._head, method=self._method, whole=False)
                self._tasks = await anyio.create_task_group().__aenter__()
                self._tasks.start_soon(self._upload, self._body)
            await self._connection.answered()
        except BaseException as error:
            await self._end(error)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end(error)

    @property
    def status(self) -> int:
        return self._connection.status

    @property
    def headers(self) -> CIMultiDict[str]:
        """As the replica sent them. They are the caller's: it may change them."""
        return self._connection.headers

    @property
    def content_length(self) -> int | None:
        return self._connection.content_length

    @property
    def connection(self) -> Connection:
        """After a 101: the tunnel."""
        return self._connection

    async def read(self) -> bytes:
        """The whole body; for those whose length is known to be small."""
        first = await self._connection.chunk()
        if len(first) == self._connection.content_length or not first:
            return first
        return first + b"".join([chunk async for chunk in self])

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises BrokenError if it ends before it is whole."""
        while chunk := await self._connection.chunk():
            yield chunk

    async def _upload(self, body: AsyncIterable[bytes]) -> None:
        connection = self._connection
        sized = not self._head.endswith(_CHUNKED_END)
        try:
            async for piece in body:
                if not piece:
                    continue
                await connection.write(piece if sized else b"%x\r\n%b\r\n" % (len(piece), piece))
            if not sized:
                await connection.write(b"0\r\n\r\n")
        except BrokenError:
            return  # whoever waits for the answer has it from the connection
        except (SnowdropError, OSError, aiohttp.ClientError, HttpProcessingError) as error:
            connection.fail(f"the request's body broke off: {error}")
            return
        self._sent = True

    async def _end(self, error: BaseException | None) -> None:
        connection = self._connection
        try:
            if self._tasks is not None:
                tasks, self._tasks = self._tasks, None
                tasks.cancel_scope.cancel()
                await tasks.__aexit__(None, None, None)
        finally:
            if error is None and self._sent:
                self._pool.give_back(self._path, connection)
            else:
                connection.abort()


def _head(method: str, target: str, headers: CIMultiDict[str], body: bytes | AsyncIterable[bytes]) -> bytes:
    """The head of a request. Raises InvalidInputError for a header that would end its line."""
    lines = [f"{method} {target} HTTP/1.1"]
    if "host" not in headers:
        lines.append("host: replica")
    lines += map(": ".join, headers.items())
    if isinstance(body, bytes):
        if body or method in _WITH_BODY:
            lines.append(f"content-length: {len(body)}")
    elif "content-length" not in headers:
        lines.append(_CHUNKED)
    lines.append("\r\n")
    head = "\r\n".join(lines)
    if head.count("\n") != len(lines) or head.count("\r") != len(lines):
        raise InvalidInputError("a header has a line break in it", where="request headers")
    return head.encode("utf-8", "surrogateescape")

"""Kept-alive connections to replicas, one session a unix socket, dropped when unused for a while."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import anyio

IDLE_S_MAX = 120.0
SWEEP_S = 15.0
# Below the replica's own keep-alive bound, so that a connection is never closed under a request.
KEEPALIVE_S = 60.0
CONNECT_S_MAX = 5.0


class Connections:
    """Sessions by socket path."""

    def __init__(self) -> None:
        self._sessions: dict[str, aiohttp.ClientSession] = {}
        self._used_s: dict[str, float] = {}
        self._users: dict[str, int] = {}

    @asynccontextmanager
    async def using(self, socket_path: str) -> AsyncIterator[aiohttp.ClientSession]:
        """The session for a replica's socket; it stays open at least while inside, however long that is."""
        self._users[socket_path] = self._users.get(socket_path, 0) + 1
        try:
            yield self._session(socket_path)
        finally:
            self._used_s[socket_path] = time.monotonic()
            self._users[socket_path] -= 1
            if not self._users[socket_path]:
                del self._users[socket_path]

    def _session(self, socket_path: str) -> aiohttp.ClientSession:
        session = self._sessions.get(socket_path)
        if session is None:
            session = self._sessions[socket_path] = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(path=socket_path, limit=0, keepalive_timeout=KEEPALIVE_S),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S_MAX),
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            )
            # aiohttp sends idempotent requests again when a kept connection breaks, which could run one twice.
            session._retry_connection = False  # noqa: SLF001 -- no public switch exists
        return session

    @property
    def open_paths(self) -> frozenset[str]:
        """Sockets that a session is kept for."""
        return frozenset(self._sessions)

    async def run(self) -> None:
        """Closes sessions that have not been used for a while, for ever."""
        while True:
            await anyio.sleep(SWEEP_S)
            await self.sweep(time.monotonic())

    async def sweep(self, now_s: float) -> None:
        """Closes what nobody uses and nobody has used for IDLE_S_MAX."""
        for path in [path for path, used_s in self._used_s.items() if used_s < now_s - IDLE_S_MAX]:
            if path not in self._users:
                del self._used_s[path]
                await self._sessions.pop(path).close()

    async def aclose(self) -> None:
        sessions = list(self._sessions.values())
        self._sessions.clear()
        self._used_s.clear()
        for session in sessions:
            await session.close()

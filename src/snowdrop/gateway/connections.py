"""Kept-alive connections to replicas, one session a unix socket, dropped when unused for a while."""

from __future__ import annotations

import time

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

    def session(self, socket_path: str) -> aiohttp.ClientSession:
        """The session for a replica's socket, made on first use."""
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
        self._used_s[socket_path] = time.monotonic()
        return session

    async def run(self) -> None:
        """Closes sessions that have not been used for a while, for ever."""
        while True:
            await anyio.sleep(SWEEP_S)
            limit_s = time.monotonic() - IDLE_S_MAX
            for path in [path for path, used_s in self._used_s.items() if used_s < limit_s]:
                del self._used_s[path]
                await self._sessions.pop(path).close()

    async def aclose(self) -> None:
        sessions = list(self._sessions.values())
        self._sessions.clear()
        self._used_s.clear()
        for session in sessions:
            await session.close()

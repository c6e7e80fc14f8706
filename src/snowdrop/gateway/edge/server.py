"""One generation of a worker's HTTP server: it starts beside the one before and drains when the next is there."""

from __future__ import annotations

import gc
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from ssl import SSLContext

import anyio
import anyio.lowlevel
import msgspec
from aiohttp import web
from aiohttp.http import HttpProcessingError

BACKLOG = 1024
KEEPALIVE_S = 75.0
LINGER_S = 5.0
"""After a reload, idle connections stay open for so long: a request may be on its way. Its answer closes them."""
DRAIN_TICK_S = 0.02
CUT_S_MAX = 0.5
"""What those get that are still open when their time is over; not 0, which would be no bound to aiohttp."""
# Requests make few cycles; looking for them after every 700 new objects cost about a tenth of the throughput.
COLLECT_AFTER_OBJECTS = 20_000
COLLECT_OLDER_EVERY = 20


class _OurErrors(logging.Filter):
    """Leaves out what strangers send that is not HTTP: it is answered with 400, and would fill the log."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


log = logging.getLogger("snowdrop.gateway.http")
log.addFilter(_OurErrors())


class Listening(msgspec.Struct, frozen=True, kw_only=True):
    """A listening socket that outlives any server on it, and the TLS that is spoken there."""

    socket: socket.socket
    tls: SSLContext | None = None


class EdgeServer:
    """`start`, then `stop`. The listening sockets stay open, so that no connection is refused in between.

    `cut` is called when the time of those that are still open is over, before their connections are closed.
    """

    def __init__(
        self,
        app: web.Application,
        listening: Sequence[Listening],
        *,
        shutdown_s_max: float,
        cut: Callable[[], None] | None = None,
    ) -> None:
        self._listening = listening
        self._stopped = False
        self._shutdown_s_max = shutdown_s_max
        self._cut = cut
        self._runner = web.AppRunner(
            app,
            access_log=None,
            logger=log,
            # A client that goes away cancels its handler, which cancels the work in the replica.
            handler_cancellation=True,
            # We wait ourselves, before: aiohttp drops what clients send while it waits, uploads and all.
            shutdown_timeout=CUT_S_MAX,
            keepalive_timeout=KEEPALIVE_S,
            # What is compressed goes up as it is: its length and encoding are those that were sent.
            auto_decompress=False,
        )

    async def start(self) -> None:
        """Begins to accept connections."""
        await self._runner.setup()
        for listening in self._listening:
            # A copy of the descriptor: the server closes what it was given.
            copy = listening.socket.dup()
            await web.SockSite(self._runner, copy, backlog=BACKLOG, ssl_context=listening.tls).start()

    async def stop(self) -> None:
        """Accepts nothing more, closes idle connections, lets requests in flight end within the bound."""
        if self._stopped:
            return
        self._stopped = True
        # We are being stopped, which cancels whatever waits: requests in flight get their time all the same.
        with anyio.CancelScope(shield=True):
            await self._accept_nothing()
            await self._until_empty(0.0, self._shutdown_s_max)
            if self._cut is not None:
                self._cut()
                await anyio.lowlevel.checkpoint()
            await self._runner.cleanup()

    async def drain(self, *, drain_s_max: float) -> None:
        """As `stop`, for one that is replaced: idle connections get LINGER_S, streams `drain_s_max`."""
        try:
            await self._accept_nothing()
            await self._until_empty(min(LINGER_S, drain_s_max), drain_s_max)
        finally:
            await self.stop()

    async def _accept_nothing(self) -> None:
        for site in list(self._runner.sites):
            await site.stop()

    async def _until_empty(self, linger_s: float, s_max: float) -> None:
        """Returns when no connection is left, or at the bound. Idle ones are closed after `linger_s`."""
        server = self._runner.server
        began_s = time.monotonic()
        while server is not None and server.connections and time.monotonic() < began_s + s_max:
            if time.monotonic() >= began_s + linger_s:
                for connection in server.connections:
                    _close_if_idle(connection)
            await anyio.sleep(DRAIN_TICK_S)


def _close_if_idle(connection: web.RequestHandler) -> None:
    """`close` only ends the wait for the next request: the client stays connected until its transport ends too."""
    # Nothing public tells idle from busy; the second is true until the answer is written.
    if connection._current_request is None and not connection._request_in_progress:  # noqa: SLF001
        connection.close()
        if connection.transport is not None:
            connection.transport.close()


@asynccontextmanager
async def serving(
    app: web.Application,
    listener: socket.socket,
    *,
    shutdown_s_max: float,
    cut: Callable[[], None] | None = None,
) -> AsyncIterator[None]:
    """Serves on one socket while inside, and closes it."""
    with listener:
        server = EdgeServer(app, [Listening(socket=listener)], shutdown_s_max=shutdown_s_max, cut=cut)
        await server.start()
        try:
            yield
        finally:
            await server.stop()


def spare_collector() -> None:
    """For a process that only relays: what exists by now stays for good, and cycles are looked for seldom."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER_OBJECTS, COLLECT_OLDER_EVERY, COLLECT_OLDER_EVERY)

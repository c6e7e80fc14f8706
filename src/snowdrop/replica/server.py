"""The HTTP server of a replica: uvicorn without its signal handlers, logging and command line."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import anyio
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from snowdrop.replica.servable import Servable

KEEP_ALIVE_S = 3_600
"""The gateway closes idle connections; a replica that did would race with the next request on one."""


class HttpServer(uvicorn.Server):
    """Serves `servable` on a listening socket until `finish`."""

    def __init__(self, servable: Servable) -> None:
        super().__init__(
            uvicorn.Config(
                servable.asgi,
                loop="none",
                http=HttpToolsProtocol,
                ws=_websocket_protocol() if servable.has_websockets else "none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                log_level=logging.CRITICAL,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                date_header=False,
                workers=1,  # given, or uvicorn would read WEB_CONCURRENCY
                timeout_keep_alive=KEEP_ALIVE_S,
            )
        )
        self.listening = anyio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the agent orders a drain over the channel; signals keep their default, which is to end us

    def finish(self, *, drain_s_max: float) -> None:
        """Accept no more, let what is in flight end, cancel it after `drain_s_max` seconds."""
        self.config.timeout_graceful_shutdown = max(1, math.ceil(drain_s_max))
        self.should_exit = True


def _websocket_protocol() -> type[asyncio.Protocol]:
    from snowdrop.replica.websockets import PatientWebSocket  # noqa: PLC0415 -- most services have none

    return PatientWebSocket

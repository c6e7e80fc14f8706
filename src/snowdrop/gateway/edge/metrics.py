"""Serves the platform's metrics: the gateway's own, and those of control and agents, gathered when asked.

Always on `run/metrics.sock`, which only the owner of the state folder can open; on TCP only if the settings name
an address. Never on the public listener: metrics tell who uses what.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import anyio
import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, Gauge

from snowdrop.domain.errors import SnowdropError
from snowdrop.domain.layout import StateLayout
from snowdrop.domain.settings import MetricsSettings
from snowdrop.telemetry.metrics import CONTENT_TYPE, METRICS_PATH, Part, exposition, merged
from snowdrop.wire.http import serving_unix

GATHER_S_MAX = 2.0
"""A process that does not answer in time is left out; `snowdrop_scrape_ok` says so."""
PART_BYTES_MAX = 16 << 20
SHUTDOWN_S_MAX = 1.0
log = logging.getLogger("snowdrop.gateway")


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """Another process of the platform that serves `/metrics` on a unix socket."""

    process: str
    socket_path: Path


def metrics_peers(layout: StateLayout) -> tuple[Peer, ...]:
    """The other processes of one machine."""
    return (
        Peer(process="control", socket_path=layout.control_socket),
        Peer(process="agent", socket_path=layout.agent_socket),
    )


class MetricsApp:
    """`GET /metrics`: everything, in Prometheus' text format."""

    def __init__(self, registry: CollectorRegistry, peers: Sequence[Peer]) -> None:
        self._registry = registry
        self._peers = peers
        self._scrape_ok = Gauge(
            "snowdrop_scrape_ok", "Whether a process gave its metrics when asked.", ["process"], registry=registry
        )

    def app(self) -> web.Application:
        made = web.Application()
        made.router.add_get(METRICS_PATH, self._get)
        return made

    async def _get(self, _request: web.Request) -> web.Response:
        return web.Response(body=await self.gather(), headers={"content-type": CONTENT_TYPE})

    async def gather(self) -> bytes:
        """All processes' expositions as one."""
        parts: list[Part] = []
        async with anyio.create_task_group() as tasks:

            async def ask(peer: Peer) -> None:
                text = await _ask(peer)
                self._scrape_ok.labels(process=peer.process).set(text is not None)
                if text is not None:
                    parts.append(Part(labels={"process": peer.process}, text=text))

            for peer in self._peers:
                tasks.start_soon(ask, peer)
        own = Part(labels={"process": "gateway"}, text=exposition(self._registry).decode())
        return merged([own, *parts])


async def _ask(peer: Peer) -> str | None:
    timeout = aiohttp.ClientTimeout(total=GATHER_S_MAX)
    connector = aiohttp.UnixConnector(path=str(peer.socket_path))
    try:
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
            session.get(f"http://{peer.process}{METRICS_PATH}") as answer,
        ):
            if answer.status != 200:
                return None
            body = await answer.content.read(PART_BYTES_MAX + 1)
            while chunk := await answer.content.read(PART_BYTES_MAX + 1):
                body += chunk
                if len(body) > PART_BYTES_MAX:
                    return None
            return body.decode()
    except (aiohttp.ClientError, OSError, TimeoutError, UnicodeDecodeError):
        return None


@asynccontextmanager
async def serving_metrics(app: MetricsApp, settings: MetricsSettings, socket_path: Path) -> AsyncIterator[None]:
    """Serves while inside. Raises SnowdropError if the address is taken."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(serving_unix(app.app(), socket_path))
        if settings.host:
            runner = web.AppRunner(app.app(), access_log=None, shutdown_timeout=SHUTDOWN_S_MAX)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            try:
                family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
                listener = socket.create_server((settings.host, settings.port), family=family)
            except (OSError, OverflowError) as error:
                raise SnowdropError(
                    f"metrics cannot be served: {getattr(error, 'strerror', None) or error}",
                    where=f"metrics.host={settings.host}, metrics.port={settings.port}",
                    next_step="choose another port, or leave metrics.host empty: run/metrics.sock stays",
                ) from error
            await web.SockSite(runner, listener).start()
            log.info("metrics are at http://%s:%d%s", settings.host, listener.getsockname()[1], METRICS_PATH)
        yield

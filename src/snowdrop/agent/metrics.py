"""What a node knows as metrics: the content store, what loads were given, bad chunks, what its replicas count."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator

import aiohttp
import anyio
import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from snowdrop.agent.dataplane.client import DataPlane
from snowdrop.agent.replica_counts import ReplicaSaid, ReplicaSums
from snowdrop.domain.errors import SnowdropError
from snowdrop.domain.replica import ReplicaKey, ReplicaReport, ReplicaState
from snowdrop.telemetry.metrics import metrics_route, process_registry
from snowdrop.wire.upkeep import AskStats, NodeStats, StatsTold

ASK_S_MAX = 1.0
ASKED_AT_ONCE_MAX = 32
OF_NODE = ("node",)


class NodeMetrics(Collector):
    """Refreshed by `look` before each exposition, so that a scrape never blocks on the data plane."""

    def __init__(
        self,
        registry: CollectorRegistry,
        node: str,
        plane: Callable[[], Awaitable[DataPlane]],
        reports: Callable[[], tuple[ReplicaReport, ...]],
    ) -> None:
        self._node = node
        self._plane = plane
        self._reports = reports
        self._stats: NodeStats | None = None
        self._sums = ReplicaSums()
        registry.register(self)

    async def look(self) -> None:
        """Asks the data plane and the replicas, each for a bounded time; who does not answer is left out."""
        self._stats = None
        said: list[tuple[ReplicaKey, ReplicaSaid]] = []
        reports = self._reports()
        limiter = anyio.CapacityLimiter(ASKED_AT_ONCE_MAX)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._ask_plane)
            for report in reports:
                if report.state is ReplicaState.READY:
                    tasks.start_soon(_ask_replica, report, said, limiter)
        self._sums.replace(said, {report.key.replica for report in reports if not report.ended_unix_ns})

    async def _ask_plane(self) -> None:
        with anyio.move_on_after(ASK_S_MAX):
            try:
                plane = await self._plane()
                self._stats = (await plane.ask(AskStats, StatsTold)).stats
            except SnowdropError:
                return  # it is being started again; its figures are missing meanwhile

    def describe(self) -> list[Metric]:
        return []  # nothing is computed only to learn the names

    def collect(self) -> Iterator[Metric]:
        if self._stats is not None:
            yield from _store(self._node, self._stats)
        yield from self._sums.collect()


def add_metrics_route(
    app: web.Application,
    node: str,
    plane: Callable[[], Awaitable[DataPlane]],
    reports: Callable[[], tuple[ReplicaReport, ...]],
) -> None:
    """`GET /metrics` on the agent's API."""
    registry = process_registry()
    metrics = NodeMetrics(registry, node, plane, reports)
    app.router.add_routes([metrics_route(registry, look=metrics.look)])


def _store(node: str, stats: NodeStats) -> Iterator[Metric]:
    for name, text, value in (
        ("snowdrop_store_ram_bytes", "Landing areas in memory.", stats.ram_bytes),
        ("snowdrop_store_ram_max_bytes", "Most bytes of landing areas and of the pool.", stats.ram_bytes_max),
        ("snowdrop_store_pool_idle_bytes", "Memory kept ready for landing areas.", stats.pool_idle_bytes),
        ("snowdrop_store_disk_bytes", "Cached content on disk.", stats.disk_bytes),
        ("snowdrop_store_disk_max_bytes", "Most bytes of cached content on disk.", stats.disk_bytes_max),
        ("snowdrop_store_artefacts", "Artefacts cached on the node.", stats.artefacts),
        ("snowdrop_store_artefacts_pinned", "Artefacts that may not be evicted.", stats.pinned),
    ):
        gauge = GaugeMetricFamily(name, text, labels=OF_NODE)
        gauge.add_metric([node], value)
        yield gauge
    served = CounterMetricFamily(
        "snowdrop_store_served_bytes", "Bytes that loads were given, by tier.", labels=(*OF_NODE, "tier")
    )
    for tier, count in stats.served_bytes.items():
        served.add_metric([node, tier], count)
    yield served
    for name, text, value in (
        ("snowdrop_store_chunks_quarantined", "Chunks found wrong on this node.", stats.quarantined),
        ("snowdrop_store_chunks_replaced", "Chunks found wrong and mended.", stats.replaced),
    ):
        counter = CounterMetricFamily(name, text, labels=OF_NODE)
        counter.add_metric([node], value)
        yield counter


async def _ask_replica(
    report: ReplicaReport, said: list[tuple[ReplicaKey, ReplicaSaid]], limiter: anyio.CapacityLimiter
) -> None:
    """Adds what one replica says of itself."""
    timeout = aiohttp.ClientTimeout(total=ASK_S_MAX)
    try:
        async with (
            limiter,
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(report.socket_path), timeout=timeout) as session,
            session.get("http://replica/-/stats") as answer,
        ):
            stats = msgspec.json.decode(await answer.read(), type=ReplicaSaid)
    except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError):
        return  # a command or an ASGI app has no such page, a busy replica no time for it
    said.append((report.key, stats))

"""Prometheus metrics: a registry per process, its exposition, and the sum of several processes' expositions.

The library's global registry is not used: what a process shows is what it was given. Families are declared where
they are measured, on the registry of the process.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
METRICS_PATH = "/metrics"


def process_registry() -> CollectorRegistry:
    """A registry with what the library knows of any process: memory, CPU time, descriptors, collections."""
    registry = CollectorRegistry(auto_describe=False)
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


def exposition(registry: CollectorRegistry) -> bytes:
    """All of a registry in Prometheus' text format."""
    return generate_latest(registry)


def metrics_route(
    registry: CollectorRegistry, *, look: Callable[[], Awaitable[None]] | None = None
) -> web.RouteDef:
    """`GET /metrics` of one process, for its own unix socket; `look` is awaited first, to refresh what is told."""

    async def get(_request: web.Request) -> web.Response:
        if look is not None:
            await look()
        return web.Response(body=exposition(registry), headers={"content-type": CONTENT_TYPE})

    return web.get(METRICS_PATH, get)


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One process's exposition, and the labels that its samples get besides their own."""

    labels: Mapping[str, str]
    text: str


def merged(parts: Iterable[Part]) -> bytes:
    """Several processes' expositions as one: a family that several have is listed once, with all samples.

    Raises ValueError for text that is no exposition.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Merged(parts))
    return generate_latest(registry)


class _Merged(Collector):
    def __init__(self, parts: Iterable[Part]) -> None:
        self._families: dict[str, Metric] = {}
        for part in parts:
            for family in text_string_to_metric_families(part.text):
                whole = self._families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    if family.type == "counter" and sample.name.endswith("_created"):
                        continue
                    # A sample's own label wins: it knows better.
                    labels = {**part.labels, **sample.labels}
                    whole.add_sample(sample.name, labels, sample.value)

    def collect(self) -> Iterator[Metric]:
        yield from self._families.values()

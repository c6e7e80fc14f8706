"""What waits and what is under way at the gateway, read from the queues when asked: requests pay nothing."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from snowdrop.gateway.queue import QueueCore

OF_DEPLOYMENT = ("tenant", "deployment")


class QueueGauges(Collector):
    """To be collected on the event loop of the queues' owner, where nothing changes them meanwhile."""

    def __init__(self, core: QueueCore) -> None:
        self._core = core

    def describe(self) -> list[Metric]:
        return []  # nothing is computed only to learn the names

    def collect(self) -> Iterator[Metric]:
        queued = GaugeMetricFamily(
            "snowdrop_requests_queued", "Requests that wait for a slot.", labels=OF_DEPLOYMENT
        )
        in_flight = GaugeMetricFamily(
            "snowdrop_requests_in_flight", "Requests that have a slot of a replica.", labels=OF_DEPLOYMENT
        )
        for now in self._core.gauges():
            queued.add_metric([now.tenant, now.deployment], now.queued)
            in_flight.add_metric([now.tenant, now.deployment], now.in_flight)
        yield queued
        yield in_flight

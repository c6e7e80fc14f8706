"""What replicas count themselves, summed over the replicas of a deployment, dead ones included.

A replica says totals since it started. What is added here is their growth, so that a sum never falls when a
replica ends: it would look like a restart, and its whole value like growth. It says them out of a sandbox, so they
are bounded and never counted down.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from snowdrop.domain.replica import ReplicaKey

SERIES_MAX = 10_000
"""Endpoints of deployments that are remembered; what comes beyond is not counted."""
ENDPOINTS_MAX = 64
"""Endpoints counted of one replica."""
PATH_CHARS_MAX = 200
SIZES = tuple(str(1 << power) for power in range(13))
OF_DEPLOYMENT = ("tenant", "deployment")
OF_ENDPOINT = (*OF_DEPLOYMENT, "endpoint")

Deployment = tuple[str, str]
Endpoint = tuple[str, str, str]


class BatchCounts(msgspec.Struct, frozen=True, kw_only=True):
    """One batched endpoint: calls of its method, requests in them, failed ones, calls by size (powers of two)."""

    batches: int = 0
    items: int = 0
    failed: int = 0
    sizes: dict[str, int] = msgspec.field(default_factory=dict)
    waited_s: float = 0.0
    busy_s: float = 0.0

    def since(self, before: BatchCounts) -> BatchCounts:
        """The growth since `before`, of the same replica."""
        return BatchCounts(
            batches=max(0, self.batches - before.batches),
            items=max(0, self.items - before.items),
            failed=max(0, self.failed - before.failed),
            sizes={size: max(0, self.sizes.get(size, 0) - before.sizes.get(size, 0)) for size in SIZES},
            waited_s=max(0.0, self.waited_s - before.waited_s),
            busy_s=max(0.0, self.busy_s - before.busy_s),
        )

    def plus(self, more: BatchCounts) -> BatchCounts:
        return BatchCounts(
            batches=self.batches + more.batches,
            items=self.items + more.items,
            failed=self.failed + more.failed,
            sizes={size: self.sizes.get(size, 0) + more.sizes.get(size, 0) for size in SIZES},
            waited_s=self.waited_s + more.waited_s,
            busy_s=self.busy_s + more.busy_s,
        )


class ReplicaSaid(msgspec.Struct, frozen=True):
    """A service class's `/-/stats`, as far as it is read here."""

    in_flight: int = 0
    waiting: int = 0
    batches: dict[str, BatchCounts] = msgspec.field(default_factory=dict)


class ReplicaSums:
    """Sums by deployment. `replace` takes what all living replicas say now."""

    def __init__(self) -> None:
        self._now: dict[Deployment, tuple[int, int]] = {}
        self._last: dict[tuple[str, str], BatchCounts] = {}
        self._batches: dict[Endpoint, BatchCounts] = {}

    def replace(self, said: list[tuple[ReplicaKey, ReplicaSaid]], living: set[str]) -> None:
        """A living replica that said nothing this time keeps its place; an ended one is forgotten."""
        self._now = {}
        self._last = {at: counts for at, counts in self._last.items() if at[0] in living}
        for key, stats in said:
            owner = (key.tenant, key.deployment)
            working, waiting = self._now.get(owner, (0, 0))
            self._now[owner] = (working + stats.in_flight, waiting + stats.waiting)
            for path, counts in list(stats.batches.items())[:ENDPOINTS_MAX]:
                self._grow((*owner, path[:PATH_CHARS_MAX]), (key.replica, path), counts)

    def _grow(self, endpoint: Endpoint, at: tuple[str, str], counts: BatchCounts) -> None:
        if endpoint not in self._batches and len(self._batches) >= SERIES_MAX:
            return
        growth = counts.since(self._last.get(at, BatchCounts()))
        self._last[at] = counts
        self._batches[endpoint] = self._batches.get(endpoint, BatchCounts()).plus(growth)

    def collect(self) -> Iterator[Metric]:
        working = GaugeMetricFamily(
            "snowdrop_replica_in_flight", "Requests that user code works on.", labels=OF_DEPLOYMENT
        )
        waiting = GaugeMetricFamily(
            "snowdrop_replica_waiting",
            "Requests inside of replicas that wait for their turn.",
            labels=OF_DEPLOYMENT,
        )
        for owner, (in_flight, queued) in self._now.items():
            working.add_metric(owner, in_flight)
            waiting.add_metric(owner, queued)
        yield working
        yield waiting
        yield from self._batch_families()

    def _batch_families(self) -> Iterator[Metric]:
        sizes = HistogramMetricFamily(
            "snowdrop_batch_size", "Requests in one call of a batched endpoint.", labels=OF_ENDPOINT
        )
        failed = CounterMetricFamily(
            "snowdrop_batch_failed_items", "Requests that failed in a batch.", labels=OF_ENDPOINT
        )
        waited = CounterMetricFamily(
            "snowdrop_batch_wait_seconds", "Time that requests waited for their batch.", labels=OF_ENDPOINT
        )
        busy = CounterMetricFamily(
            "snowdrop_batch_busy_seconds", "Time in calls of batched endpoints.", labels=OF_ENDPOINT
        )
        for endpoint, counts in self._batches.items():
            below, buckets = 0, []
            for size in SIZES:
                below += counts.sizes.get(size, 0)
                buckets.append((size, below))
            sizes.add_metric(endpoint, [*buckets, ("+Inf", counts.batches)], counts.items)
            failed.add_metric(endpoint, counts.failed)
            waited.add_metric(endpoint, counts.waited_s)
            busy.add_metric(endpoint, counts.busy_s)
        yield sizes
        yield failed
        yield waited
        yield busy

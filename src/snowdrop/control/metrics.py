"""What control knows as metrics: replicas, load and decisions as they are now, starts as they happen.

Names and units follow https://prometheus.io/docs/practices/naming/. Labels are names that people gave, and states;
never ids, of which there is no end.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from snowdrop.control.rollout_metrics import RolloutsNow
from snowdrop.control.world import DeploymentKey, World
from snowdrop.domain.deployment import DeploymentHealth
from snowdrop.domain.ids import ReceiptId, TenantId
from snowdrop.domain.receipt import CallerTimes
from snowdrop.domain.replica import TERMINAL_STATES, ReplicaReport, ReplicaState
from snowdrop.domain.rollout import Rollout
from snowdrop.domain.usage import UsageTotal
from snowdrop.state.port import StateStore

START_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
OF_DEPLOYMENT = ("tenant", "deployment")
SERIES_MAX = 10_000
"""Sums of usage shown; deployments that are gone keep theirs."""
SERVED_MAX = 10_000
"""Receipts whose caller was counted and may be told again."""


class ControlMetrics:
    """Registers control's families; the loop says what happens, the world is read when somebody asks."""

    def __init__(self, registry: CollectorRegistry, world: World) -> None:
        self._starts = Counter(
            "snowdrop_replica_starts",
            "Replicas that became ready, or failed before they were.",
            (*OF_DEPLOYMENT, "outcome"),
            registry=registry,
        )
        self._phases = Histogram(
            "snowdrop_start_phase_seconds",
            "Time of a start by phase, as in receipts.",
            (*OF_DEPLOYMENT, "phase"),
            buckets=START_BUCKETS_S,
            registry=registry,
        )
        self._cold_starts = Histogram(
            "snowdrop_cold_start_seconds",
            "From a request that found nothing ready to its first byte, as its caller felt it.",
            buckets=START_BUCKETS_S,
            registry=registry,
        )
        self._content = Counter(
            "snowdrop_start_content_bytes",
            "Plaintext bytes that starts brought, by the tier that they came from.",
            (*OF_DEPLOYMENT, "tier"),
            registry=registry,
        )
        self._rollouts = Counter(
            "snowdrop_rollouts",
            "Rollouts that ended, by how: done, rolled-back, aborted, superseded.",
            (*OF_DEPLOYMENT, "outcome"),
            registry=registry,
        )
        self._served: dict[ReceiptId, None] = {}
        registry.register(_WorldNow(world))
        registry.register(RolloutsNow(world))

    def replica_changed(self, report: ReplicaReport, just_ready: bool) -> None:
        """To be called once for each new report of a replica."""
        labels = (report.key.tenant, report.key.deployment)
        was_ready = any(step.after is ReplicaState.READY for step in report.history)
        if just_ready:
            self._starts.labels(*labels, "ready").inc()
            for span in report.spans:
                if not span.parent:
                    self._phases.labels(*labels, span.name).observe(max(0, span.duration_ns) / 1e9)
            content = report.content
            for tier in ("ram", "disk", "peer", "origin"):
                if count := getattr(content, tier):
                    self._content.labels(*labels, tier).inc(count)
        elif report.state in TERMINAL_STATES and not was_ready:
            failed = report.state is ReplicaState.FAILED
            self._starts.labels(*labels, "failed" if failed else "cancelled").inc()

    def rollout_ended(self, key: DeploymentKey, ended: Rollout) -> None:
        """To be called once for each."""
        self._rollouts.labels(*key, ended.phase).inc()

    def caller_served(self, receipt: ReceiptId, caller: CallerTimes) -> None:
        """Somebody waited for a start; gateways say it until they hear that it is stored."""
        if receipt in self._served:
            return
        self._served[receipt] = None
        while len(self._served) > SERVED_MAX:
            del self._served[next(iter(self._served))]
        self._cold_starts.observe(max(0, caller.waited_ns) / 1e9)


class UsageMetrics(Collector):
    """The ledger's sums, read by `look` before each exposition."""

    def __init__(self, registry: CollectorRegistry, state: StateStore, world: World) -> None:
        self._state = state
        self._world = world
        self._totals: list[tuple[TenantId, UsageTotal]] = []
        registry.register(self)

    async def look(self) -> None:
        """Reads the sums of every tenant that has a deployment."""
        tenants = sorted({tenant for tenant, _ in self._world.deployments})
        totals = [(tenant, total) for tenant in tenants for total in await self._state.usage_totals(tenant)]
        self._totals = totals[:SERIES_MAX]

    def describe(self) -> list[Metric]:
        return []  # nothing is computed only to learn the names

    def collect(self) -> Iterator[Metric]:
        seconds = CounterMetricFamily(
            "snowdrop_usage_replica_seconds", "Metered time of replicas.", labels=OF_DEPLOYMENT
        )
        content = CounterMetricFamily(
            "snowdrop_usage_content_bytes", "Metered bytes of content by tier.", labels=(*OF_DEPLOYMENT, "tier")
        )
        for tenant, total in self._totals:
            if total.unit == "replica_ns":
                seconds.add_metric([tenant, total.deployment], total.quantity / 1e9)
            elif total.unit == "content_bytes":
                content.add_metric([tenant, total.deployment, total.detail], total.quantity)
        yield seconds
        yield content


class _WorldNow(Collector):
    """Gauges made from the world when they are asked for."""

    def __init__(self, world: World) -> None:
        self._world = world

    def describe(self) -> list[Metric]:
        return []  # nothing is computed only to learn the names

    def collect(self) -> Iterator[Metric]:
        world = self._world
        replicas = GaugeMetricFamily(
            "snowdrop_replicas", "Living replicas by state.", labels=(*OF_DEPLOYMENT, "state")
        )
        for (key, state), count in _by_state(world).items():
            replicas.add_metric([*key, state], count)
        yield replicas
        desired = GaugeMetricFamily(
            "snowdrop_replicas_desired", "Replicas that the autoscaler wants.", labels=OF_DEPLOYMENT
        )
        highest = GaugeMetricFamily(
            "snowdrop_replicas_max", "Most replicas that the deployment may have.", labels=OF_DEPLOYMENT
        )
        healthy = GaugeMetricFamily(
            "snowdrop_deployment_healthy", "0 while starts back off or have been given up.", labels=OF_DEPLOYMENT
        )
        for key, entry in world.deployments.items():
            desired.add_metric(key, entry.decision.desired if entry.decision is not None else 0)
            highest.add_metric(key, entry.scale.max)
            healthy.add_metric(key, float(entry.health is DeploymentHealth.OK))
        yield desired
        yield highest
        yield healthy
        yield from _nodes(world)


def _nodes(world: World) -> Iterator[Metric]:
    nodes = GaugeMetricFamily("snowdrop_nodes", "Nodes that are connected.")
    nodes.add_metric([], len(world.nodes))
    yield nodes
    free = GaugeMetricFamily(
        "snowdrop_node_memory_free_bytes", "Memory that no replica has been promised.", labels=("node",)
    )
    whole = GaugeMetricFamily(
        "snowdrop_node_memory_bytes", "Memory that replicas may be promised.", labels=("node",)
    )
    for view in world.node_views():
        free.add_metric([view.id], view.free_memory_bytes)
    for name, node in world.nodes.items():
        whole.add_metric([name], node.record.memory_bytes)
    yield free
    yield whole


def _by_state(world: World) -> dict[tuple[DeploymentKey, str], int]:
    """Every state of every deployment, so that a series falls to 0 and does not vanish."""
    living = [state for state in ReplicaState if state not in TERMINAL_STATES]
    counts = {(key, state.value): 0 for key in world.deployments for state in living}
    for entry in world.replicas.values():
        at = (entry.key, entry.state.value)
        counts[at] = counts.get(at, 0) + 1
    return counts

"""Tasks as metrics: what waits and runs now, attempts and ends as they happen, deliveries of webhooks."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from snowdrop.control.tasks.queue import TaskQueue
from snowdrop.control.world import World
from snowdrop.domain.task import Task, Webhook
from snowdrop.policy.tasks import OF_A_LEASE, Event

OF_DEPLOYMENT = ("tenant", "deployment")
TIME_BUCKETS_S = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3_600, 14_400, 86_400)


class TaskMetrics:
    """Registers the families; the queue says what happens."""

    def __init__(self, registry: CollectorRegistry, queue: TaskQueue, world: World) -> None:
        self._attempts = Counter(
            "snowdrop_task_attempts",
            "Attempts of tasks that ended, by how: succeeded, failed, handed back, lease lost.",
            (*OF_DEPLOYMENT, "outcome"),
            registry=registry,
        )
        self._ended = Counter(
            "snowdrop_tasks_ended",
            "Tasks that ended: succeeded, failed (the dead letter), cancelled.",
            (*OF_DEPLOYMENT, "state"),
            registry=registry,
        )
        self._times = Histogram(
            "snowdrop_task_seconds",
            "From a task's submission to its end.",
            OF_DEPLOYMENT,
            buckets=TIME_BUCKETS_S,
            registry=registry,
        )
        self._deliveries = Counter(
            "snowdrop_task_webhook_deliveries",
            "Deliveries of webhooks, by what the webhook is after it.",
            ("state",),
            registry=registry,
        )
        registry.register(_Now(queue, world))

    def changed(self, task: Task, event: Event) -> None:
        if event in OF_A_LEASE:
            self._attempts.labels(task.tenant, task.deployment, event).inc()
        if task.ended and (not task.history or task.history[-1].unix_ns == task.ended_unix_ns):
            self._ended.labels(task.tenant, task.deployment, task.state).inc()
            lasted_s = (task.ended_unix_ns - task.submitted_unix_ns) / 1e9
            self._times.labels(task.tenant, task.deployment).observe(lasted_s)

    def delivered(self, hook: Webhook) -> None:
        self._deliveries.labels(hook.state).inc()


class _Now(Collector):
    def __init__(self, queue: TaskQueue, world: World) -> None:
        self._queue = queue
        self._world = world

    def collect(self) -> Iterator[Metric]:
        due = GaugeMetricFamily("snowdrop_tasks_due", "Tasks that could run now and wait.", labels=OF_DEPLOYMENT)
        for key, count in self._world.tasks_due.items():
            due.add_metric(key, count)
        yield due
        leased = GaugeMetricFamily("snowdrop_tasks_leased", "Tasks that a gateway holds.", labels=OF_DEPLOYMENT)
        for key, count in self._queue.leases.counts().items():
            leased.add_metric(key, count)
        yield leased
        kept = "Bytes of requests and answers that are kept for tasks."
        yield GaugeMetricFamily("snowdrop_task_bodies_bytes", kept, value=self._queue.kept_bytes)

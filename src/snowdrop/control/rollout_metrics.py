"""Rollouts and the crash loop's breaker as gauges, made from the world when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from snowdrop.control import rollouts
from snowdrop.control.world import World
from snowdrop.domain.rollout import RolloutPhase

OF_DEPLOYMENT = ("tenant", "deployment")
RUNNING_PHASES = (RolloutPhase.STARTING, RolloutPhase.SHIFTING, RolloutPhase.PROVING)


class RolloutsNow(Collector):
    """Every deployment has every series, so that one falls to 0 and does not vanish."""

    def __init__(self, world: World) -> None:
        self._world = world

    def describe(self) -> list[Metric]:
        return []  # nothing is computed only to learn the names

    def collect(self) -> Iterator[Metric]:
        phase = GaugeMetricFamily(
            "snowdrop_rollout_phase", "1 for the phase of a rollout under way.", labels=(*OF_DEPLOYMENT, "phase")
        )
        weight = GaugeMetricFamily(
            "snowdrop_rollout_weight_ratio",
            "Part of the traffic that a new revision is meant to get.",
            labels=OF_DEPLOYMENT,
        )
        answers = GaugeMetricFamily(
            "snowdrop_rollout_answers",
            "Answers of a new revision in the rollout's present step.",
            labels=(*OF_DEPLOYMENT, "outcome"),
        )
        failures = GaugeMetricFamily(
            "snowdrop_deployment_start_failures",
            "Starts of the current revision that failed in a row.",
            labels=OF_DEPLOYMENT,
        )
        for key, entry in self._world.deployments.items():
            active = entry.deployment.rollout
            for each in RUNNING_PHASES:
                phase.add_metric([*key, each], float(active is not None and active.phase is each))
            weight.add_metric(key, active.weight if active is not None else 0.0)
            done = failed = 0
            if active is not None:
                new, _ = rollouts.samples(self._world, key, active)
                done, failed = new.done, new.failed
            answers.add_metric([*key, "ok"], done - failed)
            answers.add_metric([*key, "failed"], failed)
            failures.add_metric(key, entry.starts.failures)
        yield from (phase, weight, answers, failures)

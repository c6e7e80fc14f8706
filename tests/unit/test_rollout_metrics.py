"""Rollouts, the crash loop and the gateway's queues as metrics: as they are when somebody asks, ends once each."""

from __future__ import annotations

import msgspec
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from platform_helpers import KEY, NAME, deployment, replica_key, replica_route, report, revision, route
from snowdrop.control.loop import ControlLoop
from snowdrop.control.metrics import ControlMetrics
from snowdrop.control.recorder import Recorder
from snowdrop.domain.errors import ErrorBody
from snowdrop.domain.ids import DEFAULT_TENANT, RevisionId
from snowdrop.domain.replica import ReplicaState
from snowdrop.domain.rollout import Rollout, RolloutPhase, RolloutSpec, RolloutStep, Sample
from snowdrop.gateway.edge.gauges import QueueGauges
from snowdrop.gateway.effects import Now
from snowdrop.gateway.queue import QueueCore
from snowdrop.policy import rollout
from snowdrop.state.memory import MemoryState
from snowdrop.telemetry.metrics import exposition
from snowdrop.wire.control import DeploymentLoad, LoadReport, RevisionLoad
from snowdrop.wire.slots import Acquire

pytestmark = pytest.mark.anyio
NEW = RevisionId("rev-2")


def shown(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    """By name and label values, the latter sorted by label."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(exposition(registry).decode())
        for sample in family.samples
    }


async def test_a_rollout_is_shown_while_it_runs_and_its_end_is_counted_once() -> None:
    registry, state = CollectorRegistry(auto_describe=False), MemoryState()
    loop = ControlLoop(state, Recorder(), tick_s=0.5, clock=lambda: 1_000.0)
    loop.rollout_ended = ControlMetrics(registry, loop.world).rollout_ended
    await state.put_revision(revision())
    await state.put_revision(revision(NEW, created=2))
    spec = RolloutSpec(steps=(RolloutStep(weight=0.25, hold=True),))
    active = Rollout(
        candidate=NEW,
        stable=RevisionId("rev-1"),
        spec=spec,
        began_unix_ns=1,
        phase=RolloutPhase.SHIFTING,
        weight=0.25,
        before={"gw-0": Sample(done=100, failed=7)},
    )
    running = deployment(rollout=active)
    await state.put_deployment(running, expected_generation=0)
    await loop.load()
    loop.world.gateways["gw-0"] = {}
    load = DeploymentLoad(
        tenant=DEFAULT_TENANT,
        deployment=NAME,
        in_flight=0,
        queued=0,
        peak=0,
        arrived=0,
        refused=0,
        revisions=(RevisionLoad(revision=NEW, done=110, failed=9),),
    )
    loop.heard_load(LoadReport(gateway="gw-0", loads=(load,)))
    loop.heard_replica(report(replica_key("rep-1"), ReplicaState.LOADING, version=1))
    died = ErrorBody(kind="user_code", message="boom")
    loop.heard_replica(report(replica_key("rep-1"), ReplicaState.FAILED, version=2, error=died))
    now = shown(registry)
    assert now["snowdrop_rollout_phase", "embed", "shifting", "default"] == 1
    assert now["snowdrop_rollout_phase", "embed", "proving", "default"] == 0
    assert now["snowdrop_rollout_weight_ratio", "embed", "default"] == 0.25
    assert now["snowdrop_rollout_answers", "embed", "ok", "default"] == 8
    assert now["snowdrop_rollout_answers", "embed", "failed", "default"] == 2
    assert now["snowdrop_deployment_start_failures", "embed", "default"] == 1

    gone = rollout.ended(active, RolloutPhase.ABORTED, "by hand", 2)
    ended = msgspec.structs.replace(running, generation=2, rollout=None, rollouts=(gone,))
    for again in (ended, ended, msgspec.structs.replace(ended, generation=3)):
        await loop.set_deployment(again)
    now = shown(registry)
    assert now["snowdrop_rollouts_total", "embed", "aborted", "default"] == 1
    assert now["snowdrop_rollout_phase", "embed", "shifting", "default"] == 0
    assert now["snowdrop_rollout_weight_ratio", "embed", "default"] == 0


async def test_a_rollout_that_ends_by_itself_is_counted_too() -> None:
    registry, state = CollectorRegistry(auto_describe=False), MemoryState()
    loop = ControlLoop(state, Recorder(), tick_s=0.5, clock=lambda: 1_000.0)
    loop.rollout_ended = ControlMetrics(registry, loop.world).rollout_ended
    await state.put_revision(revision())
    await state.put_revision(revision(NEW, created=2))
    active = Rollout(candidate=NEW, stable=RevisionId("rev-1"), spec=RolloutSpec(failures_max=1), began_unix_ns=1)
    await state.put_deployment(deployment(rollout=active), expected_generation=0)
    await loop.load()
    key = replica_key("rep-2", revision=NEW)
    loop.heard_replica(report(key, ReplicaState.LOADING, version=1))
    loop.heard_replica(
        report(key, ReplicaState.FAILED, version=2, error=ErrorBody(kind="user_code", message="boom"))
    )
    await loop.look(KEY)
    await loop.look(KEY)
    assert shown(registry)["snowdrop_rollouts_total", "embed", "rolled-back", "default"] == 1


async def test_the_gateway_shows_what_waits_and_what_is_under_way() -> None:
    registry, core = CollectorRegistry(auto_describe=False), QueueCore(keys_required=False)
    registry.register(QueueGauges(core))
    core.set_routes([route(replica_route())], [], Now(1.0, 1))
    for ticket in range(5):
        core.arrive(
            "w",
            Acquire(ticket=ticket, key_sha256=None, deployment=NAME, request_id=f"r{ticket}", arrived_unix_ns=1),
            Now(1.0, 1),
        )
    now = shown(registry)
    assert now["snowdrop_requests_in_flight", "embed", "default"] == 2
    assert now["snowdrop_requests_queued", "embed", "default"] == 3
    for ticket in range(5):
        core.cancel("w", ticket, Now(2.0, 2))
    now = shown(registry)
    assert now["snowdrop_requests_in_flight", "embed", "default"] == 0
    assert now["snowdrop_requests_queued", "embed", "default"] == 0

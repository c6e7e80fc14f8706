"""What control and agents show as metrics: gauges as things are now, counters of what happened once."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import aiohttp
import msgspec
import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from platform_helpers import KEY, NODE, deployment, node_record, replica_key, report, revision
from snowdrop.agent.dataplane.client import DataPlane
from snowdrop.agent.metrics import add_metrics_route
from snowdrop.agent.replica_counts import BatchCounts, ReplicaSaid, ReplicaSums
from snowdrop.control.loop import ControlLoop
from snowdrop.control.metrics import ControlMetrics, UsageMetrics
from snowdrop.control.recorder import Recorder
from snowdrop.control.world import NodeEntry
from snowdrop.domain.errors import PlatformDownError
from snowdrop.domain.ids import ReceiptId, ReplicaId, RevisionId
from snowdrop.domain.receipt import CallerTimes, ContentBytes, Span
from snowdrop.domain.replica import ReplicaKey, ReplicaReport, ReplicaState, Transition
from snowdrop.domain.service import Scale
from snowdrop.domain.usage import UsageRecord
from snowdrop.state.memory import MemoryState
from snowdrop.telemetry.metrics import exposition
from snowdrop.wire.http import serving_unix
from snowdrop.wire.upkeep import NodeStats, StatsTold

pytestmark = pytest.mark.anyio
SECOND = 1_000_000_000


def samples(text: bytes | str) -> dict[tuple[str, ...], float]:
    """By name and label values, the latter sorted by label."""
    shown = text.decode() if isinstance(text, bytes) else text
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(shown)
        for sample in family.samples
    }


class Bench:
    """A control loop with one deployment, and its metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self.state = MemoryState()
        self.loop = ControlLoop(self.state, Recorder(), tick_s=0.5, clock=lambda: 1_000.0)
        self.metrics = ControlMetrics(self.registry, self.loop.world)
        self.loop.replica_changed = self.metrics.replica_changed
        self.version = 0

    async def start(self) -> None:
        await self.state.put_revision(revision(scale=Scale(max=4)))
        await self.state.put_deployment(deployment(), expected_generation=0)
        self.loop.world.nodes[NODE] = NodeEntry(node_record(), "inc-1", "/agent.sock")
        await self.loop.load()

    def hear(self, replica: str, state: ReplicaState, **more: object) -> None:
        self.version += 1
        self.loop.heard_replica(report(replica_key(replica), state, version=self.version, **more))

    def shown(self) -> dict[tuple[str, ...], float]:
        return samples(exposition(self.registry))


@pytest.fixture
async def bench() -> Bench:
    made = Bench()
    await made.start()
    return made


async def test_replicas_are_shown_by_state_and_fall_back_to_zero(bench: Bench) -> None:
    at = ("snowdrop_replicas", KEY[1], "loading", KEY[0])
    assert bench.shown()[at] == 0
    bench.hear("rep-1", ReplicaState.LOADING)
    assert bench.shown()[at] == 1
    bench.hear("rep-1", ReplicaState.FAILED)
    assert bench.shown()[at] == 0
    assert bench.shown()["snowdrop_replicas_max", KEY[1], KEY[0]] == 4
    assert bench.shown()["snowdrop_nodes",] == 1


async def test_a_start_is_counted_once_with_its_phases_and_bytes(bench: Bench) -> None:
    spans = (
        Span(name="mount", start_unix_ns=0, end_unix_ns=2 * SECOND),
        Span(name="weights", start_unix_ns=0, end_unix_ns=SECOND, parent="mount"),
    )
    bench.hear("rep-1", ReplicaState.LOADING)
    for _ in range(3):  # told again in hellos
        bench.hear("rep-1", ReplicaState.READY, spans=spans, content=ContentBytes(disk=7, origin=5))
    shown = bench.shown()
    assert shown["snowdrop_replica_starts_total", KEY[1], "ready", KEY[0]] == 1
    assert shown["snowdrop_start_phase_seconds_sum", KEY[1], "mount", KEY[0]] == 2.0
    assert ("snowdrop_start_phase_seconds_sum", KEY[1], "weights", KEY[0]) not in shown
    assert shown["snowdrop_start_content_bytes_total", KEY[1], KEY[0], "origin"] == 5


async def test_a_replica_that_fails_before_ready_is_a_failed_start_and_later_it_is_not(bench: Bench) -> None:
    bench.hear("rep-1", ReplicaState.LOADING)
    bench.hear("rep-1", ReplicaState.FAILED)
    was_ready = (Transition(unix_ns=1, before=ReplicaState.LOADING, after=ReplicaState.READY, reason=""),)
    bench.hear("rep-2", ReplicaState.LOADING)
    bench.hear("rep-2", ReplicaState.READY, history=was_ready)
    bench.hear("rep-2", ReplicaState.FAILED, history=was_ready)
    shown = bench.shown()
    assert shown["snowdrop_replica_starts_total", KEY[1], "failed", KEY[0]] == 1
    assert shown["snowdrop_replica_starts_total", KEY[1], "ready", KEY[0]] == 1


async def test_a_callers_wait_is_counted_once_however_often_it_is_told(bench: Bench) -> None:
    caller = CallerTimes(
        request_id="r", arrived_unix_ns=SECOND, admitted_unix_ns=2 * SECOND, first_byte_unix_ns=4 * SECOND
    )
    for _ in range(2):
        bench.metrics.caller_served(ReceiptId("rcp-1"), caller)
    assert bench.shown()["snowdrop_cold_start_seconds_count",] == 1
    assert bench.shown()["snowdrop_cold_start_seconds_sum",] == 3.0


async def test_usage_is_the_ledgers_own_sum(bench: Bench) -> None:
    usage = UsageMetrics(bench.registry, bench.state, bench.loop.world)
    record = UsageRecord(
        node=NODE,
        source="jrn-1",
        sequence=1,
        tenant=KEY[0],
        deployment=KEY[1],
        revision=RevisionId("rev-1"),
        replica=ReplicaId("rep-1"),
        unit="replica_ns",
        quantity=3 * SECOND,
        from_unix_ns=0,
        to_unix_ns=3 * SECOND,
    )
    more = {"sequence": 2, "unit": "content_bytes", "quantity": 7, "detail": "disk"}
    await bench.state.append_usage((record, msgspec.structs.replace(record, **more)))
    await usage.look()
    assert bench.shown()["snowdrop_usage_replica_seconds_total", KEY[1], KEY[0]] == 3.0
    assert bench.shown()["snowdrop_usage_content_bytes_total", KEY[1], KEY[0], "disk"] == 7


class _Plane:
    async def ask(self, _make: object, _answer: object) -> StatsTold:
        stats = NodeStats(
            ram_bytes=1,
            ram_bytes_max=2,
            areas=1,
            pool_idle_bytes=3,
            disk_bytes=4,
            disk_bytes_max=5,
            artefacts=6,
            pinned=1,
            served_bytes={"origin": 9},
            quarantined=2,
            replaced=1,
            events=(),
            scrubbed_oldest_unix_s=0.0,
            scrubbed_never=0,
        )
        return StatsTold(request=1, stats=stats)


async def _plane() -> DataPlane:
    return cast("DataPlane", _Plane())


async def _no_plane() -> DataPlane:
    raise PlatformDownError("the data plane is being started", where="node")


async def _scrape(folder: Path, app: web.Application) -> dict[tuple[str, ...], float]:
    path = folder / "a.sock"
    async with (
        serving_unix(app, path),
        aiohttp.ClientSession("http://agent", connector=aiohttp.UnixConnector(str(path))) as session,
        session.get("/metrics") as answer,
    ):
        assert answer.status == 200
        return samples(await answer.text())


async def test_a_node_shows_its_store_and_what_its_replicas_count(tmp_path: Path) -> None:
    async def stats(_request: web.Request) -> web.Response:
        return web.json_response(
            {"concurrency": 4, "in_flight": 2, "in_flight_peak": 4, "waiting": 1, "served": 5}
        )

    replica = web.Application()
    replica.router.add_get("/-/stats", stats)
    reports: tuple[ReplicaReport, ...] = tuple(
        report(replica_key(name), ReplicaState.READY, version=1, socket_path=str(tmp_path / f"{name}.sock"))
        for name in ("rep-1", "rep-dead")
    )
    app = web.Application()
    add_metrics_route(app, "node-0", _plane, lambda: reports)
    async with serving_unix(replica, tmp_path / "rep-1.sock"):
        shown = await _scrape(tmp_path, app)
    assert shown["snowdrop_store_served_bytes_total", "node-0", "origin"] == 9
    assert shown["snowdrop_store_chunks_quarantined_total", "node-0"] == 2
    assert shown["snowdrop_replica_in_flight", KEY[1], KEY[0]] == 2
    assert shown["process_open_fds",] > 0


def test_sums_over_replicas_never_fall_when_one_ends_or_says_nothing() -> None:
    sums = ReplicaSums()
    registry = CollectorRegistry(auto_describe=False)
    registry.register(sums)  # type: ignore[arg-type] -- it has what the registry asks for

    def said(replica: str, batches: int, items: int) -> tuple[ReplicaKey, ReplicaSaid]:
        counts = BatchCounts(batches=batches, items=items, sizes={"2": batches}, busy_s=batches / 2)
        return replica_key(replica), ReplicaSaid(in_flight=1, batches={"/embed": counts})

    def shown() -> tuple[float, float, float]:
        now = samples(exposition(registry))
        at = (KEY[1], "/embed", KEY[0])
        return (
            now["snowdrop_batch_size_count", *at],
            now["snowdrop_batch_size_sum", *at],
            now["snowdrop_batch_size_bucket", KEY[1], "/embed", "2", KEY[0]],
        )

    sums.replace([said("rep-1", 10, 20), said("rep-2", 1, 2)], {"rep-1", "rep-2"})
    assert shown() == (11, 22, 11)
    sums.replace([said("rep-2", 2, 4)], {"rep-1", "rep-2"})  # rep-1 was too busy to answer
    sums.replace([said("rep-1", 12, 24), said("rep-2", 2, 4)], {"rep-1", "rep-2"})
    assert shown() == (14, 28, 14)
    sums.replace([said("rep-3", 5, 5)], {"rep-3"})
    assert shown() == (19, 33, 19)


async def test_a_data_plane_that_is_away_leaves_its_figures_out(tmp_path: Path) -> None:
    app = web.Application()
    add_metrics_route(app, "node-0", _no_plane, tuple)
    shown = await _scrape(tmp_path, app)
    assert not [name for name, *_ in shown if name.startswith("snowdrop_store")]
    assert shown["process_open_fds",] > 0

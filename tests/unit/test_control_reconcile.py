"""Control's loop over a memory state: what is ordered, published and recorded, with no socket and no clock."""

import anyio
import pytest

from platform_helpers import KEY, NAME, NODE, deployment, load, node_record, replica_key, report, revision
from snowdrop.control.loop import LOST_REASON, ControlLoop
from snowdrop.control.reconcile import Order, iterate, next_look_s
from snowdrop.control.recorder import Recorder
from snowdrop.control.world import NodeEntry
from snowdrop.domain.deployment import DeploymentHealth
from snowdrop.domain.errors import ErrorBody, StorageFullError
from snowdrop.domain.ids import DEFAULT_TENANT, NodeId, ReplicaId, receipt_id_of
from snowdrop.domain.replica import ReplicaState
from snowdrop.domain.service import ResourceSpec, Scale
from snowdrop.policy.restart import FAILURES_MAX, PROBE_S_FIRST
from snowdrop.state.memory import MemoryState
from snowdrop.wire.codec import Message
from snowdrop.wire.control import DeploymentRoute, DrainReplica, LoadReport, RouteChanged, StartReplica

pytestmark = pytest.mark.anyio
GATEWAY = "gw-0"
SCALE = Scale(max=4, idle_s=10.0, target=1.0, stable_window_s=10.0, panic_window_s=1.0)


class Bench:
    """A loop with one node, one gateway, and a deployment of revision rev-1."""

    def __init__(self) -> None:
        self.now_s = 1_000.0
        self.state = MemoryState()
        self.loop = ControlLoop(self.state, Recorder(), tick_s=0.5, clock=lambda: self.now_s)
        self.world = self.loop.world
        self.sent: list[tuple[NodeId, Message]] = []
        self.published: list[Message] = []
        self.loop.send_agent = lambda node, message: self.sent.append((node, message))
        self.loop.send_gateways = self.published.append
        self.versions = 10

    async def start(self, *, scale: Scale = SCALE, **spec: object) -> None:
        await self.state.put_revision(revision(scale=scale, concurrency=2, **spec))
        await self.state.put_deployment(deployment(), expected_generation=0)
        self.world.nodes[NODE] = NodeEntry(node_record(), "inc-1", "/agent.sock")
        self.world.gateways[GATEWAY] = {}
        await self.loop.load()

    def demand(self, in_flight: int = 0, queued: int = 0) -> None:
        self.loop.heard_load(LoadReport(gateway=GATEWAY, loads=(load(in_flight, queued),)))

    def iterate(self, *, after_s: float = 0.0) -> list[Message]:
        self.now_s += after_s
        orders = iterate(self.world, KEY, now_s=self.now_s, now_unix_ns=int(self.now_s * 1e9))
        assert all(isinstance(order, Order) for order in orders)
        return [order.message for order in orders]

    def starts(self, **more: float) -> list[ReplicaId]:
        return [m.key.replica for m in self.iterate(**more) if isinstance(m, StartReplica)]

    def hear(self, replica: str, state: ReplicaState, *, rev: str = "rev-1", **more: object) -> None:
        self.versions += 1
        key = replica_key(replica, revision=rev)
        self.loop.heard_replica(report(key, state, version=self.versions, **more))

    def up(self, count: int) -> list[ReplicaId]:
        """That many ready replicas, started by load."""
        self.demand(queued=2 * count)
        names = self.starts()
        assert len(names) == count
        for name in names:
            self.hear(name, ReplicaState.READY)
        return names

    def route(self) -> DeploymentRoute:
        changed = self.published[-1]
        assert isinstance(changed, RouteChanged)
        assert changed.route is not None
        return changed.route


@pytest.fixture
async def bench() -> Bench:
    made = Bench()
    await made.start()
    return made


async def test_nothing_is_started_without_load(bench: Bench) -> None:
    assert bench.iterate() == []
    assert bench.iterate(after_s=100) == []


async def test_a_request_that_came_and_went_between_two_looks_counts_as_use(bench: Bench) -> None:
    """Its peak rides on one report; the next must not wipe it out, or a service in use goes as idle."""
    bench.up(1)
    bench.demand()
    bench.iterate(after_s=SCALE.idle_s - 1.0)
    used = load(peak=1)
    bench.loop.heard_load(LoadReport(gateway=GATEWAY, loads=(used,)))
    bench.demand()
    bench.iterate()
    assert not [m for m in bench.iterate(after_s=SCALE.idle_s - 1.0) if isinstance(m, DrainReplica)]
    decision = bench.world.deployments[KEY].decision
    assert decision is not None
    assert decision.desired == 1


async def test_one_request_starts_one_and_no_second(bench: Bench) -> None:
    bench.demand(queued=1)
    (name,) = bench.starts()
    assert bench.iterate(after_s=0.5) == []
    bench.hear(name, ReplicaState.LOADING)
    assert bench.iterate(after_s=0.5) == []
    bench.hear(name, ReplicaState.READY)
    assert [r.replica for r in bench.route().replicas if r.accepting] == [name]


async def test_a_burst_starts_what_it_needs_up_to_max(bench: Bench) -> None:
    bench.demand(queued=100)
    assert len(bench.starts()) == 4
    assert bench.iterate(after_s=1.0) == []


async def test_memory_bounds_what_is_started_and_ps_says_so() -> None:
    bench = Bench()
    await bench.start(resources=ResourceSpec(memory_bytes_max=30 << 30))
    bench.demand(queued=100)
    assert len(bench.starts()) == 2
    assert "MiB free" in bench.world.deployments[KEY].placement_reason


async def test_a_drain_is_ordered_only_after_every_gateway_is_done(bench: Bench) -> None:
    (name,) = bench.up(1)
    bench.world.gateways["gw-1"] = {}
    bench.demand()
    bench.iterate()
    assert bench.iterate(after_s=30.0) == [], "idle, but the gateways have not said so"
    bench.loop.publish(KEY)
    assert [r.accepting for r in bench.route().replicas] == [False]
    bench.loop.heard_idle(GATEWAY, name)
    assert bench.iterate() == []
    bench.loop.heard_idle("gw-1", name)
    (order,) = bench.iterate()
    assert isinstance(order, DrainReplica)
    assert order.replica == name
    assert "idle" in order.reason
    assert bench.iterate() == [], "ordered twice"


async def test_a_gateway_that_goes_away_is_not_waited_for(bench: Bench) -> None:
    (name,) = bench.up(1)
    bench.world.gateways["gw-1"] = {}
    bench.demand()
    bench.iterate()
    bench.iterate(after_s=30.0)
    bench.loop.heard_idle(GATEWAY, name)
    bench.loop.gateway_gone("gw-1")
    assert [type(m) for m in bench.iterate()] == [DrainReplica]


async def crash_loop(bench: Bench) -> None:
    """Start after start fails, until the revision is crash-looping."""
    bench.demand(queued=1)
    error = ErrorBody(kind="user_code", message="No module named 'x'", where="import")
    for attempt in range(FAILURES_MAX):
        (name,) = bench.starts(after_s=10.0)
        bench.hear(name, ReplicaState.FAILED, error=error)
        assert bench.iterate() == [], "no back-off"
        looping = attempt == FAILURES_MAX - 1
        health = DeploymentHealth.CRASH_LOOPING if looping else DeploymentHealth.BACKING_OFF
        entry = bench.world.deployments[KEY]
        assert entry.health is health
        assert next_look_s(entry, bench.now_s, bench.now_s) is not None
    bench.loop.publish(KEY)


async def test_a_crash_loop_parks_requests_and_tries_one_start_after_a_pause(bench: Bench) -> None:
    await crash_loop(bench)
    parked = bench.route().parked
    assert parked is not None
    assert bench.route().refusal is None
    assert parked.error.kind == "revision_failed"
    assert "No module named 'x' [import]" in parked.error.message
    assert parked.next_try_unix_ns == int((bench.now_s + PROBE_S_FIRST) * 1e9)
    bench.demand(queued=40)
    assert bench.iterate(after_s=PROBE_S_FIRST - 1) == [], "spends during the pause"
    (probe,) = bench.starts(after_s=1.0)
    assert bench.iterate(after_s=1.0) == [], "more than one try"
    bench.hear(probe, ReplicaState.FAILED)
    assert bench.iterate(after_s=PROBE_S_FIRST + 1) == [], "the pause does not grow"
    (probe,) = bench.starts(after_s=PROBE_S_FIRST)
    bench.hear(probe, ReplicaState.READY)
    bench.iterate()
    bench.loop.publish(KEY)
    assert bench.route().parked is None, "one that serves"


async def test_nobody_who_waits_means_no_try(bench: Bench) -> None:
    await crash_loop(bench)
    bench.demand()
    bench.iterate()
    assert bench.iterate(after_s=1e5) == []


async def test_a_deploy_or_scale_ends_the_pause_at_once(bench: Bench) -> None:
    await crash_loop(bench)
    await bench.loop.set_deployment(deployment(generation=2, scale=SCALE))
    assert len(bench.starts()) == 1
    bench.loop.publish(KEY)
    assert bench.route().parked is None


async def test_a_service_may_have_requests_refused_at_once() -> None:
    bench = Bench()
    await bench.start(park_s_max=0.0)
    await crash_loop(bench)
    refusal = bench.route().refusal
    assert refusal is not None
    assert refusal.kind == "revision_failed"
    bench.demand()
    assert bench.iterate() == []
    bench.iterate(after_s=PROBE_S_FIRST)
    bench.loop.publish(KEY)
    assert bench.route().refusal is None, "the pause is over: the next one tells"
    bench.demand(queued=1)
    (probe,) = bench.starts()
    bench.hear(probe, ReplicaState.FAILED)
    bench.iterate()
    bench.loop.publish(KEY)
    assert bench.route().refusal is not None


async def test_a_ready_replica_serves_on_while_others_crash_loop(bench: Bench) -> None:
    bench.up(1)
    bench.demand(in_flight=2, queued=20)
    for number in range(FAILURES_MAX):
        bench.hear(f"rep-bad-{number}", ReplicaState.LOADING)
        bench.hear(f"rep-bad-{number}", ReplicaState.FAILED)
    bench.iterate()
    assert bench.world.deployments[KEY].health is DeploymentHealth.CRASH_LOOPING
    bench.loop.publish(KEY)
    assert bench.route().refusal is None


async def test_a_repeated_or_old_report_is_not_a_second_failure(bench: Bench) -> None:
    bench.demand(queued=1)
    (name,) = bench.starts()
    failed = report(name, ReplicaState.FAILED, version=7)
    for late in (failed, failed, report(name, ReplicaState.FAILED, version=8)):
        bench.loop.heard_replica(late)
    assert bench.world.deployments[KEY].starts.failures == 1
    assert not bench.world.replicas


async def test_replicas_of_an_earlier_life_are_adopted(bench: Bench) -> None:
    bench.hear("rep-old", ReplicaState.READY)
    bench.demand(in_flight=1)
    assert bench.iterate() == []
    assert [r.replica for r in bench.route().replicas] == ["rep-old"]


async def test_replicas_without_a_deployment_are_drained(bench: Bench) -> None:
    await bench.state.delete_deployment(*KEY, expected_generation=1)
    del bench.world.deployments[KEY]
    bench.hear("rep-orphan", ReplicaState.READY)
    await run_briefly(bench, lambda: bool(bench.sent))
    ((node, order),) = bench.sent
    assert node == NODE
    assert isinstance(order, DrainReplica)
    assert order.replica == "rep-orphan"


async def test_a_lost_node_takes_its_replicas_with_it_and_they_are_started_anew(bench: Bench) -> None:
    first = bench.up(2)
    bench.loop.node_gone(NODE, living=first[:1])
    assert list(bench.world.replicas) == first[:1]
    entry = bench.world.deployments[KEY]
    assert entry.starts.failures == 0, "a lost node says nothing about the revision"
    assert len(bench.starts()) == 1
    await flushed(bench)
    ended = await bench.state.list_replicas(DEFAULT_TENANT, NAME, ended=True, limit=9)
    lost = next(r for r in ended if r.key.replica == first[1])
    assert (lost.state, lost.reason) == (ReplicaState.FAILED, LOST_REASON)
    assert lost.error is not None


async def test_a_new_revision_rolls_out_behind_the_old_one(bench: Bench) -> None:
    (old,) = bench.up(1)
    await bench.state.put_revision(revision("rev-2", scale=SCALE, concurrency=2))
    await bench.loop.set_deployment(deployment(revision="rev-2", generation=2))
    bench.demand(in_flight=1)
    (new,) = bench.starts()
    assert bench.world.replicas[old].draining == ""
    bench.hear(new, ReplicaState.READY, rev="rev-2")
    bench.iterate()
    assert bench.world.replicas[old].draining == "a newer revision is ready"
    bench.loop.publish(KEY)
    assert {r.replica: r.accepting for r in bench.route().replicas} == {old: False, new: True}


async def test_a_deleted_deployment_goes_when_its_replicas_are_gone(bench: Bench) -> None:
    (name,) = bench.up(1)
    changed = deployment(generation=2, deleting=True)
    await bench.state.put_deployment(changed, expected_generation=1)
    await bench.loop.set_deployment(changed)
    await bench.loop.look(KEY)
    refusal = bench.route().refusal
    assert refusal is not None
    assert "being deleted" in refusal.message
    assert await bench.state.get_deployment(*KEY) is not None
    bench.loop.heard_idle(GATEWAY, name)
    await bench.loop.look(KEY)
    assert [type(m) for _, m in bench.sent] == [DrainReplica]
    bench.hear(name, ReplicaState.STOPPED)
    await bench.loop.look(KEY)
    assert await bench.state.get_deployment(*KEY) is None
    assert KEY not in bench.world.deployments
    gone = bench.published[-1]
    assert isinstance(gone, RouteChanged)
    assert gone.route is None


async def test_every_start_leaves_a_receipt_and_a_replica_record(bench: Bench) -> None:
    (name,) = bench.up(1)
    bench.demand(queued=8)
    failed = bench.starts()[0]
    bench.hear(failed, ReplicaState.FAILED, reason="startup raised", ended_unix_ns=99)
    await flushed(bench)
    good = await bench.state.get_receipt(DEFAULT_TENANT, receipt_id_of(name))
    bad = await bench.state.get_receipt(DEFAULT_TENANT, receipt_id_of(failed))
    assert good is not None
    assert bad is not None
    assert (good.outcome, bad.outcome) == ("ready", "failed: startup raised")
    assert good.started_unix_ns == int(bench.now_s * 1e9), "counts from the order"
    living = await bench.state.list_replicas(None, None, ended=False, limit=9)
    assert [r.key.replica for r in living] == [name]


async def test_the_recorder_waits_for_space_and_keeps_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snowdrop.control.recorder.RETRY_S", 0.0)
    recorder, written, refusals = Recorder(), [], [1, 1]

    async def first() -> None:
        if refusals:
            refusals.pop()
            raise StorageFullError("full")
        written.append("first")

    async def second() -> None:
        written.append("second")

    recorder.add("first", first)
    recorder.add("second", second)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(recorder.run)
        await recorder.flush(10.0)
        tasks.cancel_scope.cancel()
    assert written == ["first", "second"]


async def test_one_failing_deployment_does_not_stop_the_loop(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[object] = []

    async def full(*key: object, expected_generation: int) -> bool:
        tries.append(key)
        raise StorageFullError("full")

    monkeypatch.setattr(bench.state, "delete_deployment", full)
    monkeypatch.setattr(bench.loop, "_tick_s", 0.001)
    await bench.loop.set_deployment(deployment(generation=2, deleting=True))
    await run_briefly(bench, lambda: len(tries) >= 2)
    assert KEY in bench.world.deployments


async def run_briefly(bench: Bench, condition: object) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.loop.run)
        with anyio.fail_after(10):
            while not condition():  # type: ignore[operator]
                await anyio.sleep(0)
        tasks.cancel_scope.cancel()


async def flushed(bench: Bench) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.loop.recorder.run)
        await bench.loop.recorder.flush(10.0)
        tasks.cancel_scope.cancel()

"""Rollouts in control's loop: what is stored, started, drained and published, and that a restart goes on."""

import time

import msgspec
import pytest

from platform_helpers import KEY, NAME, NODE, deployment, node_record, receipt, replica_key, report, revision
from snowdrop.control.loop import ControlLoop
from snowdrop.control.recorder import Recorder
from snowdrop.control.world import NodeEntry
from snowdrop.domain.deployment import Deployment
from snowdrop.domain.errors import ErrorBody
from snowdrop.domain.ids import DEFAULT_TENANT, ReplicaId, RevisionId
from snowdrop.domain.replica import ReplicaState
from snowdrop.domain.rollout import Rollout, RolloutPhase, RolloutSpec, RolloutStep
from snowdrop.domain.scale import ScaleBounds
from snowdrop.domain.service import Scale
from snowdrop.policy import restart
from snowdrop.state.memory import MemoryState
from snowdrop.wire.codec import Message
from snowdrop.wire.control import (
    DeploymentLoad,
    DeploymentRoute,
    DrainReplica,
    LoadReport,
    RevisionLoad,
    RouteChanged,
    StartReplica,
)

pytestmark = pytest.mark.anyio
OLD, NEW = RevisionId("rev-1"), RevisionId("rev-2")
SCALE = Scale(min=2, max=2, target=1.0)


class Bench:
    """Two ready replicas of rev-1 under constant load, and a rollout of rev-2."""

    def __init__(self, state: MemoryState | None = None) -> None:
        self.now_s = 1_000.0
        self.state = state or MemoryState()
        self.sent: list[Message] = []
        self.published: list[Message] = []
        self.versions = 10
        self.live()

    def live(self) -> None:
        """A (new) life of control."""
        self.loop = ControlLoop(self.state, Recorder(), tick_s=0.5, clock=lambda: self.now_s)
        self.world = self.loop.world
        self.loop.send_agent = lambda _node, message: self.sent.append(message)
        self.loop.send_gateways = self.published.append
        self.world.nodes[NODE] = NodeEntry(node_record(), "inc-1", "/agent.sock")
        self.world.gateways["gw-0"] = {}
        self.loop.heard_load(LoadReport(gateway="gw-0", loads=()))

    async def start(self, **spec: object) -> None:
        await self.state.put_revision(revision(OLD, scale=SCALE))
        await self.state.put_revision(revision(NEW, scale=SCALE, created=2))
        await self.state.put_deployment(deployment(), expected_generation=0)
        await self.loop.load()
        await self.look()
        for name in self.started(OLD):
            self.hear(name, ReplicaState.READY, OLD)
        wanted = RolloutSpec(**spec)  # type: ignore[arg-type]
        await self.put(rollout=Rollout(candidate=NEW, stable=OLD, spec=wanted, began_unix_ns=time.time_ns()))

    async def put(self, **changes: object) -> None:
        stored = await self.stored()
        changed = msgspec.structs.replace(stored, generation=stored.generation + 1, **changes)
        await self.state.put_deployment(changed, expected_generation=stored.generation)
        await self.loop.set_deployment(changed)

    async def stored(self) -> Deployment:
        found = await self.state.get_deployment(*KEY)
        assert found is not None
        return found

    async def look(self, times: int = 1) -> None:
        for _ in range(times):
            await self.loop.look(KEY)

    def started(self, rev: RevisionId) -> list[ReplicaId]:
        """Starts ordered since the last question, of that revision."""
        found = [m.key.replica for m in self.sent if isinstance(m, StartReplica) and m.key.revision == rev]
        self.sent = [m for m in self.sent if not (isinstance(m, StartReplica) and m.key.revision == rev)]
        return found

    def hear(self, replica: str, state: ReplicaState, rev: RevisionId, **more: object) -> None:
        self.versions += 1
        key = replica_key(replica, revision=rev)
        self.loop.heard_replica(report(key, state, version=self.versions, **more))

    async def ready(self, count: int) -> list[ReplicaId]:
        """The new revision's replicas that were ordered come up."""
        await self.look()
        names = self.started(NEW)
        assert len(names) == count
        for name in names:
            self.hear(name, ReplicaState.READY, NEW)
        await self.look(2)
        return names

    def answers(self, new: int, failed: int = 0) -> None:
        load = DeploymentLoad(
            tenant=DEFAULT_TENANT,
            deployment=NAME,
            in_flight=2,
            queued=0,
            peak=2,
            arrived=0,
            refused=0,
            revisions=(RevisionLoad(revision=OLD, done=500), RevisionLoad(revision=NEW, done=new, failed=failed)),
        )
        self.loop.heard_load(LoadReport(gateway="gw-0", loads=(load,)))

    def route(self) -> DeploymentRoute:
        changed = self.published[-1]
        assert isinstance(changed, RouteChanged)
        assert changed.route is not None
        return changed.route

    def weights(self) -> dict[str, float]:
        return {each.revision: each.weight for each in self.route().weights}

    def draining(self, rev: RevisionId) -> list[str]:
        return [r.draining for _, r in self.world.replicas_of(KEY) if r.revision == rev and r.draining]


async def test_all_at_once_shifts_when_all_are_ready_and_then_drains_the_old() -> None:
    bench = Bench()
    await bench.start(prove_s=0.0)
    await bench.look()
    assert bench.weights() == {OLD: 1.0, NEW: 0.0}
    await bench.ready(1)
    assert bench.draining(OLD) == [], "before there are as many new ones"
    assert (await bench.stored()).revision == OLD
    await bench.ready(1)
    assert bench.draining(OLD) == ["a newer revision is ready"] * 2
    ended = await bench.stored()
    assert (ended.revision, ended.rollout) == (NEW, None)
    assert ended.rollouts[0].phase is RolloutPhase.DONE
    assert bench.weights() == {}
    assert not [m for m in bench.sent if isinstance(m, DrainReplica)], "before gateways are done with them"


async def test_a_new_revision_that_does_not_start_harms_nobody() -> None:
    bench = Bench()
    await bench.start()
    for attempt in range(2):
        await bench.look()
        (name,) = bench.started(NEW)
        error = ErrorBody(kind="user_code", message="boom", where="startup")
        bench.hear(name, ReplicaState.FAILED, NEW, error=error)
        await bench.look()
        assert bench.started(NEW) == [], "no back-off"
        bench.now_s += 10.0 * (attempt + 1)
    await bench.look(2)
    ended = await bench.stored()
    assert (ended.revision, ended.rollout) == (OLD, None)
    assert ended.rollouts[0].phase is RolloutPhase.ROLLED_BACK
    assert "boom [startup]" in ended.rollouts[0].reason
    assert bench.draining(OLD) == []
    assert bench.world.deployments[KEY].health == "ok"
    assert sum(1 for each in bench.route().replicas if each.accepting) == 2


async def test_errors_in_a_canary_send_it_back_and_drain_it() -> None:
    bench = Bench()
    await bench.start(steps=(RolloutStep(weight=0.25, s=3_600.0),))
    await bench.ready(1)
    assert bench.weights() == {OLD: 0.75, NEW: 0.25}
    bench.answers(10, 1)
    await bench.look()
    bench.answers(40, 20)
    await bench.look()
    ended = await bench.stored()
    assert ended.revision == OLD
    assert ended.rollouts[0].reason.startswith("20 of 40 answers of the new revision failed")
    (reason,) = bench.draining(NEW)
    assert reason.startswith("rolled-back: 20 of 40")
    assert bench.draining(OLD) == []
    assert bench.weights() == {}


async def test_a_restart_of_control_goes_on_where_it_was() -> None:
    bench = Bench()
    await bench.start(steps=(RolloutStep(weight=0.25, s=3_600.0), RolloutStep(weight=0.5, s=3_600.0)))
    (name,) = await bench.ready(1)
    old = [replica for replica, entry in bench.world.replicas.items() if entry.revision == OLD]
    before = await bench.stored()
    bench.live()
    await bench.loop.load()
    for replica in old:
        bench.hear(replica, ReplicaState.READY, OLD)
    bench.hear(name, ReplicaState.READY, NEW)
    await bench.look(3)
    assert await bench.stored() == before
    assert bench.weights() == {OLD: 0.75, NEW: 0.25}
    assert bench.sent == [], "nothing is started or drained by it"


async def test_a_steps_answers_count_over_a_restart_of_control_and_those_of_before_do_not() -> None:
    bench = Bench()
    await bench.start(
        steps=(RolloutStep(weight=0.25, s=0.0, requests_min=10), RolloutStep(weight=0.5, s=0.0, requests_min=30))
    )
    (name,) = await bench.ready(1)
    old = [replica for replica, entry in bench.world.replicas.items() if entry.revision == OLD]
    bench.answers(15)
    await bench.look()
    stored = (await bench.stored()).rollout
    assert stored is not None
    assert (stored.step, stored.before["gw-0"].done) == (1, 15)
    bench.answers(25)
    await bench.look()

    bench.live()
    await bench.loop.load()
    bench.world.told.clear()
    for replica in old:
        bench.hear(replica, ReplicaState.READY, OLD)
    bench.hear(name, ReplicaState.READY, NEW)
    await bench.look(3)
    assert (await bench.stored()).rollout == stored, "before the gateway has said what came of it"
    bench.answers(44)
    await bench.look(2)
    assert (await bench.stored()).rollout == stored, "29 of 30: those of the step before are none of them"
    bench.answers(45)
    await bench.look()
    going_on = (await bench.stored()).rollout
    assert going_on is not None
    assert going_on.step == 2, "those of before the restart count"


async def test_no_step_is_taken_before_gateways_have_said_what_came_of_the_last() -> None:
    bench = Bench()
    await bench.start(steps=(RolloutStep(weight=0.25, s=3_600.0), RolloutStep(weight=0.5, hold=True)))
    await bench.ready(1)
    active = (await bench.stored()).rollout
    assert active is not None
    bench.world.told.clear()
    await bench.put(rollout=msgspec.structs.replace(active, step_unix_ns=1))
    await bench.look(2)
    assert bench.weights()[NEW] == 0.25
    bench.answers(1)
    await bench.look(2)
    assert bench.weights()[NEW] == 0.5


async def test_a_gateway_that_forgot_a_revision_counts_from_zero() -> None:
    bench = Bench()
    await bench.start(steps=(RolloutStep(weight=0.25, s=0.0, requests_min=5), RolloutStep(weight=0.5, hold=True)))
    await bench.ready(1)
    bench.answers(1_000)
    await bench.look()
    bench.answers(30, 30)
    await bench.look()
    assert (await bench.stored()).rollouts[0].reason.startswith("30 of 30 answers")


async def test_the_old_one_is_kept_warm_while_the_new_one_proves_itself() -> None:
    bench = Bench()
    await bench.start(keep_warm=1, prove_s=3_600.0)
    await bench.ready(1)
    await bench.ready(1)
    assert len(bench.draining(OLD)) == 1
    assert bench.weights() == {OLD: 0.0, NEW: 1.0}
    bench.answers(30, 30)
    await bench.look()
    ended = await bench.stored()
    assert (ended.revision, ended.rollouts[0].phase) == (OLD, RolloutPhase.ROLLED_BACK)
    assert len(bench.started(OLD)) == 1, "one was warm"
    assert len(bench.draining(NEW)) == 2


async def test_after_going_back_the_new_one_serves_until_an_old_one_is_ready() -> None:
    bench = Bench()
    await bench.start(prove_s=3_600.0)
    await bench.ready(1)
    await bench.ready(1)
    for name, entry in list(bench.world.replicas.items()):
        if entry.revision == OLD:
            bench.hear(name, ReplicaState.STOPPED, OLD)
    bench.answers(30, 30)
    await bench.look()
    assert (await bench.stored()).revision == OLD
    assert bench.draining(NEW) == []
    names = bench.started(OLD)
    assert len(names) == 2
    bench.hear(names[0], ReplicaState.READY, OLD)
    await bench.look()
    assert len(bench.draining(NEW)) == 2


async def test_a_step_that_came_second_does_not_undo_what_somebody_did() -> None:
    bench = Bench()
    await bench.start(prove_s=0.0)
    await bench.ready(1)
    stored = await bench.stored()
    paused = msgspec.structs.replace(stored, generation=stored.generation + 1, deleting=True)
    await bench.state.put_deployment(paused, expected_generation=stored.generation)
    await bench.ready(1)
    assert (await bench.stored()) == paused
    assert bench.world.deployments[KEY].deployment.deleting


async def test_a_new_revision_with_a_bound_of_its_own_takes_over_at_that() -> None:
    bench = Bench()
    await bench.start(prove_s=3_600.0)
    await bench.put(revision_bounds={NEW: ScaleBounds(max=1)})
    await bench.ready(1)
    stored = (await bench.stored()).rollout
    assert stored is not None
    assert stored.phase is RolloutPhase.PROVING


async def test_a_new_revision_in_a_crash_loop_is_tried_once_after_each_pause() -> None:
    bench = Bench()
    await bench.start(failures_max=100)
    for _ in range(restart.FAILURES_MAX):
        await bench.look()
        (name,) = bench.started(NEW)
        bench.hear(name, ReplicaState.FAILED, NEW, error=ErrorBody(kind="user_code", message="boom"))
        bench.now_s += 10.0
    await bench.look(2)
    assert bench.started(NEW) == [], "the pause is not over"
    bench.now_s += restart.PROBE_S_FIRST
    await bench.look(3)
    assert len(bench.started(NEW)) == 1
    assert bench.draining(OLD) == []


async def test_a_crash_loop_stays_one_over_a_restart_of_control() -> None:
    bench = Bench()
    await bench.state.put_revision(revision(OLD, scale=SCALE))
    await bench.state.put_deployment(deployment(), expected_generation=0)
    now = time.time_ns()
    outcomes = [
        "failed: of long ago",
        "ready",
        "failed: boom",
        "failed: its agent is gone",
        "stopped: drained",
        *["failed: boom"] * 3,
    ]
    for number, outcome in enumerate(outcomes):
        error = ErrorBody(kind="user_code", message="boom", where="startup")
        ended = receipt(f"rep-{number}", outcome=outcome, started=now - 10 + number, ready=now, error=error)
        await bench.state.put_receipt(ended)
    bench.live()
    await bench.loop.load()
    entry = bench.world.deployments[KEY]
    assert (entry.starts.failures, entry.starts.reason) == (4, "boom [startup]")
    await bench.look(2)
    assert bench.sent == [], "nothing is spent on it again"
    assert entry.health == "crash-looping"
    bench.now_s += restart.PROBE_S_FIRST + 1.0
    await bench.look()
    assert len(bench.started(OLD)) == 1

"""What control keeps and says of its decisions: history across a restart, `why`, bounds of single revisions."""

import time
from collections.abc import AsyncIterator

import anyio
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from platform_helpers import KEY, NAME, load, receipt, replica_route, route
from scaling_world import GATEWAY, ScalingWorld
from snowdrop.cli.scaling import parse_schedule
from snowdrop.cli.why import parse_duration_s
from snowdrop.control import asking, scaling
from snowdrop.control.asking import WaitQuestions
from snowdrop.control.http import typed_errors
from snowdrop.control.loop import ControlLoop
from snowdrop.control.recorder import Recorder
from snowdrop.control.why_api import WhyApi
from snowdrop.control.world import DeploymentKey
from snowdrop.domain.errors import InvalidInputError, SnowdropError
from snowdrop.domain.ids import DEFAULT_TENANT
from snowdrop.domain.scale import Scale, ScaleBounds, Schedule
from snowdrop.domain.service import ServiceSpec
from snowdrop.gateway.owner import Owner
from snowdrop.gateway.queue import QueueCore
from snowdrop.policy.autoscale import judge
from snowdrop.policy.autoscale.explain import alternatives
from snowdrop.policy.autoscale.learned import Learned, note_done, note_start
from snowdrop.policy.autoscale.record import is_worth_keeping
from snowdrop.wire.codec import Message
from snowdrop.wire.control import LoadReport, Routes, WaitsTold
from snowdrop.wire.slots import Acquire
from snowdrop.wire.waits import WaitRecord
from snowdrop.wire.why import Why, WhyRequest

pytestmark = pytest.mark.anyio


@pytest.fixture
async def busy() -> ScalingWorld:
    """Two replicas of four slots, one request more than they can take."""
    world = ScalingWorld()
    await world.deploy(scale=Scale(max=2, idle_s=30.0))
    world.service_s = lambda: 500.0
    for _ in range(9):
        world.request()
    world.run(20.0)
    return world


async def nobody(_key: DeploymentKey, _request_id: str) -> list[WaitRecord]:
    """No gateway has it waiting."""
    return []


@pytest.fixture
async def client(busy: ScalingWorld) -> AsyncIterator[TestClient]:
    app = web.Application()
    app.add_routes(WhyApi(busy.loop, nobody).routes())
    async with TestClient(TestServer(app)) as made:
        yield made


async def test_why_says_what_would_have_changed_it(client: TestClient, busy: ScalingWorld) -> None:
    answer = await client.get(f"/v1/deployments/{NAME}/why")
    told = msgspec.json.decode(await answer.read(), type=Why)
    assert told.now is not None
    assert told.now.decision.desired == 2
    assert told.now.signals.queued == 1
    assert judge(told.now.signals) == told.now.decision
    by_change = {alternative.change: alternative for alternative in told.alternatives}
    assert by_change["max=3"].desired == 3
    assert "with max=3 it would be 3" in by_change["max=3"].text
    assert len(told.replicas) == 2


async def test_how_much_more_load_would_start_another_is_the_least_that_does(busy: ScalingWorld) -> None:
    world = ScalingWorld()
    await world.deploy(scale=Scale(max=8, target=1.0, idle_s=30.0))
    world.service_s = lambda: 500.0
    for _ in range(6):
        world.request()
    world.run(100.0)
    now = scaling.latest(world.entry(), now_unix_ns=0)
    assert now is not None
    assert now.decision.desired == 2
    more = next(a for a in alternatives(now.signals) if a.change.startswith("in_flight+"))
    assert more.change == "in_flight+3", "eight slots, six taken"
    assert more.desired == 3


async def test_when_it_scales_down_is_said(busy: ScalingWorld) -> None:
    world = ScalingWorld()
    await world.deploy(scale=Scale(max=2, idle_s=30.0))
    world.request()
    world.run(12.0)
    now = scaling.latest(world.entry(), now_unix_ns=0)
    assert now is not None
    idle = next(a for a in alternatives(now.signals) if a.change == "idle")
    assert idle.desired == 0
    assert "unless a request comes" in idle.text


async def test_decisions_and_what_was_learned_outlive_control() -> None:
    world = ScalingWorld()
    state = world.loop.state
    await world.deploy(scale=Scale(max=4, idle_s=1.0))
    for _ in range(3):
        world.request()
    world.run(20.0)
    learned = world.entry().scaling.learned
    assert (learned.start_s, learned.service_s()) == (2.0, pytest.approx(0.2))
    world.entry().scaling.recorded = None
    world.loop._record_decision(world.entry())
    await _write_all(world.loop)
    await state.put_receipt(receipt("rep-1", started=10, ready=3_000_000_010))
    await state.put_receipt(receipt("rep-2", started=11, ready=9_000_000_000, outcome="failed: it broke"))
    after = ControlLoop(state, Recorder(), tick_s=0.5, clock=lambda: 50.0)
    await after.load()
    again = after.world.deployments[KEY].scaling.learned
    assert again.start_s == 3.0, "start-up times are those of receipts that ended well"
    assert again.service_s() == pytest.approx(0.2)
    kept = await state.scaling.list_decisions(*KEY, since_unix_ns=0, limit=10)
    assert kept[0].decision == world.entry().decision


async def _write_all(loop: ControlLoop) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(loop.recorder.run)
        await loop.recorder.flush(5.0)
        tasks.cancel_scope.cancel()


async def test_what_a_gateway_counted_before_control_came_says_nothing_of_now(busy: ScalingWorld) -> None:
    world = ScalingWorld()
    await world.deploy(scale=Scale(max=4))
    old = msgspec.structs.replace(load(), arrived=10_000, done=9_000, slot_s=9_000.0)
    world.loop.heard_load(LoadReport(gateway=GATEWAY, loads=(old,)))
    assert world.entry().scaling.arrived == 0
    assert world.entry().scaling.learned.service_s() == 0.0
    newer = msgspec.structs.replace(old, arrived=10_004, done=9_002, slot_s=9_001.0)
    world.loop.heard_load(LoadReport(gateway=GATEWAY, loads=(newer,)))
    assert world.entry().scaling.arrived == 4
    assert world.entry().scaling.learned.service_s() == 0.5


async def test_why_a_request_waited(client: TestClient, busy: ScalingWorld) -> None:
    told = WaitRecord(
        request_id="told-7",
        tenant=DEFAULT_TENANT,
        deployment=NAME,
        arrived_unix_ns=1_000_000_000_000,
        ended_unix_ns=1_009_000_000_000,
        outcome="granted",
        reason="no replica was ready",
        receipt=receipt("rep-1").id,
    )
    await busy.loop.state.put_receipt(receipt("rep-1"))
    busy.loop.heard_load(LoadReport(gateway=GATEWAY, loads=(), waits=(told,)))
    await _write_all(busy.loop)
    for record in busy.records:
        await busy.loop.state.scaling.put_decision(record)
    answer = await client.get(f"/v1/deployments/{NAME}/why/told-7")
    why = msgspec.json.decode(await answer.read(), type=WhyRequest)
    assert why.waits == (told,)
    assert [found.id for found in why.receipts] == [receipt("rep-1").id]
    assert why.decisions
    assert all(told.arrived_unix_ns <= record.unix_ns <= told.ended_unix_ns for record in why.decisions)


async def test_a_request_of_which_nothing_is_kept_is_said_so(busy: ScalingWorld) -> None:
    @web.middleware
    async def typed(request: web.Request, handler: object) -> web.StreamResponse:
        try:
            return await handler(request)
        except SnowdropError as error:
            return web.json_response({"message": error.message, "next": error.next_step}, status=error.http_status)

    app = web.Application(middlewares=[typed])
    app.add_routes(WhyApi(busy.loop, nobody).routes())
    async with TestClient(TestServer(app)) as made:
        missing = await made.get(f"/v1/deployments/{NAME}/why/req-0")
        assert missing.status == 404
        assert "hardly waited" in (await missing.json())["next"]
        assert (await made.get("/v1/deployments/nobody/why")).status == 404
        assert (await made.get(f"/v1/deployments/{NAME}/why?since_s=x")).status == 422


async def test_a_revision_has_bounds_of_its_own() -> None:
    world = ScalingWorld()
    await world.deploy(scale=Scale(max=8))
    entry = world.entry()
    entry.deployment = msgspec.structs.replace(
        entry.deployment, revision_bounds={entry.revision.id: ScaleBounds(max=1)}
    )
    for _ in range(30):
        world.request()
    world.run(10.0)
    assert len(world.started) == 1
    assert entry.decision is not None
    assert any("max=1 (bounds of the revision)" in record.decision.reason for record in world.records)


async def test_a_schedule_wakes_a_deployment_that_sleeps() -> None:
    world = ScalingWorld()
    now_unix_s = int(world.now_s)
    minute = now_unix_s // 60 % 60 + 3
    window = Schedule(cron=f"{minute} * * * *", duration_s=120, min=2)
    await world.deploy(scale=Scale(max=4, idle_s=1.0, schedules=(window,)))
    world.run(60.0)
    assert not world.world.replicas
    world.run(180.0)
    assert len(world.world.replicas) == 2
    world.run(200.0)
    assert not world.world.replicas


async def test_an_idle_time_is_chosen_from_the_gaps_that_were_seen() -> None:
    world = ScalingWorld()
    await world.deploy(scale=Scale(max=1, idle="auto", idle_s=5.0, wait_price=30.0))
    for number in range(20):
        world.request(after_s=12.0 * number)
    world.run(12.0 * 20)
    choice = world.entry().scaling.idle
    assert choice is not None
    assert 11.0 <= choice.idle_s <= 16.0, choice
    started = len(world.started)
    for number in range(20):
        world.request(after_s=12.0 * number)
    world.run(12.0 * 20)
    assert len(world.started) == started, "a gap that was known ended in a cold start"
    assert started > 5, "with the time given by hand each gap did"


def test_what_is_learned_follows_what_is_seen() -> None:
    learned = Learned()
    for start_s in (1.0, 9.0, 2.0, float("nan"), -1.0):
        learned = note_start(learned, start_s)
    assert (learned.start_s, learned.start_high_s) == (2.0, 9.0)
    learned = note_done(learned, done=100, slot_s=20.0)
    assert learned.service_s() == pytest.approx(0.2)
    assert learned.service_s(in_flight=2, running_s=60.0) == 30.0, "longer ones that still run count"
    for _ in range(20):
        learned = note_done(learned, done=100, slot_s=200.0)
    assert learned.service_s() == pytest.approx(2.0, rel=0.01)


async def test_a_decision_is_kept_when_it_says_something_new(busy: ScalingWorld) -> None:
    now = scaling.latest(busy.entry(), now_unix_ns=10**12)
    assert now is not None
    assert is_worth_keeping(None, now)
    soon = msgspec.structs.replace(now, unix_ns=now.unix_ns + 10**9)
    assert not is_worth_keeping(now, soon)
    more = msgspec.structs.replace(now.decision, desired=now.decision.desired + 1)
    assert is_worth_keeping(now, msgspec.structs.replace(soon, decision=more))
    assert is_worth_keeping(now, msgspec.structs.replace(now, unix_ns=now.unix_ns + 61 * 10**9))


def test_durations_and_schedules_are_read_as_people_write_them() -> None:
    assert [parse_duration_s(text, "x") for text in ("90", "90s", "10min", "2h", "1d")] == [
        90,
        90,
        600,
        7200,
        86_400,
    ]
    made = parse_schedule("0 8 * * mon-fri for 10h min=2 tz=Europe/Berlin")
    assert made == Schedule(cron="0 8 * * mon-fri", duration_s=36_000, timezone="Europe/Berlin", min=2)
    for wrong in ("daily", "0 8 * * * for long min=1", "0 8 * * * for 1h least=1", "0 8 * * * for 1h min=x"):
        with pytest.raises(InvalidInputError):
            parse_schedule(wrong)


def test_an_old_revision_without_the_new_fields_is_read() -> None:
    old = b"""{"class_name": "Embed", "scale": {"min": 0, "max": 2, "idle_s": 60.0, "target": 0.7,
              "stable_window_s": 60.0, "panic_window_s": 6.0}}"""
    assert msgspec.json.decode(old, type=ServiceSpec).scale == Scale(max=2)


class Line:
    """A gateway's queue in front of one busy replica, as control reaches it."""

    def __init__(self) -> None:
        self.core = QueueCore(keys_required=False)
        self.owner = Owner(self.core, "gw-0")
        self.owner.connected(self)
        self.owner.attach("w", lambda _message: None)
        self.owner.from_control(Routes(generation=1, deployments=(route(replica_route(concurrency=1)),)))
        self.asked = WaitQuestions(lambda: {"gw-0", *self.deaf}, self.owner.from_control)
        self.deaf: set[str] = set()

    def send_soon(self, message: Message) -> None:
        if isinstance(message, WaitsTold):
            self.asked.heard("gw-0", message)
            self.asked.heard("gw-0", message)  # a second time changes nothing

    def load_changed(self) -> None: ...

    def arrive(self, request_id: str, ticket: int) -> None:
        now = time.time_ns()
        wanted = Acquire(
            ticket=ticket, key_sha256=None, deployment=NAME, request_id=request_id, arrived_unix_ns=now
        )
        self.owner.arrive("w", wanted)


async def test_why_knows_of_a_request_that_waits_still(busy: ScalingWorld) -> None:
    line = Line()
    for ticket, name in enumerate(("has-the-slot", "first", "second")):
        line.arrive(name, ticket)
    app = web.Application(middlewares=[typed_errors])
    app.add_routes(WhyApi(busy.loop, line.asked.ask).routes())
    async with TestClient(TestServer(app)) as client:

        async def told(name: str) -> WaitRecord:
            answer = await client.get(f"/v1/deployments/{NAME}/why/{name}")
            (wait,) = msgspec.json.decode(await answer.read(), type=WhyRequest).waits
            return wait

        wait = await told("second")
        assert (wait.outcome, wait.position, wait.request_id) == ("waiting", 1, "second")
        assert wait.reason
        line.owner.cancel("w", 1)
        assert (await told("second")).position == 0, "as it is now, not as it was when it began"
        assert (await client.get(f"/v1/deployments/{NAME}/why/has-the-slot")).status == 404
        assert (await client.get("/v1/deployments/other/why/second")).status == 404


async def test_a_gateway_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "ANSWER_S_MAX", 0.01)
    line = Line()
    for ticket in range(2):
        line.arrive(f"r{ticket}", ticket)
    line.deaf = {"gw-1"}
    assert [wait.request_id for wait in await line.asked.ask(KEY, "r1")] == ["r1"]
    line.deaf = set()
    assert [wait.request_id for wait in await line.asked.ask(KEY, "r1")] == ["r1"]
    nobody_there = WaitQuestions(set, lambda _message: pytest.fail("asks nobody"))
    assert await nobody_there.ask(KEY, "r1") == []

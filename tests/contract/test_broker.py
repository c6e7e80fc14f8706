"""One suite for both brokers: the one inside of the owner's process, and the one over a socket."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.lowlevel
import msgspec
import pytest

from platform_helpers import KEY, NAME, call, caller, replica_route, route
from snowdrop.domain.errors import (
    NotFoundError,
    PlatformDownError,
    RevisionFailedError,
    TimedOutError,
    UnauthorisedError,
)
from snowdrop.domain.ids import DeploymentName, ReceiptId
from snowdrop.domain.service import QueueSpec
from snowdrop.gateway.broker import Broker, LocalBroker, RemoteBroker
from snowdrop.gateway.call import WaitOptions
from snowdrop.gateway.effects import Now
from snowdrop.gateway.owner import Owner
from snowdrop.gateway.queue import QueueCore
from snowdrop.wire.codec import PROTOCOL_VERSION
from snowdrop.wire.control import CallerServed, RouteChanged, Routes
from snowdrop.wire.slots import TO_WORKER, Acquire, Granted, WaitNews, WorkerHello
from snowdrop.wire.stream import MessageStream

pytestmark = pytest.mark.anyio
WAIT_S_MAX = 10.0
NOW = Now(0.0, 0)


class Bench:
    """An owner with one deployment of one slot, and a broker to it."""

    def __init__(self, socket: Path) -> None:
        self.core = QueueCore(keys_required=False)
        self.owner = Owner(self.core, "gw")
        self.socket = socket
        self.said: list[object] = []
        self.owner.connected(self)
        self.show(replica_route(concurrency=1))

    def send_soon(self, message: object) -> None:
        self.said.append(message)

    def load_changed(self) -> None: ...

    def show(self, *replicas: object, **more: object) -> None:
        self.owner.from_control(Routes(generation=1, deployments=(route(*replicas, **more),)))

    def counts(self) -> tuple[int, int]:
        (load,) = self.core.loads(NOW)
        return load.in_flight, load.queued

    async def until(self, condition: Callable[[], bool]) -> None:
        with anyio.fail_after(WAIT_S_MAX):
            while not condition():
                await anyio.sleep(0.001)

    @asynccontextmanager
    async def remote(self, worker: str) -> AsyncIterator[RemoteBroker]:
        """A broker over the socket; its connection ends with the block."""
        broker = RemoteBroker(worker)
        stream = await anyio.connect_unix(str(self.socket))
        async with anyio.create_task_group() as tasks:
            await tasks.start(lambda *, task_status: broker.run(stream, task_status=task_status))
            yield broker
            tasks.cancel_scope.cancel()


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path / "owner.sock")
    async with await anyio.create_unix_listener(str(made.socket)) as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(made.owner.serve_workers, listener)
        yield made
        tasks.cancel_scope.cancel()


@pytest.fixture(params=["local", "remote"])
async def broker(request: pytest.FixtureRequest, bench: Bench) -> AsyncIterator[Broker]:
    if request.param == "local":
        yield LocalBroker(bench.owner, "w-local")
        return
    async with bench.remote("w-remote") as made:
        yield made


async def acquire(broker: Broker, name: str = NAME) -> Granted:
    with anyio.fail_after(WAIT_S_MAX):
        return await broker.acquire(call(name))


class TestBroker:
    async def test_who_speaks_the_dialect_is_told_to_whoever_asks(self, bench: Bench, broker: Broker) -> None:
        bench.show(openai=("/v1/embeddings",), created_unix_s=5)
        bench.core.connected = True
        (speaker,) = await broker.speakers(None)
        assert (speaker.deployment, speaker.paths, speaker.created_unix_s) == (NAME, ("/v1/embeddings",), 5)
        with pytest.raises(UnauthorisedError):
            await broker.speakers("wrong")
        with pytest.raises(NotFoundError, match="does not serve"):
            await broker.acquire(call(dialect="/v1/completions"))
        assert bench.counts() == (0, 0)

    async def test_grants_a_free_slot_and_takes_it_back(self, bench: Bench, broker: Broker) -> None:
        granted = await acquire(broker)
        assert granted.socket_path == "/run/rep-1.sock"
        assert bench.counts() == (1, 0)
        broker.release(granted)
        await bench.until(lambda: bench.counts() == (0, 0))

    async def test_the_next_in_the_queue_gets_the_slot(self, bench: Bench, broker: Broker) -> None:
        first = await acquire(broker)
        got: list[Granted] = []

        async def wait() -> None:
            got.append(await acquire(broker))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await bench.until(lambda: bench.counts() == (1, 1))
            assert not got
            broker.release(first)
        assert bench.counts() == (1, 0)
        broker.release(got[0])
        await bench.until(lambda: not bench.core.busy)

    async def test_cancelled_while_waiting_holds_nothing(self, bench: Bench, broker: Broker) -> None:
        first = await acquire(broker)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(acquire, broker)
            await bench.until(lambda: bench.counts() == (1, 1))
            tasks.cancel_scope.cancel()
        await bench.until(lambda: bench.counts() == (1, 0))
        broker.release(first)
        await bench.until(lambda: not bench.core.busy)

    async def test_a_cancel_that_meets_its_grant_gives_the_slot_back(self, bench: Bench, broker: Broker) -> None:
        first = await acquire(broker)
        waiting: list[asyncio.Task[object]] = []
        given_up = anyio.Event()

        async def wait() -> None:
            task = asyncio.current_task()
            assert task is not None
            waiting.append(task)
            try:
                await broker.acquire(call())
            except asyncio.CancelledError:
                given_up.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await bench.until(lambda: bench.counts() == (1, 1))
            # As aiohttp does it when the client goes: the grant is on its way, the task has not run since.
            bench.owner.release(first.lease)
            assert bench.counts() == (1, 0)
            waiting[0].cancel()
        assert given_up.is_set()
        await bench.until(lambda: not bench.core.busy)

    async def test_refusals_keep_their_type(self, bench: Bench, broker: Broker) -> None:
        with pytest.raises(NotFoundError, match="nobody"):
            await acquire(broker, "nobody")
        bench.show(refusal=RevisionFailedError("it raised at import").body())
        with pytest.raises(RevisionFailedError, match="raised at import"):
            await acquire(broker)

    async def test_unreachable_ends_the_lease_and_tells_control(self, bench: Bench, broker: Broker) -> None:
        broker.unreachable(await acquire(broker), "connection refused")
        await bench.until(lambda: bench.counts() == (0, 0) and len(bench.said) == 1)
        assert getattr(bench.said[0], "message", "") == "connection refused"

    async def test_who_wants_to_know_hears_how_it_stands(self, bench: Bench, broker: Broker) -> None:
        bench.show(queue=QueueSpec(progress_first_s=3.0), start_s=9.0)
        told: list[WaitNews] = []

        async def wait() -> None:
            broker.release(await broker.acquire(call(wait=WaitOptions(progress=True)), told.append))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await bench.until(lambda: bool(told))
            assert (told[0].phase, told[0].position, told[0].first_s) == ("activate", 0, 3.0)
            assert told[0].expected_s == 9.0
            bench.owner._carry_out(bench.core.tick(Now(anyio.current_time() + 5.0, 0)))
            await bench.until(lambda: len(told) == 2)
            bench.show(replica_route())
        await bench.until(lambda: not bench.core.busy)

    async def test_looks_and_wakes(self, bench: Bench, broker: Broker) -> None:
        bench.show()
        looked = await broker.look(None, NAME, activate=False)
        assert (looked.ready, looked.phase, looked.woken) == (0, "activate", False)
        assert bench.counts() == (0, 0)
        looked = await broker.look(None, NAME, activate=True)
        assert looked.woken
        assert bench.counts() == (0, 1)
        bench.show(replica_route())
        assert (await broker.look(None, NAME, activate=False)).ready == 1
        with pytest.raises(NotFoundError):
            await broker.look(None, DeploymentName("nobody"), activate=True)
        assert bench.counts() == (0, 0)

    async def test_asks_with_all_that_the_order_goes_by(self, bench: Bench, broker: Broker) -> None:
        bench.show(queue=QueueSpec(priority_max=5))
        async with anyio.create_task_group() as tasks:
            for name, priority in (("low", None), ("high", 5)):
                asked = call(wait=WaitOptions(priority=priority, wait_s_max=60.0), label="me", request_id=name)
                tasks.start_soon(broker.acquire, asked)
            await bench.until(lambda: bench.counts() == (0, 2))
            (deployment,) = bench.core._deployments.values()
            waiting = {each.request.request_id: each for each in deployment.line.values()}
            assert (waiting["high"].priority, waiting["low"].priority) == (5, 0)
            assert waiting["high"].request.label == "me"
            assert waiting["high"].request.wait_s_max == 60.0
            tasks.cancel_scope.cancel()
        await bench.until(lambda: not bench.core.busy)

    async def test_a_deadline_bounds_the_wait(self, bench: Bench, broker: Broker) -> None:
        bench.show()
        raised: list[str] = []

        async def wait() -> None:
            try:
                await broker.acquire(call(deadline_unix_s=time.time() + 30.0))
            except TimedOutError as error:
                raised.append(error.where)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await bench.until(lambda: bench.counts() == (0, 1))
            bench.owner._carry_out(bench.core.tick(Now(time.monotonic() + 31.0, 0)))
            await bench.until(lambda: bool(raised))
        assert raised == ["header snowdrop-timeout or snowdrop-deadline"]

    async def test_a_caller_is_told_until_control_has_stored_it(self, bench: Bench, broker: Broker) -> None:
        told = CallerServed(receipt=ReceiptId("rcp-1"), caller=caller())
        broker.served(told.receipt, told.caller)
        await bench.until(lambda: bench.said == [told])
        bench.owner.connected(bench)
        assert bench.said == [told, told]


async def test_a_worker_that_dies_holds_nothing_back(bench: Bench) -> None:
    local = LocalBroker(bench.owner, "w-local")
    got: list[Granted] = []

    async def wait() -> None:
        got.append(await acquire(local))

    async with anyio.create_task_group() as tasks:
        async with bench.remote("w-dying") as dying:
            await acquire(dying)
            tasks.start_soon(wait)
            await bench.until(lambda: bench.counts() == (1, 1))
        with anyio.fail_after(WAIT_S_MAX):
            while not got:
                await anyio.sleep(0.001)
    local.release(got[0])
    assert not bench.core.busy


async def test_a_broker_whose_owner_is_gone_fails_at_once(bench: Bench) -> None:
    async with bench.remote("w-1") as broker:
        granted = await acquire(broker)
    with pytest.raises(PlatformDownError):
        await acquire(broker)
    broker.release(granted)
    await bench.until(lambda: not bench.core.busy)


async def test_who_waits_is_told_when_the_owner_goes(bench: Bench) -> None:
    failed: list[Exception] = []

    async def wait(broker: Broker) -> None:
        try:
            await acquire(broker)
        except PlatformDownError as error:
            failed.append(error)

    bench.owner.from_control(RouteChanged(generation=2, tenant=KEY[0], deployment=KEY[1], route=route()))
    async with anyio.create_task_group() as tasks, bench.remote("w-1") as broker:
        tasks.start_soon(wait, broker)
        await bench.until(lambda: bench.counts() == (0, 1))
    assert len(failed) == 1


@pytest.mark.parametrize("version", [PROTOCOL_VERSION + 1, None])
async def test_a_stranger_or_another_version_is_cut_off(bench: Bench, version: int | None) -> None:
    stream = await anyio.connect_unix(str(bench.socket))
    messages: MessageStream[object] = MessageStream(stream, TO_WORKER)
    if version is not None:
        await messages.send(WorkerHello(version=version, worker="w-new"))
    else:
        await stream.send(b"GET / HTTP/1.1\r\n\r\n")
        await stream.send_eof()
    with anyio.fail_after(WAIT_S_MAX), pytest.raises(anyio.EndOfStream):
        await messages.receive()
    await messages.aclose()


async def test_a_broken_frame_ends_that_worker_alone(bench: Bench) -> None:
    async with bench.remote("w-good") as good:
        stream = await anyio.connect_unix(str(bench.socket))
        messages: MessageStream[object] = MessageStream(stream, TO_WORKER)
        await messages.send(WorkerHello(version=PROTOCOL_VERSION, worker="w-bad"))
        await stream.send(b"\x03\x00\x00\x00abc")
        with anyio.fail_after(WAIT_S_MAX), pytest.raises(anyio.EndOfStream):
            await messages.receive()
        await messages.aclose()
        good.release(await acquire(good))


async def test_a_worker_that_does_not_read_is_cut_off_and_holds_up_nobody(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be stopped, or stuck: what it is not told piles up, within a bound."""
    monkeypatch.setattr("snowdrop.wire.pipe.OUTBOX_BYTES_MAX", 10_000)
    bench.show(replica_route(concurrency=20_000))
    stream = await anyio.connect_unix(str(bench.socket))
    messages: MessageStream[object] = MessageStream(stream, TO_WORKER)
    await messages.send(WorkerHello(version=PROTOCOL_VERSION, worker="w-stuck"))
    ask = Acquire(ticket=0, key_sha256=None, deployment=NAME, arrived_unix_ns=1)
    for ticket in range(1, 20_000):
        try:
            await messages.send(msgspec.structs.replace(ask, ticket=ticket))
        except anyio.BrokenResourceError:
            break
    else:
        raise AssertionError("it was never cut off")
    async with bench.remote("w-good") as good:
        good.release(await acquire(good))
    await bench.until(lambda: not bench.core.busy)
    await messages.aclose()

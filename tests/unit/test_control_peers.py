"""Control's door: agents and gateways over a real socket, with made-up peers at the other end."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from platform_helpers import (
    KEY,
    NODE,
    caller,
    deployment,
    load,
    node_record,
    receipt,
    report,
    revision,
    usage,
)
from snowdrop.control.loop import ControlLoop
from snowdrop.control.peers import Peers
from snowdrop.control.reconcile import iterate
from snowdrop.control.recorder import Recorder
from snowdrop.domain.ids import DEFAULT_TENANT
from snowdrop.domain.replica import ReplicaReport, ReplicaState
from snowdrop.domain.service import Scale
from snowdrop.state.memory import MemoryState
from snowdrop.wire.codec import PROTOCOL_VERSION, Message
from snowdrop.wire.control import (
    TO_AGENT,
    TO_GATEWAY,
    AgentHello,
    CallerServed,
    CallerStored,
    GatewayHello,
    LinkRefused,
    LoadReport,
    ReplicaChanged,
    RouteChanged,
    Routes,
    StartReplica,
    UsageBatch,
    UsageStored,
)
from snowdrop.wire.stream import MessageStream

pytestmark = pytest.mark.anyio
WAIT_S_MAX = 10.0


def agent_hello(*replicas: object, version: int = PROTOCOL_VERSION) -> AgentHello:
    return AgentHello(
        version=version, node=node_record(), incarnation="i", api_socket="/a.sock", replicas=tuple(replicas)
    )


def gateway_hello(version: int = PROTOCOL_VERSION) -> GatewayHello:
    return GatewayHello(version=version, gateway="gw-0")


class Bench:
    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.state = MemoryState()
        self.loop = ControlLoop(self.state, Recorder(), tick_s=60.0)
        self.world = self.loop.world
        self.peers: list[MessageStream] = []

    @asynccontextmanager
    async def control(self, *, settle_s_max: float = 5.0) -> AsyncIterator[None]:
        peers = Peers(self.loop, settle_s_max=settle_s_max)
        async with (
            await anyio.create_unix_listener(str(self.socket)) as listener,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(peers.serve, listener)
            tasks.start_soon(self.loop.recorder.run)
            yield
            tasks.cancel_scope.cancel()
        # Closed after control: an end that is seen while its reader is cancelled makes anyio complain.
        for peer in self.peers:
            await peer.aclose()

    async def restart_with(self, report: ReplicaReport) -> None:
        """As control is after a restart: of replicas it knows only what is stored."""
        await self.state.put_replica(report)
        await self.loop.load()

    async def peer(self, hello: Message) -> MessageStream:
        codec = TO_AGENT if isinstance(hello, AgentHello) else TO_GATEWAY
        messages = MessageStream(await anyio.connect_unix(str(self.socket)), codec)
        self.peers.append(messages)
        await messages.send(hello)
        return messages

    async def until(self, condition: Callable[[], bool]) -> None:
        with anyio.fail_after(WAIT_S_MAX):
            while not condition():
                await anyio.sleep(0.001)


async def hear(messages: MessageStream) -> Message:
    with anyio.fail_after(WAIT_S_MAX):
        return await messages.receive()


@pytest.fixture
async def bench(tmp_path: Path) -> Bench:
    made = Bench(tmp_path / "link.sock")
    await made.state.put_revision(revision(scale=Scale(max=2)))
    await made.state.put_deployment(deployment(), expected_generation=0)
    await made.loop.load()
    return made


@pytest.mark.parametrize("hello", [agent_hello(version=99), gateway_hello(version=99)])
async def test_another_version_is_refused_with_the_reason(bench: Bench, hello: Message) -> None:
    async with bench.control():
        peer = await bench.peer(hello)
        refused = await hear(peer)
        assert isinstance(refused, LinkRefused)
        assert refused.error.kind == "protocol"
        assert "99" in refused.error.message
        with pytest.raises(anyio.EndOfStream):
            await hear(peer)
    assert not bench.world.nodes
    assert not bench.world.gateways


async def test_a_peer_that_breaks_the_framing_is_cut_off_alone(bench: Bench) -> None:
    async with bench.control():
        agent = await bench.peer(agent_hello())
        gateway = await bench.peer(gateway_hello())
        assert isinstance(await hear(gateway), Routes)
        await gateway._stream.send(b"\x03\x00\x00\x00abc")
        assert isinstance(await hear(gateway), LinkRefused)
        await agent.send(UsageBatch(records=(usage(1, 5),)))
        assert isinstance(await hear(agent), UsageStored)


async def test_load_becomes_an_order_and_a_report_a_route(bench: Bench) -> None:
    async with bench.control():
        agent = await bench.peer(agent_hello())
        gateway = await bench.peer(gateway_hello())
        table = await hear(gateway)
        assert isinstance(table, Routes)
        assert [(r.tenant, r.deployment) for r in table.deployments] == [KEY]
        await gateway.send(LoadReport(gateway="gw-0", loads=(load(queued=1),)))
        await bench.until(lambda: bench.world.load(KEY)[1] == 1)
        for order in iterate(bench.world, KEY, now_s=1.0, now_unix_ns=1):
            bench.loop.send_agent(order.node, order.message)
        start = await hear(agent)
        assert isinstance(start, StartReplica)
        await agent.send(ReplicaChanged(report=report(start.key)))
        changed = await hear(gateway)
        assert isinstance(changed, RouteChanged)
        assert changed.route is not None
        assert [r.replica for r in changed.route.replicas] == [start.key.replica]


async def test_an_order_that_was_lost_on_the_way_is_sent_again(bench: Bench) -> None:
    async with bench.control():
        first = await bench.peer(agent_hello())
        await bench.until(lambda: NODE in bench.world.nodes)
        gateway = await bench.peer(gateway_hello())
        await hear(gateway)
        await gateway.send(LoadReport(gateway="gw-0", loads=(load(queued=1),)))
        await bench.until(lambda: bench.world.load(KEY)[1] == 1)
        (order,) = iterate(bench.world, KEY, now_s=1.0, now_unix_ns=1)  # and never sent
        second = await bench.peer(agent_hello())
        assert await hear(second) == order.message
        with pytest.raises(anyio.EndOfStream):
            await hear(first)  # the newer connection replaces the older one


async def test_gateways_wait_until_the_agents_of_living_replicas_have_spoken(bench: Bench) -> None:
    await bench.restart_with(report())
    async with bench.control(settle_s_max=60.0):
        gateway = await bench.peer(gateway_hello())
        await bench.peer(agent_hello(report()))
        table = await hear(gateway)
        assert isinstance(table, Routes)
        assert NODE in bench.world.nodes
        assert [r.replica for r in table.deployments[0].replicas] == ["rep-1"]


async def test_an_agent_that_does_not_come_back_loses_its_replicas(bench: Bench) -> None:
    await bench.restart_with(report())
    async with bench.control(settle_s_max=0.02):
        gateway = await bench.peer(gateway_hello())
        table = await hear(gateway)
        assert isinstance(table, Routes)
        assert table.deployments[0].replicas == ()
        assert not bench.world.replicas
        await bench.loop.recorder.flush(WAIT_S_MAX)
    (ended,) = await bench.state.list_replicas(None, None, ended=True, limit=9)
    assert (ended.key.replica, ended.state) == ("rep-1", ReplicaState.FAILED)


async def test_an_agent_that_goes_and_stays_away_loses_its_replicas(bench: Bench) -> None:
    async with bench.control(settle_s_max=0.02):
        agent = await bench.peer(agent_hello(report()))
        await bench.until(lambda: "rep-1" in bench.world.replicas)
        gateway = await bench.peer(gateway_hello())
        table = await hear(gateway)
        assert isinstance(table, Routes)
        assert [r.replica for r in table.deployments[0].replicas] == ["rep-1"]
        await agent.aclose()
        changed = await hear(gateway)
        assert isinstance(changed, RouteChanged)
        assert changed.route is not None
        assert changed.route.replicas == ()
        assert not bench.world.replicas
        assert not bench.world.nodes


async def test_a_replica_that_its_agent_no_longer_has_is_lost(bench: Bench) -> None:
    async with bench.control():
        await bench.peer(agent_hello(report("rep-1"), report("rep-2")))
        await bench.until(lambda: len(bench.world.replicas) == 2)
        await bench.peer(agent_hello(report("rep-2")))
        await bench.until(lambda: list(bench.world.replicas) == ["rep-2"])
        await bench.loop.recorder.flush(WAIT_S_MAX)
        ended = await bench.state.list_replicas(None, None, ended=True, limit=9)
        assert {r.key.replica: r.state for r in ended}["rep-1"] is ReplicaState.FAILED


async def test_usage_is_acknowledged_once_stored_and_counted_once(bench: Bench) -> None:
    async with bench.control():
        agent = await bench.peer(agent_hello())
        batch = UsageBatch(records=(usage(1, 5), usage(2, 6)))
        for _ in range(2):
            await agent.send(batch)
            assert await hear(agent) == UsageStored(node=NODE, source="jrn-1", sequence=2)
    assert [t.quantity for t in await bench.state.usage_totals(DEFAULT_TENANT)] == [11]


async def test_a_caller_completes_its_receipt_and_is_acknowledged(bench: Bench) -> None:
    await bench.state.put_receipt(receipt())
    async with bench.control():
        gateway = await bench.peer(gateway_hello())
        await hear(gateway)
        await gateway.send(CallerServed(receipt=receipt().id, caller=caller()))
        assert await hear(gateway) == CallerStored(receipt=receipt().id)
    stored = await bench.state.get_receipt(DEFAULT_TENANT, receipt().id)
    assert stored is not None
    assert stored.caller == caller()

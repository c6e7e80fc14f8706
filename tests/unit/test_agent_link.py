"""The agent's link, with the test in control's place on a real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.abc
import pytest

from agent_helpers import WAIT_S_MAX, Bench, order
from platform_helpers import NODE, node_record
from snowdrop.agent import link as link_module
from snowdrop.agent.link import AgentLink
from snowdrop.agent.node import Node
from snowdrop.domain.errors import ErrorBody
from snowdrop.domain.ids import ReplicaId
from snowdrop.domain.replica import ReplicaState
from snowdrop.metering import journal as journal_module
from snowdrop.metering.journal import UsageJournal
from snowdrop.wire.codec import PROTOCOL_VERSION
from snowdrop.wire.control import (
    FROM_PEER,
    AgentHello,
    DrainReplica,
    LinkRefused,
    ReplicaChanged,
    UsageBatch,
    UsageStored,
)
from snowdrop.wire.stream import MessageStream

pytestmark = pytest.mark.anyio
S = ReplicaState


class LinkBench(Bench):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.socket = folder / "link.sock"
        self.journal = UsageJournal(folder / "usage.db", NODE)
        self.node = Node(self.journal, usage_tick_s=60.0)
        self.on_change = self.node.on_change
        self.link = AgentLink(str(self.socket), "/agent.sock", node_record(), "inc-1")
        self.incoming, self.connections = anyio.create_memory_object_stream[anyio.abc.SocketStream](8)
        self.opened: list[MessageStream] = []

    @asynccontextmanager
    async def agent(self) -> AsyncIterator[None]:
        """The node and its link run inside; replicas that live at the end are killed."""
        async with anyio.create_task_group() as tasks:
            self.node.bind(self.context, tasks)
            tasks.start_soon(self.link.run, self.node)
            yield
            tasks.cancel_scope.cancel()

    @asynccontextmanager
    async def control(self) -> AsyncIterator[None]:
        """Accepts connections inside; closes them at the end, as a control that is killed does."""
        async with (
            await anyio.create_unix_listener(str(self.socket)) as listener,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(listener.serve, self.accept)
            yield
            tasks.cancel_scope.cancel()
        for messages in self.opened:
            await messages.aclose()
        for _ in range(5):  # an end that is seen while its reader is cancelled makes anyio complain
            await anyio.lowlevel.checkpoint()
        self.socket.unlink()

    async def accept(self, stream: anyio.abc.SocketStream) -> None:
        await self.incoming.send(stream)

    async def connection(self) -> tuple[MessageStream, AgentHello]:
        with anyio.fail_after(WAIT_S_MAX):
            messages = MessageStream(await self.connections.receive(), FROM_PEER)
            self.opened.append(messages)
            hello = await messages.receive()
        assert isinstance(hello, AgentHello)
        return messages, hello

    def close(self) -> None:
        self.journal.close()
        self.incoming.close()
        self.connections.close()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LinkBench]:
    monkeypatch.setattr(link_module, "RECONNECT_S", 0.001)
    made = LinkBench(tmp_path)
    yield made
    made.close()


async def heard(messages: MessageStream, wanted: type) -> object:
    """The next message of that type."""
    with anyio.fail_after(WAIT_S_MAX):
        while not isinstance(message := await messages.receive(), wanted):
            pass
    return message


async def until_state(messages: MessageStream, state: ReplicaState) -> ReplicaChanged:
    while True:
        changed = await heard(messages, ReplicaChanged)
        assert isinstance(changed, ReplicaChanged)
        if changed.report.state is state:
            return changed


async def test_orders_come_and_changes_go(bench: LinkBench) -> None:
    async with bench.control(), bench.agent():
        messages, hello = await bench.connection()
        assert (hello.version, hello.incarnation, hello.api_socket) == (PROTOCOL_VERSION, "inc-1", "/agent.sock")
        assert (hello.node, hello.replicas) == (node_record(), ())
        await messages.send(order())
        replica = await bench.launcher.launched()
        await replica.become(S.READY)
        ready = await until_state(messages, S.READY)
        assert ready.report.history[-1].reason == "startup is done"
        await messages.send(DrainReplica(replica=ReplicaId("rep-1"), reason="scaled down", drain_s_max=3.0))
        await replica.hear()
        replica.end(0)
        stopped = await until_state(messages, S.STOPPED)
        assert stopped.report.version > ready.report.version


async def test_replicas_live_on_without_control_and_are_told_again(bench: LinkBench) -> None:
    async with bench.agent():
        async with bench.control():
            messages, _ = await bench.connection()
            await messages.send(order("rep-1"))
            await messages.send(order("rep-2"))
            for name in ("rep-1", "rep-2"):
                await (await bench.launcher.launched(name)).become(S.READY)
                await bench.until(S.READY, name)
        bench.launcher.replicas["rep-2"].end(1)  # while control is away
        await bench.until(S.FAILED, "rep-2")
        async with bench.control():
            _, hello = await bench.connection()
            assert {(r.key.replica, r.state) for r in hello.replicas} == {("rep-1", S.READY), ("rep-2", S.FAILED)}
            assert hello.incarnation == "inc-1"
            bench.launcher.replicas["rep-1"].end(0)


async def test_changes_while_control_is_away_are_bounded(
    bench: LinkBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "OUTBOX_MAX", 3)
    async with bench.agent():
        for _ in range(5):
            await anyio.lowlevel.checkpoint()  # the link has begun to look for control
        for number in range(3):
            await bench.node.handle(order(f"rep-{number}"))
            await (await bench.launcher.launched(f"rep-{number}")).become(S.READY)
            await bench.until(S.READY, f"rep-{number}")
        assert len(bench.link._outbox) == 3
        async with bench.control():
            _, hello = await bench.connection()
            assert [report.state for report in hello.replicas] == [S.READY] * 3


async def test_usage_is_sent_until_it_is_acknowledged(bench: LinkBench) -> None:
    async with bench.agent():
        async with bench.control():
            messages, _ = await bench.connection()
            await messages.send(order())
            replica = await bench.launcher.launched()
            await replica.become(S.READY)
            await bench.until(S.READY)
            await bench.node.meter_once()
            first = await heard(messages, UsageBatch)
        async with bench.control():  # it went away before it stored them
            messages, _ = await bench.connection()
            again = await heard(messages, UsageBatch)
            assert again == first
            assert isinstance(again, UsageBatch)
            last = again.records[-1]
            await messages.send(UsageStored(node=NODE, source=last.source, sequence=last.sequence))
            replica.end(0)
            await until_state(messages, S.FAILED)
            await bench.node.meter_once()
            more = await heard(messages, UsageBatch)
            assert isinstance(more, UsageBatch)
            assert [record.sequence for record in more.records] == [last.sequence + 1]


async def test_more_than_a_batch_follows_each_acknowledgement(
    bench: LinkBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "PENDING_MAX", 2)
    async with bench.control(), bench.agent():
        messages, _ = await bench.connection()
        await messages.send(order())
        replica = await bench.launcher.launched()
        await replica.become(S.READY)
        await bench.until(S.READY)
        await bench.node.meter_once()
        first = await heard(messages, UsageBatch)
        assert isinstance(first, UsageBatch)
        assert [record.sequence for record in first.records] == [1, 2]
        await messages.send(UsageStored(node=NODE, source=first.records[0].source, sequence=2))
        rest = await heard(messages, UsageBatch)
        assert isinstance(rest, UsageBatch)
        assert [record.sequence for record in rest.records] == [3]
        replica.end(0)


async def test_nonsense_from_control_ends_the_connection_not_the_replicas(bench: LinkBench) -> None:
    async with bench.control(), bench.agent():
        stream_messages, _ = await bench.connection()
        await stream_messages.send(order())
        await (await bench.launcher.launched()).become(S.READY)
        await bench.until(S.READY)
        await stream_messages._stream.send(b"\xff\xff\xff\xff nonsense")
        _, hello = await bench.connection()
        assert [report.state for report in hello.replicas] == [S.READY]


async def test_a_refusal_ends_the_agent_and_says_why(bench: LinkBench) -> None:
    async def refused() -> None:
        async with bench.agent():
            messages, _ = await bench.connection()
            await messages.send(LinkRefused(error=ErrorBody(kind="protocol", message="too old", next_step="up")))
            await anyio.sleep_forever()

    async with bench.control():
        with pytest.raises(ExceptionGroup) as raised, anyio.fail_after(WAIT_S_MAX):
            await refused()
    leaf: BaseException = raised.value
    while isinstance(leaf, ExceptionGroup):
        leaf = leaf.exceptions[0]
    assert str(leaf) == "too old [control link]; up"

"""The node: orders, metering, pins, stop, with replicas and a data plane that the test plays."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from agent_helpers import CODE, MODEL, WAIT_S_MAX, Bench, FakeReplica, open_fds, order
from platform_helpers import NODE
from snowdrop.agent import node as node_module
from snowdrop.agent import sandboxed as sandboxed_module
from snowdrop.agent.node import Node
from snowdrop.domain.errors import ErrorBody, IntegrityError, ProtocolError
from snowdrop.domain.ids import NodeId, ReplicaId
from snowdrop.domain.replica import ReplicaState
from snowdrop.metering.journal import UsageJournal
from snowdrop.metering.meter import UsageDraft
from snowdrop.wire.control import DrainReplica, LinkRefused, UsageStored

pytestmark = pytest.mark.anyio
S = ReplicaState


class FaultyJournal(UsageJournal):
    """`broken` names the calls that fail as they do on a full disk."""

    broken: frozenset[str] = frozenset()

    def __init__(self, path: Path, node: NodeId) -> None:
        super().__init__(path, node)
        self.writing, self.may_write = threading.Event(), threading.Event()
        self.may_write.set()

    def check(self, name: str) -> None:
        if name in self.broken:
            raise sqlite3.OperationalError("database or disk is full")

    def append(self, drafts: list[UsageDraft]) -> None:
        self.check("append")
        self.writing.set()
        self.may_write.wait(WAIT_S_MAX)
        super().append(drafts)

    def forget(self, replica: ReplicaId) -> None:
        self.check("forget")
        super().forget(replica)

    def acknowledge(self, sequence: int) -> None:
        self.check("acknowledge")
        super().acknowledge(sequence)

    def pending(self) -> tuple:
        self.check("pending")
        return super().pending()


class NodeBench(Bench):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.journal = FaultyJournal(folder / "usage.db", NODE)
        self.node = Node(self.journal, usage_tick_s=0.001)
        self.on_change = self.node.on_change

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Inside, the node takes orders; afterwards the descriptors are as before."""
        before = open_fds()
        async with anyio.create_task_group() as tasks:
            self.node.bind(self.context, tasks)
            yield
            await self.node.stop(WAIT_S_MAX)
            tasks.cancel_scope.cancel()
        assert open_fds() == before

    async def start(self, replica: str = "rep-1", state: ReplicaState = S.READY) -> FakeReplica:
        await self.node.handle(order(replica))
        launched = await self.launcher.launched(replica)
        await launched.become(state)
        await self.until(state, replica)
        return launched

    async def gone(self, replica: str = "rep-1") -> None:
        with anyio.fail_after(WAIT_S_MAX):
            while self.node.is_living(replica):
                await anyio.lowlevel.checkpoint()

    def usage(self, unit: str) -> list[tuple[int, int]]:
        return [(r.from_unix_ns, r.to_unix_ns) for r in self.journal.pending() if r.unit == unit]

    def metered_whole(self, replica: str = "rep-1") -> bool:
        """Whether the replica's life is recorded without a gap and without an overlap."""
        (report,) = [r for r in self.node.reports() if r.key.replica == replica]
        times = [
            (r.from_unix_ns, r.to_unix_ns, r.quantity)
            for r in self.journal.pending()
            if r.unit == "replica_ns" and r.replica == replica
        ]
        starts, ends, _ = zip(*times, strict=True)
        return (
            starts == (report.started_unix_ns, *ends[:-1])
            and ends[-1] == report.ended_unix_ns
            and all(quantity == end - start for start, end, quantity in times)
        )


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[NodeBench]:
    made = NodeBench(tmp_path)
    yield made
    made.journal.close()


class TestOrders:
    async def test_an_order_twice_is_one_start(self, bench: NodeBench) -> None:
        async with bench.running():
            replica = await bench.start()
            await bench.node.handle(order())
            assert len(bench.node.reports()) == 1
            replica.end(0)
            await bench.gone()
            await bench.node.handle(order())  # control had not heard of its end yet
            assert not bench.node.is_living("rep-1")
        assert bench.states().count(S.MOUNTING) == 1

    async def test_living_and_ended_replicas_are_reported(self, bench: NodeBench) -> None:
        async with bench.running():
            first = await bench.start("rep-1")
            await bench.start("rep-2")
            first.end(1)
            await bench.gone("rep-1")
            reports = bench.node.reports()
            assert [(r.key.replica, r.state) for r in reports] == [("rep-1", S.FAILED), ("rep-2", S.READY)]
            assert reports[0].error is not None
            assert (reports[0].socket_path, bool(reports[1].socket_path)) == ("", True)
            await bench.node.handle(DrainReplica(replica=ReplicaId("rep-2"), reason="x", drain_s_max=1.0))
            bench.launcher.replicas["rep-2"].end(0)

    async def test_the_ended_are_remembered_in_bounds(
        self, bench: NodeBench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(node_module, "ENDED_KEPT_MAX", 2)
        bench.plane.errors[CODE] = IntegrityError("no")
        async with bench.running():
            for number in range(4):
                await bench.node.handle(order(f"rep-{number}"))
                await bench.gone(f"rep-{number}")
            assert [r.key.replica for r in bench.node.reports()] == ["rep-2", "rep-3"]

    async def test_a_drain_of_an_unknown_replica_is_nothing(self, bench: NodeBench) -> None:
        async with bench.running():
            await bench.node.handle(DrainReplica(replica=ReplicaId("rep-9"), reason="x", drain_s_max=1.0))
        assert bench.reports == []

    async def test_a_refusal_by_control_is_typed(self, bench: NodeBench) -> None:
        refusal = LinkRefused(error=ErrorBody(kind="protocol", message="version 1 needed", next_step="upgrade"))
        with pytest.raises(ProtocolError, match="version 1 needed"):
            await bench.node.handle(refusal)

    async def test_what_fails_one_replica_leaves_the_others(self, bench: NodeBench) -> None:
        async with bench.running():
            good = await bench.start("rep-1")
            bench.plane.errors = {CODE: RuntimeError("a bug"), MODEL: IntegrityError("wrong bytes")}
            await bench.node.handle(order("rep-2"))
            await bench.gone("rep-2")
            bench.plane.errors = {}
            stuck = await bench.start("rep-3")
            stuck.close_error = TimeoutError("stuck in the kernel")
            stuck.end(1)
            await bench.gone("rep-3")
            assert bench.node.is_living("rep-1")
            await bench.start("rep-4")
            for replica in (good, bench.launcher.replicas["rep-4"]):
                replica.end(0)
        assert sorted(bench.plane.released) == ["rep-1", "rep-2", "rep-4"], "rep-3 may still map its model"


class TestStop:
    async def test_every_replica_is_drained_and_no_order_is_taken(self, bench: NodeBench) -> None:
        async with bench.running():
            replicas = [await bench.start("rep-1"), await bench.start("rep-2")]
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(bench.node.stop, WAIT_S_MAX)
                for replica in replicas:
                    await replica.hear()
                    replica.end(0)
            await bench.node.handle(order("rep-3"))
            assert not bench.node.is_living("rep-3")
        assert [report.state for report in bench.node.reports()] == [S.STOPPED, S.STOPPED]

    async def test_one_that_does_not_end_is_not_waited_for_longer(self, bench: NodeBench) -> None:
        async with bench.running():
            replica = await bench.start()
            await bench.node.stop(0.005)
            assert bench.node.is_living("rep-1")
            replica.end(0)
        assert replica.closes == 1


class TestMetering:
    async def test_a_life_is_metered_once_over_ticks_and_its_end(self, bench: NodeBench) -> None:
        async with bench.running():
            replica = await bench.start()
            for _ in range(3):
                await bench.node.meter_once()
            replica.end(0)
            await bench.gone()
            for _ in range(2):
                await bench.node.meter_once()
        assert bench.metered_whole()
        assert len(bench.usage("replica_ns")) == 4
        assert {(r.detail, r.quantity) for r in bench.journal.pending() if r.unit == "content_bytes"} == {
            ("disk", 100),
            ("origin", 10),
        }
        assert len(bench.usage("content_bytes")) == 2
        assert bench.journal.metered_until(ReplicaId("rep-1")) == 0

    async def test_the_loop_meters_by_itself(self, bench: NodeBench) -> None:
        told = anyio.Event()
        bench.node.usage_ready = told.set
        async with bench.running(), anyio.create_task_group() as tasks:
            replica = await bench.start()
            tasks.start_soon(bench.node.meter)
            with anyio.fail_after(WAIT_S_MAX):
                await told.wait()
            replica.end(0)
            await bench.gone()
            tasks.cancel_scope.cancel()
        await bench.node.meter_once()
        assert bench.metered_whole()

    async def test_nothing_is_counted_twice_while_a_runner_cleans_up(self, bench: NodeBench) -> None:
        async with bench.running():
            replica = await bench.start()
            replica.close_hangs = True
            replica.end(1)
            await bench.until(S.FAILED)
            assert bench.node.is_living("rep-1")  # it still cleans up
            for _ in range(3):
                await bench.node.meter_once()
            assert len(bench.usage("replica_ns")) == 1
            assert len(bench.usage("content_bytes")) == 2
            replica.close_released.set()
            await bench.gone()
            await bench.node.meter_once()
        assert bench.metered_whole()
        assert len(bench.usage("content_bytes")) == 2

    async def test_a_full_disk_keeps_the_time_for_the_next_tick(self, bench: NodeBench) -> None:
        async with bench.running():
            replica = await bench.start()
            await bench.node.meter_once()
            bench.journal.broken = frozenset({"append"})
            await bench.node.meter_once()
            replica.end(0)
            await bench.gone()
            await bench.node.meter_once()
            bench.journal.broken = frozenset()
            await bench.node.meter_once()
        assert bench.metered_whole()
        assert len(bench.usage("replica_ns")) == 2
        assert len(bench.usage("content_bytes")) == 2

    async def test_a_tick_that_is_cancelled_loses_no_end(self, bench: NodeBench) -> None:
        async with bench.running():
            replica = await bench.start()
            replica.end(0)
            await bench.gone()
            with anyio.CancelScope() as scope:
                scope.cancel()
                await bench.node.meter_once()
            await bench.node.meter_once()
        assert bench.metered_whole()

    async def test_an_end_while_a_tick_is_written_is_in_the_next(self, bench: NodeBench) -> None:
        async with bench.running(), anyio.create_task_group() as tasks:
            first, second = await bench.start("rep-1"), await bench.start("rep-2")
            first.end(0)
            await bench.gone("rep-1")
            bench.journal.may_write.clear()
            tasks.start_soon(bench.node.meter_once)
            await anyio.to_thread.run_sync(bench.journal.writing.wait, WAIT_S_MAX)
            second.end(0)
            await bench.gone("rep-2")
            bench.journal.may_write.set()
        await bench.node.meter_once()
        assert bench.metered_whole("rep-1")
        assert bench.metered_whole("rep-2")

    @pytest.mark.parametrize("call", ["forget", "acknowledge", "pending"])
    async def test_a_journal_that_fails_elsewhere_ends_nobody(self, bench: NodeBench, call: str) -> None:
        async with bench.running():
            replica = await bench.start()
            replica.end(0)
            await bench.gone()
            bench.journal.broken = frozenset({call})
            await bench.node.meter_once()
            assert bool(await bench.node.usage_pending()) == (call != "pending")
            await bench.node.handle(UsageStored(node=NODE, source=bench.journal.source, sequence=1))
            bench.journal.broken = frozenset()
            await bench.node.meter_once()
        records = await bench.node.usage_pending()
        assert len(records) == (3 if call == "acknowledge" else 2)

    async def test_only_this_journals_records_are_acknowledged(self, bench: NodeBench) -> None:
        async with bench.running():
            replica = await bench.start()
            replica.end(0)
            await bench.gone()
            await bench.node.meter_once()
            await bench.node.handle(UsageStored(node=NODE, source="jrn-old", sequence=99))
            assert len(await bench.node.usage_pending()) == 3
            await bench.node.handle(UsageStored(node=NODE, source=bench.journal.source, sequence=2))
            assert [record.sequence for record in await bench.node.usage_pending()] == [3]


class TestPins:
    async def test_a_new_data_plane_is_asked_for_all_that_living_replicas_use(self, bench: NodeBench) -> None:
        async with bench.running():
            dead = await bench.start("rep-1")
            living = await bench.start("rep-2")
            dead.end(1)
            await bench.gone("rep-1")
            bench.plane.gates[CODE] = anyio.Event()
            await bench.node.handle(order("rep-3"))
            await bench.until(S.MOUNTING, "rep-3")
            bench.plane.gates.clear()
            bench.plane.ensured.clear()
            bench.plane.errors[CODE] = IntegrityError("gone from the origin")
            await bench.node.renew_pins(bench.plane)
            assert [e for e in bench.plane.ensured if e[1] == "rep-2"] == [
                (CODE, "rep-2", False),
                (MODEL, "rep-2", False),
            ]
            assert not [e for e in bench.plane.ensured if e[1] == "rep-1"]
            living.end(0)

    async def test_a_mount_that_cannot_be_removed_keeps_no_pin(
        self, bench: NodeBench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def hang(_holder: str) -> None:
            await anyio.sleep_forever()

        monkeypatch.setattr(bench.mounts, "release", hang)
        monkeypatch.setattr(sandboxed_module, "CLOSE_S_MAX", 0.05)
        async with bench.running():
            replica = await bench.start()
            replica.end(0)
            await bench.gone()
        assert bench.plane.released == ["rep-1"]

    async def test_content_that_takes_long_to_find_holds_up_no_other_replicas_pins(self, bench: NodeBench) -> None:
        async with bench.running():
            first = await bench.start("rep-1")
            second = await bench.start("rep-2")
            bench.plane.ensured.clear()
            bench.plane.gates[CODE] = gate = anyio.Event()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(bench.node.renew_pins, bench.plane)
                with anyio.fail_after(10):
                    while len(bench.plane.ensured) < 2:
                        await anyio.lowlevel.checkpoint()
                assert {holder for _, holder, _ in bench.plane.ensured} == {"rep-1", "rep-2"}
                gate.set()
            first.end(0)
            second.end(0)

    async def test_a_replica_that_ends_meanwhile_keeps_no_pin(self, bench: NodeBench) -> None:
        async with bench.running():
            replica = await bench.start()
            bench.plane.ensured.clear()
            bench.plane.gates[CODE] = gate = anyio.Event()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(bench.node.renew_pins, bench.plane)
                while not bench.plane.ensured:
                    await anyio.lowlevel.checkpoint()
                replica.end(0)
                await bench.gone()
                before = len(bench.plane.released)
                gate.set()
        assert bench.plane.ensured == [(CODE, "rep-1", False)]
        assert bench.plane.released[before:] == ["rep-1"]

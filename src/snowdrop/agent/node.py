"""The node: every replica on it, what they use, and what control is told of it."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.abc
import anyio.to_thread
import msgspec

from snowdrop.agent.context import NodeContext
from snowdrop.agent.dataplane.client import DataPlane
from snowdrop.agent.runner import ReplicaRunner
from snowdrop.domain.errors import ProtocolError, SnowdropError
from snowdrop.domain.ids import ReplicaId
from snowdrop.domain.replica import TERMINAL_STATES, ReplicaReport, ReplicaState
from snowdrop.domain.usage import UsageRecord
from snowdrop.metering.journal import UsageJournal, lost_usage
from snowdrop.metering.meter import UsageDraft, content_bytes, replica_time
from snowdrop.wire.control import DrainReplica, LinkRefused, StartReplica, ToAgent, UsageStored

ENDED_KEPT_MAX = 500
"""Ended replicas told again in each hello, so that a control that was away learns how they ended."""

log = logging.getLogger("snowdrop.agent")
Result = TypeVar("Result")


class Node:
    """Carries out control's orders and meters what runs. `changed` and `usage_ready` tell the link."""

    def __init__(self, journal: UsageJournal, *, usage_tick_s: float) -> None:
        self._journal = journal
        self._usage_tick_s = usage_tick_s
        self._runners: dict[ReplicaId, ReplicaRunner] = {}
        self._ended: dict[ReplicaId, ReplicaReport] = {}
        self._metered: dict[ReplicaId, int] = {}
        self._content_metered: set[ReplicaId] = set()
        self._unmetered_ends: list[ReplicaReport] = []
        self._context: NodeContext | None = None
        self._tasks: anyio.abc.TaskGroup | None = None
        self._stopping = False
        self._runner_gone = anyio.Event()
        self._one_write = anyio.CapacityLimiter(1)
        self.changed: Callable[[ReplicaReport], None] = _ignore
        self.usage_ready: Callable[[], None] = _nothing

    def bind(self, context: NodeContext, tasks: anyio.abc.TaskGroup) -> None:
        """Replicas run in `tasks` from now on."""
        self._context, self._tasks = context, tasks

    def reports(self) -> tuple[ReplicaReport, ...]:
        """Living replicas and the last that ended."""
        return (*self._ended.values(), *(runner.report for runner in self._runners.values()))

    def is_living(self, replica: str) -> bool:
        """Whether a replica still runs on this node."""
        return ReplicaId(replica) in self._runners

    def on_change(self, report: ReplicaReport) -> None:
        """Called by runners at each transition."""
        log.info("%s %s: %s", report.key.replica, report.state, report.reason)
        if report.state in TERMINAL_STATES:
            self._unmetered_ends.append(report)
        self.changed(report)

    async def handle(self, message: ToAgent) -> None:
        """Carries out one message of control."""
        if isinstance(message, StartReplica):
            self._start(message)
        elif isinstance(message, DrainReplica):
            runner = self._runners.get(message.replica)
            if runner is not None:
                runner.drain(message.reason, message.drain_s_max)
        elif isinstance(message, UsageStored):
            if message.source == self._journal.source:
                await self._acknowledge(message.sequence)
        elif isinstance(message, LinkRefused):
            raise ProtocolError(message.error.message, where="control link", next_step=message.error.next_step)

    async def renew_pins(self, plane: DataPlane) -> None:
        """A new data plane knows no pins: asks again for all that living replicas use, all at once.

        One whose content takes long to find holds up no other one, which might be evicted meanwhile.
        """
        async with anyio.create_task_group() as renewals:
            for runner in list(self._runners.values()):
                if runner.report.state is not ReplicaState.MOUNTING:  # its own requests fail or reach the new one
                    renewals.start_soon(self._renew_pins_of, runner, plane)

    async def _renew_pins_of(self, runner: ReplicaRunner, plane: DataPlane) -> None:
        order = runner.order
        for artefact in (order.revision.code, *(bound.artefact for bound in order.revision.models)):
            if runner.report.state in TERMINAL_STATES:
                break
            try:
                # The pin is what counts: a replica that still needs bytes asks for its area itself.
                await plane.ensure(
                    order.key.tenant,
                    artefact.manifest,
                    order.key.replica,
                    map_tensors=False,
                    lazy=artefact is not order.revision.code,
                    key_domain=artefact.key_domain,
                )
            except SnowdropError as error:
                log.warning("pins of %s: %s", order.key.replica, error)
        if runner.report.state in TERMINAL_STATES:
            await plane.release(order.key.replica)  # its own release may have come before the last pin

    async def meter(self) -> None:
        """Records the time since the last record, for ever."""
        while True:
            await anyio.sleep(self._usage_tick_s)
            await self.meter_once()

    async def meter_once(self) -> None:
        """Makes what ran since the last call durable; what cannot be written now is in the next record."""
        ends = tuple(self._unmetered_ends)  # taken off the list only once they are durable
        # An ended runner may still be cleaning up; its end is metered from `ends`, once.
        living = [
            r for r in (runner.report for runner in self._runners.values()) if r.state not in TERMINAL_STATES
        ]
        seen = {report.key.replica: report for report in [*living, *ends]}
        now_unix_ns = time.time_ns()
        drafts: list[UsageDraft] = []
        for replica, report in seen.items():
            until = self._metered.get(replica, 0)
            draft = replica_time(report, metered_until_unix_ns=until, now_unix_ns=now_unix_ns)
            if draft is not None:
                drafts.append(draft)
            if replica not in self._content_metered and report.content.total:
                drafts += content_bytes(
                    report.key, report.content, from_unix_ns=report.started_unix_ns, to_unix_ns=now_unix_ns
                )
        if drafts:
            try:
                await self._write(self._journal.append, drafts)
            except sqlite3.Error as error:
                log.warning("%s", lost_usage(error))
                return
        for draft in drafts:
            if draft.unit == "replica_ns":
                self._metered[draft.key.replica] = draft.to_unix_ns
            else:
                self._content_metered.add(draft.key.replica)
        del self._unmetered_ends[: len(ends)]
        for report in ends:
            self._metered.pop(report.key.replica, None)
            self._content_metered.discard(report.key.replica)
        if drafts:
            self.usage_ready()
        await self._forget(ends)

    async def usage_pending(self) -> tuple[UsageRecord, ...]:
        """What control has not confirmed; none while the journal cannot be read."""
        try:
            return await self._write(self._journal.pending)
        except sqlite3.Error as error:
            log.warning("usage journal: %s; it is read again with the next record", error)
            return ()

    async def stop(self, stop_s_max: float) -> None:
        """Drains every replica within the bound and records the end of each."""
        self._stopping = True
        for runner in self._runners.values():
            runner.drain("the agent stops", stop_s_max)
        with anyio.move_on_after(stop_s_max):
            while self._runners:
                self._runner_gone = anyio.Event()
                await self._runner_gone.wait()

    def _start(self, order: StartReplica) -> None:
        if self._tasks is None or self._context is None:
            raise ProtocolError("an order came before the node was ready", where="agent")
        known = order.key.replica in self._runners or order.key.replica in self._ended
        if known or self._stopping:
            return
        runner = ReplicaRunner(order, self._context)
        self._runners[order.key.replica] = runner
        self._tasks.start_soon(self._run, runner, name=order.key.replica)

    async def _run(self, runner: ReplicaRunner) -> None:
        replica = runner.order.key.replica
        try:
            await runner.run()
        finally:
            del self._runners[replica]
            self._runner_gone.set()
            self._ended[replica] = _short(runner.report)
            while len(self._ended) > ENDED_KEPT_MAX:
                del self._ended[next(iter(self._ended))]

    async def _acknowledge(self, sequence: int) -> None:
        try:
            await self._write(self._journal.acknowledge, sequence)
        except sqlite3.Error as error:
            log.warning("usage journal: %s; the records are sent again, and control knows them", error)

    async def _forget(self, ends: tuple[ReplicaReport, ...]) -> None:
        try:
            for report in ends:
                await self._write(self._journal.forget, report.key.replica)
        except sqlite3.Error as error:
            log.warning("usage journal: %s; marks of ended replicas stay in it, harmless", error)

    async def _write(self, work: Callable[..., Result], *arguments: object) -> Result:
        # One connection, one thread at a time: transactions must not interleave, and nothing may be read
        # that is not committed, or a number could be sent that is later given to another record.
        return await anyio.to_thread.run_sync(work, *arguments, limiter=self._one_write)


def _short(report: ReplicaReport) -> ReplicaReport:
    """An ended replica without what only a living one needs."""
    return msgspec.structs.replace(report, socket_path="")


def _ignore(_report: ReplicaReport) -> None:
    return None


def _nothing() -> None:
    return None

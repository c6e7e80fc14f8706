"""One replica on this node, from the order to the end: feeds the transition table and carries out what it says.

The loop is `wait for an event -> step the table -> carry out`; slow work (content, launch, waiting for the
process) runs in tasks of the same group and posts events. Every state that could last has a bound.
"""

from __future__ import annotations

import logging
import math
import time

import anyio
import anyio.abc
import msgspec

from snowdrop.agent.calls import CallDoor
from snowdrop.agent.context import NodeContext
from snowdrop.agent.handing import redacted, redactor_of
from snowdrop.agent.sandbox.forked import FORKED
from snowdrop.agent.sandboxed import Sandboxed, replica_content
from snowdrop.agent.traces import ReplicaTraces
from snowdrop.domain.errors import ErrorBody, ReplicaDiedError, SnowdropError, TimedOutError
from snowdrop.domain.receipt import ContentBytes, Span
from snowdrop.domain.replica import TERMINAL_STATES, ReplicaReport, ReplicaState
from snowdrop.policy.lifecycle import Event, Instruction, ReplicaMachine, fail, step
from snowdrop.wire.control import StartReplica
from snowdrop.wire.replica import (
    Booted,
    Drained,
    FromReplica,
    Imported,
    OpenCall,
    Ready,
    RenewModel,
    SpansDone,
    StageFailed,
    WaitForDirectory,
)

log = logging.getLogger("snowdrop.agent")

EVENTS_MAX = 64
KILL_GRACE_S = 5.0
"""How long after its own drain bound a replica may take to say so before it is killed."""
TURN_SHOWN_NS = 1_000_000
"""Shorter waits for a turn are not worth a line of a receipt."""


class Happened(msgspec.Struct, frozen=True, kw_only=True):
    """An event with its reason and, for failures, the error that callers will see."""

    event: Event
    reason: str
    error: ErrorBody | None = None


class ReplicaRunner:
    """See the module. `run` ends when the replica has ended and nothing of it is left on the node."""

    def __init__(self, order: StartReplica, context: NodeContext) -> None:
        self.order = order
        self._context = context
        self._machine = ReplicaMachine()
        self._send, self._events = anyio.create_memory_object_stream[Happened](EVENTS_MAX)
        self._sandboxed = Sandboxed(order, context)
        self._call_door = CallDoor(context.calls, order)
        self._traces = ReplicaTraces(context.tracing, order.key)
        self._content_scope = anyio.CancelScope()
        self._says_ready = anyio.Event()
        self._is_filled = anyio.Event()
        self._spans: list[Span] = []
        self._content = ContentBytes()
        self._error: ErrorBody | None = None
        self._started_unix_ns = time.time_ns()
        self._launched_unix_ns = 0
        self._turn = 0
        self._ended_unix_ns = 0
        self._drain_s_max = order.revision.spec.drain_s_max
        self._entered_s = time.monotonic()
        self._cut_off = ""

    @property
    def report(self) -> ReplicaReport:
        """The replica as it is now, whole."""
        return ReplicaReport(
            key=self.order.key,
            node=self._context.node,
            state=self._machine.state,
            reason=self._machine.reason,
            version=self._machine.version,
            socket_path=str(self._context.socket_path(self.order.key)),
            history=self._machine.history,
            spans=tuple(self._spans),
            content=self._content,
            error=self._error,
            sandbox=self._sandboxed.describe,
            started_unix_ns=self._started_unix_ns,
            ended_unix_ns=self._ended_unix_ns,
            concurrency=self.order.revision.spec.concurrency,
            drain_s_max=self.order.revision.spec.drain_s_max,
            resources=self.order.revision.spec.resources,
        )

    def drain(self, reason: str, drain_s_max: float) -> None:
        """Orders the replica to end; harmless if it is ending already."""
        self._drain_s_max = drain_s_max
        self._post(Happened(event=Event.DRAIN_ORDERED, reason=reason))

    async def run(self) -> None:
        try:
            async with anyio.create_task_group() as tasks:
                await self._apply(Happened(event=Event.MOUNT_BEGUN, reason="ordered by control"), tasks)
                while self._machine.state not in TERMINAL_STATES:
                    await self._apply(await self._next(), tasks)
                tasks.cancel_scope.cancel()
        except Exception as error:  # noqa: BLE001 -- a bug met by one replica must not end the node's others
            self._crash(error)
        finally:
            self._send.close()
            self._events.close()
            await self._sandboxed.close()

    def _crash(self, error: Exception) -> None:
        """Something that no table foresees: the replica fails, and the log has the whole story."""
        log.exception("replica %s failed inside the agent", self.order.key.replica, exc_info=error)
        if self._machine.state in TERMINAL_STATES:
            return
        cause = _first_cause(error)
        if not isinstance(cause, SnowdropError):
            cause = SnowdropError(
                f"internal error of the agent: {type(cause).__name__}",
                where=f"replica {self.order.key.replica}",
                next_step="please report it with the agent's log",
            )
        self._error = cause.body()
        self._machine = fail(self._machine, reason=str(cause), now_unix_ns=time.time_ns())
        self._ended_unix_ns = time.time_ns()
        self._context.on_change(self.report)

    # --- the loop -----------------------------------------------------------------------------------------

    async def _next(self) -> Happened:
        """The next event, or BOUND_EXCEEDED when the state's time is over."""
        name, bound_s = self._bound()
        # Again if the time began anew meanwhile: a replica that waits for its turn has not begun to start.
        while (left_s := self._entered_s + bound_s - time.monotonic()) > 0:
            with anyio.move_on_after(left_s if bound_s < math.inf else None):
                return await self._events.receive()
        error = TimedOutError(
            f"replica was {self._machine.state} for more than {bound_s:g} s",
            where=f"{name}={bound_s:g}",
            next_step=f"raise {name}, or see `snowdrop logs {self.order.key.deployment}` for what it was doing",
        )
        self._entered_s = time.monotonic()
        return Happened(event=Event.BOUND_EXCEEDED, reason=str(error), error=error.body())

    def _bound(self) -> tuple[str, float]:
        spec = self.order.revision.spec
        state = self._machine.state
        if state is ReplicaState.MOUNTING:
            return "agent.content_s_max", self._context.settings.content_s_max
        if state is ReplicaState.STARTING:
            return "import_s_max", spec.import_s_max
        if state is ReplicaState.LOADING:
            return "startup_s_max", spec.startup_s_max
        if state is ReplicaState.DRAINING:
            return "drain_s_max", self._drain_s_max + KILL_GRACE_S
        return "", math.inf

    async def _apply(self, happened: Happened, tasks: anyio.abc.TaskGroup) -> None:
        before = self._machine
        self._machine, instructions = step(
            before, happened.event, reason=happened.reason, now_unix_ns=time.time_ns()
        )
        if happened.event is Event.BOUND_EXCEEDED and self._machine.state is ReplicaState.DRAINING:
            self._cut_off = f", drain_s_max={self._drain_s_max:g} being over"
        if self._machine is not before:
            self._entered_s = time.monotonic()
            if self._machine.state is ReplicaState.FAILED:
                self._error = happened.error
            if self._machine.state in TERMINAL_STATES:
                self._ended_unix_ns = time.time_ns()
            self._context.on_change(self.report)
        for instruction in instructions:
            await self._carry_out(instruction, tasks)

    async def _carry_out(self, instruction: Instruction, tasks: anyio.abc.TaskGroup) -> None:
        if instruction is Instruction.ENSURE_CONTENT:
            tasks.start_soon(self._ensure_content)
        elif instruction is Instruction.CANCEL_CONTENT:
            self._content_scope.cancel()
        elif instruction is Instruction.LAUNCH:
            tasks.start_soon(self._launch)
        elif instruction is Instruction.SEND_DRAIN:
            await self._sandboxed.send_drain(self._drain_s_max)
        elif instruction is Instruction.KILL:
            self._sandboxed.kill()
        # CLEAN_UP: the loop ends in a terminal state and `run` closes everything.

    def _post(self, happened: Happened) -> None:
        try:
            self._send.send_nowait(happened)
        except (anyio.ClosedResourceError, anyio.BrokenResourceError):
            return  # the replica has ended; whatever happened after is of no interest

    # --- the work -----------------------------------------------------------------------------------------

    async def _ensure_content(self) -> None:
        with self._content_scope:
            try:
                landed = await replica_content(self.order, self._context, self._sandboxed)
            except SnowdropError as error:
                self._post(Happened(event=Event.CONTENT_FAILED, reason=str(error), error=error.body()))
                return
            self._content = landed.content
            self._spans.extend(landed.spans)
            self._post(Happened(event=Event.CONTENT_LANDED, reason="content is on the node"))
            await self._wait_filled()

    async def _wait_filled(self) -> None:
        """Until the models' areas are filled, which goes on while the replica starts."""
        try:
            landed = await self._sandboxed.filled(self._says_ready)
        except SnowdropError as error:
            self._post(Happened(event=Event.STAGE_FAILED, reason=str(error), error=error.body()))
            return
        self._content += landed.content
        self._spans.extend(landed.spans)
        self._is_filled.set()

    async def _serve(self) -> None:
        """Ready counts once it is known where its content came from: the receipt is made of it."""
        self._says_ready.set()
        await self._is_filled.wait()
        self._post(Happened(event=Event.SERVING, reason="startup is done"))

    async def _launch(self) -> None:
        self._launched_unix_ns = time.time_ns()
        self._spans.append(
            Span(name="mount", start_unix_ns=self._started_unix_ns, end_unix_ns=self._launched_unix_ns)
        )
        await self._take_turn()
        try:
            await self._sandboxed.launch()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._sandboxed.keep_log)
                tasks.start_soon(self._read)
                tasks.start_soon(self._wait_exit)
        except SnowdropError as error:
            self._post(Happened(event=Event.LAUNCH_FAILED, reason=str(error), error=error.body()))
        finally:
            self._context.turns.give_back(self._turn)

    async def _take_turn(self) -> None:
        self._turn = await self._context.turns.take()
        now_unix_ns = time.time_ns()
        if now_unix_ns - self._launched_unix_ns > TURN_SHOWN_NS:
            self._spans.append(
                Span(
                    name="turn",
                    start_unix_ns=self._launched_unix_ns,
                    end_unix_ns=now_unix_ns,
                    parent="start",
                    note="others began",
                )
            )
        self._entered_s = time.monotonic()

    async def _read(self) -> None:
        async with anyio.create_task_group() as tasks:
            async for message in self._sandboxed.messages():
                self._hear(message, tasks)

    def _hear(self, message: FromReplica, tasks: anyio.abc.TaskGroup) -> None:
        if isinstance(message, Booted):
            start = Span(
                name="start",
                start_unix_ns=self._launched_unix_ns,
                end_unix_ns=message.unix_ns,
                note=FORKED if self._sandboxed.describe.startswith(FORKED) else "",
            )
            self._spans.append(start)
        elif isinstance(message, Imported):
            self._context.turns.give_back(self._turn)
            self._spans.extend(message.spans)
            self._post(Happened(event=Event.IMPORTED, reason="imports are done"))
        elif isinstance(message, Ready):
            self._spans.extend(message.spans)
            tasks.start_soon(self._serve)
        elif isinstance(message, StageFailed):
            error = redacted(message.error, redactor_of(self.order))
            reason = f"{message.stage}: {error.message} ({error.where})"
            self._post(Happened(event=Event.STAGE_FAILED, reason=reason, error=error))
        elif isinstance(message, WaitForDirectory):
            tasks.start_soon(self._sandboxed.answer_directory, message.model)
        elif isinstance(message, RenewModel):
            tasks.start_soon(self._sandboxed.answer_renewal, message.model)
        elif isinstance(message, OpenCall):
            tasks.start_soon(self._call_door.answer, message.number, self._sandboxed.tell)
        elif isinstance(message, SpansDone):
            self._traces.finished(message)
        elif isinstance(message, Drained):
            pass  # its exit follows and closes the case

    async def _wait_exit(self) -> None:
        status = await self._sandboxed.wait()
        error = ReplicaDiedError(
            f"the replica's process {status}",
            where=f"replica {self.order.key.replica}",
            next_step=f"`snowdrop logs {self.order.key.deployment}` shows its last words",
        )
        self._post(Happened(event=Event.EXITED, reason=f"process {status}{self._cut_off}", error=error.body()))


def _first_cause(error: Exception) -> Exception:
    """The first error in the groups that task groups make."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error

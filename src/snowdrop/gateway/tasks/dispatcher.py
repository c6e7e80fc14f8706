"""Leases tasks from control and carries each as an ordinary call, under slots and bounds like any other.

An answer that control cannot take now is kept and told again; control refuses it if the lease has ended meanwhile
and the task runs elsewhere, so that a task ends once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import anyio.abc
from multidict import CIMultiDict

from snowdrop.domain.errors import ConflictError, NotFoundError, PlatformDownError, SnowdropError
from snowdrop.domain.settings import TaskSettings
from snowdrop.gateway.call import Body, Call, Caller, WaitOptions, WholeBody
from snowdrop.gateway.carrier import Carrier
from snowdrop.gateway.relay import fresh_request_id
from snowdrop.gateway.tasks.client import TaskControl
from snowdrop.gateway.tasks.outcome import answered, failed
from snowdrop.gateway.tasks.spool import SpoolSink
from snowdrop.wire.tasks import LeasedTask, LeaseName, TaskEnd

AWAY_S = 0.2
"""Pause before control is asked again after it did not answer."""
REPORT_S_MAX = 600.0
"""How long an answer is held for a control that is away. Then it is given up, and the task runs again."""
HAND_BACK_S_MAX = 2.0
KEEPS_PER_LEASE = 3
LEAST_PRIORITY = -(1 << 30)
"""As low as the deployment allows (`queue.priority_min`): somebody waits for other requests."""
log = logging.getLogger("snowdrop.gateway")


class StoredBody:
    """A request's body that lies at control; it can be read again for each attempt at a replica."""

    def __init__(self, control: TaskControl, name: LeaseName) -> None:
        self.whole: bytes | None = None
        self.received_bytes = 0
        self._control = control
        self._name = name
        self.refused: SnowdropError | None = None

    async def stream(self) -> AsyncIterator[bytes]:
        try:
            self.received_bytes = 0
            async for chunk in self._control.body(self._name):
                self.received_bytes += len(chunk)
                yield chunk
        except SnowdropError as error:
            self.refused = error
            raise


class Dispatcher:
    """One per gateway, in the process of the queues' owner."""

    def __init__(
        self, control: TaskControl, carrier: Carrier, settings: TaskSettings, *, holder: str, spool: Path
    ) -> None:
        self._control = control
        self._carrier = carrier
        self._settings = settings
        self._holder = holder
        self._spool = spool
        self._running: dict[LeaseName, anyio.CancelScope] = {}
        self._revoked: set[LeaseName] = set()
        self._room = anyio.Event()
        self._emptied = anyio.Event()

    async def run(self, *, shutdown_s_max: float) -> None:
        """Works until it is cancelled. What runs then has `shutdown_s_max` to end, and goes back to control."""
        self._spool.mkdir(parents=True, exist_ok=True, mode=0o700)
        stopping = anyio.Event()
        async with anyio.create_task_group() as watching:
            watching.start_soon(_tell_when_cancelled, stopping)
            with anyio.CancelScope(shield=True):
                async with anyio.create_task_group() as carrying:
                    carrying.start_soon(self._keep)
                    async with anyio.create_task_group() as asking:
                        asking.start_soon(self._ask, carrying)
                        await stopping.wait()
                        asking.cancel_scope.cancel()
                    await self._drain(shutdown_s_max)
                    carrying.cancel_scope.cancel()

    async def _drain(self, shutdown_s_max: float) -> None:
        with anyio.move_on_after(shutdown_s_max):
            while self._running:
                self._emptied = anyio.Event()
                await self._emptied.wait()
        for scope in self._running.values():
            scope.cancel()
        with anyio.move_on_after(HAND_BACK_S_MAX):
            while self._running:
                self._emptied = anyio.Event()
                await self._emptied.wait()

    async def _ask(self, carrying: anyio.abc.TaskGroup) -> None:
        """Asks for tasks, for ever; without room only for what is revoked."""
        while True:
            room = self._settings.running_max - len(self._running)
            try:
                told = await self._control.lease(self._holder, max(0, room))
            except SnowdropError as error:
                if not isinstance(error, PlatformDownError):
                    log.warning("no tasks can be leased: %s", error)
                await anyio.sleep(AWAY_S)
                continue
            for name in told.revoked:
                self._revoke(name)
            for leased in told.tasks:
                name = _name_of(leased)
                self._running[name] = anyio.CancelScope()
                carrying.start_soon(self._carry, name, leased)
            if room <= 0 and not told.revoked:
                self._room = anyio.Event()
                with anyio.move_on_after(self._settings.lease_s):
                    await self._room.wait()

    async def _keep(self) -> None:
        """Says several times in the time of a lease that the tasks are still held."""
        while True:
            await anyio.sleep(self._settings.lease_s / KEEPS_PER_LEASE)
            if not self._running:
                continue
            try:
                for name in await self._control.keep(self._holder, tuple(self._running)):
                    self._revoke(name)
            except SnowdropError as error:
                log.debug("leases cannot be kept now: %s", error)

    def _revoke(self, name: LeaseName) -> None:
        scope = self._running.get(name)
        if scope is not None:
            self._revoked.add(name)
            scope.cancel()

    async def _carry(self, name: LeaseName, leased: LeasedTask) -> None:
        scope = self._running[name]
        try:
            with SpoolSink(self._spool, self._settings.result_bytes_max) as sink:
                end: TaskEnd | None = None
                with scope:
                    end = await self._attempt(name, leased, sink)
                    await self._report(name, end, sink, REPORT_S_MAX)
                if scope.cancelled_caught and name not in self._revoked:
                    # The gateway stops: an answer that is there is told, anything else is for another gateway.
                    with anyio.CancelScope(shield=True):
                        await self._report(name, end or TaskEnd(started=False), sink, HAND_BACK_S_MAX)
        finally:
            del self._running[name]
            self._revoked.discard(name)
            self._room.set()
            self._emptied.set()

    async def _attempt(self, name: LeaseName, leased: LeasedTask, sink: SpoolSink) -> TaskEnd:
        call = self._call(name, leased)
        try:
            await self._carrier.carry(call, sink)
        except SnowdropError as error:
            return failed(call, error)
        if sink.error is not None:
            return failed(call, sink.error)
        return answered(call, sink.status, sink.headers)

    def _call(self, name: LeaseName, leased: LeasedTask) -> Call:
        task = leased.task
        body: Body = StoredBody(self._control, name)
        if leased.body is not None:
            body = WholeBody(leased.body)
        headers: CIMultiDict[str] = CIMultiDict(task.call.headers)
        request_id = headers.setdefault("x-request-id", fresh_request_id())
        headers["x-forwarded-prefix"] = f"/{task.deployment}"
        headers["snowdrop-task"], headers["snowdrop-attempt"] = task.id, str(task.attempts)
        now = time.time()
        return Call(
            deployment=task.deployment,
            method=task.call.method,
            target=task.call.path,
            headers=headers,
            body=body,
            caller=Caller(tenant=task.tenant, label="tasks"),
            request_id=request_id,
            arrived_unix_ns=time.time_ns(),
            wait=WaitOptions(priority=LEAST_PRIORITY),
            deadline_unix_s=now + task.attempt_s_max if task.attempt_s_max else None,
            kind="task",
        )

    async def _report(self, name: LeaseName, end: TaskEnd, sink: SpoolSink, s_max: float) -> None:
        """Until control has taken it, refused it, or the time is over."""
        with anyio.move_on_after(s_max):
            while True:
                try:
                    await self._control.finish(name, end, sink.read() if end.status else None)
                except (ConflictError, NotFoundError) as error:
                    log.info("the answer of task %s comes too late: %s", name.task, error)
                except SnowdropError as error:
                    if not error.retryable:
                        log.warning("the answer of task %s is not taken: %s", name.task, error)
                        return
                    await anyio.sleep(AWAY_S)
                    continue
                return
        log.warning("the answer of task %s is given up: control was away for too long", name.task)


async def _tell_when_cancelled(stopping: anyio.Event) -> None:
    try:
        await anyio.sleep_forever()
    finally:
        stopping.set()


def _name_of(leased: LeasedTask) -> LeaseName:
    task = leased.task
    return LeaseName(tenant=task.tenant, task=task.id, generation=task.generation)

"""The queue of tasks: what is due, who holds what, what is over.

The store has the truth; what lies here is built from it when control starts. A lease's end is counted on this
process's own clock: after a restart each lease has its whole time again, in which its gateway can speak.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from random import Random

import anyio

from snowdrop.control.loop import ControlLoop
from snowdrop.control.tasks.files import INLINE_BYTES_MAX, StoredBody, TaskFiles
from snowdrop.control.tasks.leases import Leases, Name
from snowdrop.domain.errors import ConflictError, NotFoundError, SnowdropError, StorageFullError
from snowdrop.domain.ids import DeploymentName, TaskId, TenantId, fresh_id
from snowdrop.domain.replica import ReplicaState
from snowdrop.domain.settings import TaskSettings
from snowdrop.domain.task import Task, TaskAnswer, TaskCall, TaskState, Webhook
from snowdrop.policy import tasks as policy
from snowdrop.policy.tasks import Event, Happening, step
from snowdrop.state.tasks import DeploymentKey, unknown_task
from snowdrop.wire.tasks import LeaseAnswer, LeasedTask, LeaseName, NewTask, TaskEnd

LOOK_S = 0.1
IDLE_LOOK_S = 1.0
TRIM_S = 60.0
EXPIRED_MAX = 500
TRIM_MAX = 1_000
LEASED_AT_ONCE_MAX = 100
"""Tasks in one answer to a gateway: with bodies of INLINE_BYTES_MAX, a few megabytes."""

log = logging.getLogger("snowdrop.control")
_spread = Random()  # noqa: S311 -- spreads pauses


class TaskQueue:
    """One per control process. `ended` and `attempted` are told what happens, for metrics."""

    def __init__(
        self,
        loop: ControlLoop,
        files: TaskFiles,
        settings: TaskSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.store = loop.state.tasks
        self.files = files
        self.settings = settings
        self.changed: Callable[[Task, Event], None] = lambda _task, _event: None
        self._loop = loop
        self._clock = clock
        self._wall_ns = wall_ns
        self.leases = Leases(settings.lease_s, clock)
        self._watched: dict[Name, list[anyio.Event]] = {}
        self._work = anyio.Event()
        self._hooks = anyio.Event()
        self._stored_bytes = 0
        self._turn = 0
        self._edits = 0

    # --- what people ask ----------------------------------------------------------------------------------

    async def submit(self, tenant: TenantId, new: NewTask, body: StoredBody, name: TaskId) -> tuple[Task, bool]:
        """A new task, durable when this returns, or the one that its idempotency key made before, and False.

        NotFoundError if there is no such deployment: most likely it is spelled otherwise.
        """
        if (tenant, DeploymentName(new.deployment)) not in self._loop.world.deployments:
            raise NotFoundError(
                f"there is no deployment {new.deployment!r}",
                where="deployment",
                next_step="`snowdrop ps` lists deployments",
            )
        await self._make_room(body.size_bytes)
        now = self._wall_ns()
        due = now + int(new.delay_s * 1e9)
        ttl_s = self.settings.ttl_s if new.ttl_s is None else new.ttl_s
        task = Task(
            tenant=tenant,
            id=name,
            deployment=DeploymentName(new.deployment),
            call=TaskCall(
                method=new.method,
                path=new.path,
                headers=tuple(new.headers.items()),
                body_bytes=body.size_bytes,
                body_sha256=body.sha256,
            ),
            submitted_unix_ns=now,
            due_unix_ns=due,
            expires_unix_ns=due + int(ttl_s * 1e9),
            attempts_max=new.attempts_max or self.settings.attempts_max,
            attempt_s_max=new.timeout_s,
            webhook=Webhook(url=new.webhook) if new.webhook else None,
            idempotency_key=new.idempotency_key,
        )
        with anyio.CancelScope(shield=True):  # what is stored is counted, also for a client that goes away now
            stored, is_new = await self.store.submit(task, body.inline, waiting_max=self.settings.waiting_max)
            if is_new:
                self._stored_bytes += body.size_bytes
                if due <= now:
                    self._count((tenant, task.deployment), 1)
                self._wake()
        return stored, is_new

    async def get(self, tenant: TenantId, name: TaskId, *, wait_s: float = 0.0) -> Task:
        """The task; with `wait_s` once it has ended, or as it is when that time is over. NotFoundError."""
        event = anyio.Event()
        watchers = self._watched.setdefault((tenant, name), [])
        watchers.append(event)
        try:
            task = await self._known(tenant, name)
            with anyio.move_on_after(wait_s):
                while not task.ended:
                    await event.wait()
                    watchers.remove(event)
                    event = anyio.Event()
                    watchers.append(event)
                    task = await self._known(tenant, name)
            return task
        finally:
            watchers.remove(event)
            if not watchers:
                self._watched.pop((tenant, name), None)

    async def cancel(self, tenant: TenantId, name: TaskId) -> Task:
        """Ends it; one that runs is cancelled where it runs. One that has ended stays as it is."""
        return await self._change(tenant, name, Happening(event=Event.CANCELLED, now_unix_ns=self._wall_ns()))

    async def redrive(self, tenant: TenantId, name: TaskId) -> Task:
        """A failed or cancelled task is queued anew. ConflictError for others."""
        before = await self._known(tenant, name)
        happened = Happening(event=Event.REDRIVEN, now_unix_ns=self._wall_ns(), ttl_s=self.settings.ttl_s)
        task = await self._change(tenant, name, happened)
        if before.answer is not None:
            self.files.drop(task, request=False, generation=before.answer.generation)
        return task

    # --- gateways -----------------------------------------------------------------------------------------

    async def lease(self, holder: str, room: int, *, poll_s: float) -> LeaseAnswer:
        """Tasks for a gateway as soon as there are some for free slots, or what it holds no more."""
        taken: list[LeasedTask] = []
        with anyio.move_on_after(poll_s):
            while not taken and not self.leases.has_news(holder):
                work = self._work
                taken = await self._lease_now(holder, min(room, LEASED_AT_ONCE_MAX))
                if taken:
                    break
                # Slots come free without a word to this queue, so it looks again soon while something is due.
                with anyio.move_on_after(LOOK_S if self._loop.world.tasks_due else IDLE_LOOK_S):
                    await work.wait()
        return LeaseAnswer(tasks=tuple(taken), revoked=self.leases.take_news(holder))

    async def finish(self, name: LeaseName, end: TaskEnd, body: StoredBody | None) -> Task:
        """How an attempt ended. ConflictError if its lease has ended meanwhile; then nothing has changed."""
        answer: TaskAnswer | None = None
        if body is not None:
            answer = TaskAnswer(
                status=end.status, headers=end.headers, body_bytes=body.size_bytes, generation=name.generation
            )
        event = Event.SUCCEEDED if answer is not None and end.status < 400 else Event.FAILED
        if not end.started:
            event = Event.HANDED_BACK
        happened = Happening(
            event=event,
            now_unix_ns=self._wall_ns(),
            generation=name.generation,
            answer=answer,
            error=end.error,
            retryable=end.retryable,
            retry_after_s=end.retry_after_s,
            draw=_spread.random(),
        )
        task = await self._change(name.tenant, name.task, happened, result=body.inline if body else None)
        if task.answer is None and body is not None:
            body.drop()
        elif body is not None:
            self._stored_bytes += body.size_bytes
        return task

    # --- the loop -----------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Builds what lies in memory from the store."""
        swept = await self.files.sweep(self.store)
        if swept:
            log.info("removed %d bodies that no task names", swept)
        for task in await self.store.running():
            self.leases.hold(task)
        self._stored_bytes = await self.store.stored_bytes()
        await self._recount()

    async def run(self) -> None:
        """For ever: ends leases that ran out and tasks that came too late, drops old ones, counts what is due."""
        trimmed_s = self._clock() - TRIM_S
        while True:
            try:
                await self.look()
                if self._clock() - trimmed_s >= TRIM_S:
                    trimmed_s = self._clock()
                    await self.trim()
            except SnowdropError as error:
                log.warning("tasks are looked at again later: %s", error)
            await anyio.sleep(IDLE_LOOK_S)

    async def look(self) -> None:
        """One iteration."""
        for name, held in self.leases.over():
            happened = Happening(
                event=Event.LEASE_LOST,
                now_unix_ns=self._wall_ns(),
                generation=held.generation,
                draw=_spread.random(),
            )
            try:
                await self._change(*name, happened)
            except (ConflictError, NotFoundError):  # it ended in this very moment
                self.leases.end(name, held.generation, tell=False)
        expired = Happening(event=Event.EXPIRED, now_unix_ns=self._wall_ns())
        for task in await self.store.expired(expired.now_unix_ns, limit=EXPIRED_MAX):
            try:
                await self._change(task.tenant, task.id, expired)
            except ConflictError:  # it was leased in this very moment
                continue
        await self._recount()

    async def trim(self, *, spare_bytes: int = 0) -> None:
        """Drops ended tasks that are too old or too many, and their files; more of them for `spare_bytes`."""
        settings = self.settings
        while True:
            gone = await self.store.trim(
                ended_before_unix_ns=self._wall_ns() - int(settings.kept_s * 1e9),
                tasks_max=settings.kept_max,
                bytes_max=settings.stored_bytes_max - spare_bytes,
                limit=TRIM_MAX,
            )
            for task in gone:
                self.files.drop(task, request=True, generation=task.answer.generation if task.answer else 0)
            if len(gone) < TRIM_MAX:
                break
        self._stored_bytes = await self.store.stored_bytes()
        for task in await self.store.running():
            if (task.tenant, task.id) not in self.leases:  # nobody would ever end it
                self.leases.hold(task)

    def ring_hooks(self) -> None:
        """A webhook may be due, or may be sent now."""
        self._hooks.set()
        self._hooks = anyio.Event()

    async def wait_hooks(self, wait_s_max: float) -> None:
        """Until a task with a webhook has ended, or the time is over."""
        event = self._hooks
        with anyio.move_on_after(wait_s_max):
            await event.wait()

    @property
    def kept_bytes(self) -> int:
        return self._stored_bytes

    # --- inside -------------------------------------------------------------------------------------------

    async def _lease_now(self, holder: str, room: int) -> list[LeasedTask]:
        """Deployments take turns, so that one with a million tasks does not keep the others waiting."""
        due = sorted(self._loop.world.tasks_due)
        leased, taken = self.leases.counts(), list[LeasedTask]()
        self._turn += 1
        for place in range(len(due)):
            key = due[(place + self._turn) % len(due)]
            wanted = min(room - len(taken), policy.room(self._slots(key), leased.get(key, 0)))
            if wanted <= 0:
                continue
            happened = Happening(event=Event.LEASED, now_unix_ns=self._wall_ns(), holder=holder)
            # Whatever becomes of who asked: a task that is leased in the store has a lease that ends here.
            with anyio.CancelScope(shield=True):
                got = await self.store.lease(
                    key, partial(step, happened=happened), now_unix_ns=happened.now_unix_ns, limit=wanted
                )
                for task, body in got:
                    self.leases.hold(task)
                    self.changed(task, Event.LEASED)
                    small = task.call.body_bytes <= INLINE_BYTES_MAX
                    taken.append(LeasedTask(task=task, body=body or b"" if small else None))
                self._count(key, -len(got))
        return taken

    def _slots(self, key: DeploymentKey) -> int:
        """Slots at replicas that are ready. Where there is no such deployment, somebody has to be told so."""
        if key not in self._loop.world.deployments:
            return 1
        ready = (
            replica.concurrency
            for _name, replica in self._loop.world.replicas_of(key)
            if replica.state is ReplicaState.READY and not replica.draining
        )
        return sum(ready)

    async def _change(
        self, tenant: TenantId, name: TaskId, happened: Happening, *, result: bytes | None = None
    ) -> Task:
        with anyio.CancelScope(shield=True):  # what is stored is also known here
            task = await self.store.change(tenant, name, partial(step, happened=happened), result=result)
            if task.state is not TaskState.RUNNING:
                unasked = happened.event in {Event.CANCELLED, Event.LEASE_LOST}
                self.leases.end((tenant, name), task.generation, tell=unasked)
            if task.state is TaskState.SUCCEEDED:
                self.files.drop(task, request=True)
            if task.state is TaskState.QUEUED and task.due_unix_ns <= happened.now_unix_ns:
                self._count((tenant, task.deployment), 1)
            self.changed(task, happened.event)
            for event in self._watched.get((tenant, name), ()):
                event.set()
            if task.webhook is not None and task.ended:
                self.ring_hooks()
            self._wake()
        return task

    async def _known(self, tenant: TenantId, name: TaskId) -> Task:
        task = await self.store.get(tenant, name)
        if task is None:
            raise unknown_task(name)
        return task

    async def _recount(self) -> None:
        """Also those become due whose pause is over."""
        before = self._loop.world.tasks_due
        edits, due = -1, before
        while edits != self._edits:  # counted while it was read: what was read is older
            edits = self._edits
            due = await self.store.due(self._wall_ns())
        self._loop.world.tasks_due = due
        for key in {*before, *due}:
            if before.get(key) != due.get(key):
                self._loop.poke(key)
        if due:
            self._wake()

    def _count(self, key: DeploymentKey, change: int) -> None:
        self._edits += 1
        due = self._loop.world.tasks_due
        due[key] = due.get(key, 0) + change
        if due[key] <= 0:
            del due[key]
        self._loop.poke(key)

    def _wake(self) -> None:
        self._work.set()
        self._work = anyio.Event()

    async def _make_room(self, size_bytes: int) -> None:
        """Drops the oldest ended tasks if a body does not fit; StorageFullError if that is not enough."""
        bound = self.settings.stored_bytes_max
        if self._stored_bytes + size_bytes > bound:
            await self.trim(spare_bytes=size_bytes)
        if self._stored_bytes + size_bytes > bound:
            raise StorageFullError(
                f"tasks keep {self._stored_bytes} bytes already",
                where=f"tasks.stored_bytes_max={bound}",
                next_step="they are of tasks that have not ended: submit later, or raise the setting",
            )


def fresh_task_id() -> TaskId:
    return TaskId(fresh_id("task"))

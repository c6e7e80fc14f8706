"""The part of durable state that holds tasks: a port of its own, implemented by SQLite and by the memory fake.

A change is a pure function of the stored task that the store runs inside a transaction; it may raise, and then
nothing has happened. Bodies that are small lie in the row, the others in files that the caller keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from snowdrop.domain.errors import InvalidInputError, NotFoundError, QueueFullError
from snowdrop.domain.ids import DeploymentName, TaskId, TenantId
from snowdrop.domain.task import Task, TaskState

Change = Callable[[Task], Task]
DeploymentKey = tuple[TenantId, DeploymentName]
LIST_MAX = 1_000
"""Most tasks that one list call returns."""


class TaskFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which tasks are listed. `before` is the (submitted_unix_ns, id) of the last one of the page before."""

    deployment: DeploymentName | None = None
    state: TaskState | None = None
    before: tuple[int, str] | None = None


class TaskStore(Protocol):
    """Raises as `StateStore` does. Tasks are addressed by tenant and id."""

    async def submit(self, task: Task, body: bytes | None, *, waiting_max: int) -> tuple[Task, bool]:
        """Stores a new task. With the idempotency key of a stored one, that one is given, and False.

        Raises InvalidInputError if the one with this key asks for something else, QueueFullError if the tenant
        has `waiting_max` queued.
        """
        ...

    async def change(self, tenant: TenantId, task: TaskId, change: Change, *, result: bytes | None = None) -> Task:
        """The task after `change`, stored with the `result` of its answer if that is to lie in the row.

        Raises NotFoundError, and what `change` raises.
        """
        ...

    async def lease(
        self, key: DeploymentKey, change: Change, *, now_unix_ns: int, limit: int
    ) -> list[tuple[Task, bytes | None]]:
        """Takes due tasks of a deployment, longest due first, through `change`; each with its request's body."""
        ...

    async def get(self, tenant: TenantId, task: TaskId) -> Task | None: ...
    async def result(self, tenant: TenantId, task: TaskId) -> bytes | None:
        """The answer's body, if it lies in the row."""
        ...

    async def listed(self, tenant: TenantId, which: TaskFilter, *, limit: int) -> list[Task]:
        """Newest first."""
        ...

    async def counts(self, tenant: TenantId) -> dict[tuple[DeploymentName, TaskState], int]: ...
    async def due(self, now_unix_ns: int) -> dict[DeploymentKey, int]:
        """How many tasks of each deployment could run now."""
        ...

    async def next_due_unix_ns(self, now_unix_ns: int) -> int | None:
        """When the next task becomes due that is not yet."""
        ...

    async def running(self) -> list[Task]:
        """All leased ones, of all tenants."""
        ...

    async def expired(self, now_unix_ns: int, *, limit: int) -> list[Task]:
        """Queued ones whose time is over."""
        ...

    async def hooks_due(
        self, now_unix_ns: int, *, limit: int, without: frozenset[TenantId] = frozenset()
    ) -> list[Task]:
        """Ended ones whose webhook is to be sent, longest due first; none of the tenants `without`."""
        ...

    async def trim(self, *, ended_before_unix_ns: int, tasks_max: int, bytes_max: int, limit: int) -> list[Task]:
        """Drops ended tasks, oldest end first: those of before, and as many as are above the bounds. What went."""
        ...

    async def stored_bytes(self) -> int:
        """Bytes of all bodies that are kept."""
        ...

    async def exist(self, ids: frozenset[str]) -> dict[str, Task]:
        """Those of the ids that are stored, of any tenant: to find files that nothing names."""
        ...


def same_request(stored: Task, wanted: Task) -> bool:
    """Whether two tasks of one idempotency key ask for the same."""
    return (stored.deployment, stored.call.method, stored.call.path, stored.call.body_sha256) == (
        wanted.deployment,
        wanted.call.method,
        wanted.call.path,
        wanted.call.body_sha256,
    )


def key_reused(stored: Task) -> InvalidInputError:
    return InvalidInputError(
        f"idempotency key {stored.idempotency_key!r} was used for another request, task {stored.id}",
        where="idempotency-key",
        next_step="use a new key for a new request; repeat a request with its own body",
    )


def too_many_waiting(waiting_max: int) -> QueueFullError:
    return QueueFullError(
        f"{waiting_max} tasks are waiting already",
        where=f"tasks.waiting_max={waiting_max}",
        next_step="submit later, or raise the setting",
        retry_after_s=5.0,
    )


def unknown_task(task: str) -> NotFoundError:
    return NotFoundError(
        f"there is no task {task!r}",
        where="task id",
        next_step="`snowdrop task ls` lists them; ended ones are kept for tasks.kept_s",
    )

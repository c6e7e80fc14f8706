"""Tasks of the memory fake; passes the contract suite of `state/tasks.py`."""

from __future__ import annotations

from snowdrop.domain.ids import DeploymentName, TaskId, TenantId
from snowdrop.domain.task import Task, TaskState
from snowdrop.state.tasks import (
    Change,
    DeploymentKey,
    TaskFilter,
    key_reused,
    same_request,
    too_many_waiting,
    unknown_task,
)


class MemoryTasks:
    """See the port."""

    def __init__(self) -> None:
        self._tasks: dict[tuple[TenantId, TaskId], Task] = {}
        self._bodies: dict[tuple[TenantId, TaskId], bytes] = {}
        self._results: dict[tuple[TenantId, TaskId], bytes] = {}

    async def submit(self, task: Task, body: bytes | None, *, waiting_max: int) -> tuple[Task, bool]:
        for stored in self._tasks.values():
            if task.idempotency_key and (stored.tenant, stored.idempotency_key) == (
                task.tenant,
                task.idempotency_key,
            ):
                if not same_request(stored, task):
                    raise key_reused(stored)
                return stored, False
        waiting = [t for t in self._tasks.values() if t.tenant == task.tenant and t.state is TaskState.QUEUED]
        if len(waiting) >= waiting_max:
            raise too_many_waiting(waiting_max)
        self._tasks[task.tenant, task.id] = task
        if body is not None:
            self._bodies[task.tenant, task.id] = body
        return task, True

    async def change(self, tenant: TenantId, task: TaskId, change: Change, *, result: bytes | None = None) -> Task:
        stored = self._tasks.get((tenant, task))
        if stored is None:
            raise unknown_task(task)
        changed = self._tasks[tenant, task] = change(stored)
        if result is not None and changed.answer is not None:
            self._results[tenant, task] = result
        elif changed.answer is None:
            self._results.pop((tenant, task), None)
        if changed.state is TaskState.SUCCEEDED:
            self._bodies.pop((tenant, task), None)
        return changed

    async def lease(
        self, key: DeploymentKey, change: Change, *, now_unix_ns: int, limit: int
    ) -> list[tuple[Task, bytes | None]]:
        due = [
            t
            for t in self._tasks.values()
            if (t.tenant, t.deployment) == key and t.state is TaskState.QUEUED and t.due_unix_ns <= now_unix_ns
        ]
        leased: list[tuple[Task, bytes | None]] = []
        for task in sorted(due, key=lambda t: (t.due_unix_ns, t.id))[:limit]:
            changed = self._tasks[task.tenant, task.id] = change(task)
            leased.append((changed, self._bodies.get((task.tenant, task.id))))
        return leased

    async def get(self, tenant: TenantId, task: TaskId) -> Task | None:
        return self._tasks.get((tenant, task))

    async def result(self, tenant: TenantId, task: TaskId) -> bytes | None:
        return self._results.get((tenant, task))

    async def listed(self, tenant: TenantId, which: TaskFilter, *, limit: int) -> list[Task]:
        found = [
            t
            for t in self._tasks.values()
            if t.tenant == tenant
            and which.deployment in {None, t.deployment}
            and which.state in {None, t.state}
            and (which.before is None or (t.submitted_unix_ns, t.id) < which.before)
        ]
        return sorted(found, key=lambda t: (t.submitted_unix_ns, t.id), reverse=True)[:limit]

    async def counts(self, tenant: TenantId) -> dict[tuple[DeploymentName, TaskState], int]:
        counts: dict[tuple[DeploymentName, TaskState], int] = {}
        for task in self._tasks.values():
            if task.tenant == tenant:
                counts[task.deployment, task.state] = counts.get((task.deployment, task.state), 0) + 1
        return counts

    async def due(self, now_unix_ns: int) -> dict[DeploymentKey, int]:
        counts: dict[DeploymentKey, int] = {}
        for task in self._tasks.values():
            if task.state is TaskState.QUEUED and task.due_unix_ns <= now_unix_ns:
                key = (task.tenant, task.deployment)
                counts[key] = counts.get(key, 0) + 1
        return counts

    async def next_due_unix_ns(self, now_unix_ns: int) -> int | None:
        later = [t.due_unix_ns for t in self._tasks.values() if t.state is TaskState.QUEUED]
        return min((due for due in later if due > now_unix_ns), default=None)

    async def running(self) -> list[Task]:
        return [t for t in self._tasks.values() if t.state is TaskState.RUNNING]

    async def expired(self, now_unix_ns: int, *, limit: int) -> list[Task]:
        found = [
            t for t in self._tasks.values() if t.state is TaskState.QUEUED and t.expires_unix_ns <= now_unix_ns
        ]
        return sorted(found, key=lambda t: t.expires_unix_ns)[:limit]

    async def hooks_due(
        self, now_unix_ns: int, *, limit: int, without: frozenset[TenantId] = frozenset()
    ) -> list[Task]:
        asked = [t for t in self._tasks.values() if t.tenant not in without]
        found = [(_hook_due(t), t) for t in asked if 0 < _hook_due(t) <= now_unix_ns]
        return [task for _due, task in sorted(found, key=lambda pair: (pair[0], pair[1].id))][:limit]

    async def trim(self, *, ended_before_unix_ns: int, tasks_max: int, bytes_max: int, limit: int) -> list[Task]:
        ended = sorted((t for t in self._tasks.values() if t.ended), key=lambda t: (t.ended_unix_ns, t.id))
        count, stored_bytes = len(ended), await self.stored_bytes()
        gone: list[Task] = []
        for task in ended[:limit]:
            if task.ended_unix_ns >= ended_before_unix_ns and count <= tasks_max and stored_bytes <= bytes_max:
                break
            count, stored_bytes = count - 1, stored_bytes - task.stored_bytes
            gone.append(task)
            for table in (self._tasks, self._bodies, self._results):
                table.pop((task.tenant, task.id), None)
        return gone

    async def stored_bytes(self) -> int:
        return sum(t.stored_bytes for t in self._tasks.values())

    async def exist(self, ids: frozenset[str]) -> dict[str, Task]:
        return {t.id: t for t in self._tasks.values() if t.id in ids}


def _hook_due(task: Task) -> int:
    return task.webhook.due_unix_ns if task.webhook is not None else 0

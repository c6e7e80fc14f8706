"""Tasks in the SQLite file of the state, on its one connection.

What queries look at stands in indexes that hold all they need: a scan never reads rows, which carry bodies.
"""

from __future__ import annotations

import sqlite3
from typing import Any

import msgspec

from snowdrop.domain.ids import DeploymentName, TaskId, TenantId
from snowdrop.domain.task import Task, TaskState
from snowdrop.state.group_commit import GroupCommit, Transact
from snowdrop.state.tasks import (
    Change,
    DeploymentKey,
    TaskFilter,
    key_reused,
    same_request,
    too_many_waiting,
    unknown_task,
)

TRIM_MAX = 10_000
IDS_MAX = 500
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Task).decode

TASK_TABLES: tuple[str, ...] = (
    """CREATE TABLE task (
        tenant TEXT NOT NULL, id TEXT NOT NULL, deployment TEXT NOT NULL, state TEXT NOT NULL,
        submitted_unix_ns INTEGER NOT NULL, due_unix_ns INTEGER NOT NULL, expires_unix_ns INTEGER NOT NULL,
        ended_unix_ns INTEGER NOT NULL, hook_due_unix_ns INTEGER, stored_bytes INTEGER NOT NULL,
        idempotency_key TEXT, body BLOB NOT NULL, request BLOB, result BLOB,
        PRIMARY KEY (tenant, id))""",
    "CREATE UNIQUE INDEX task_key ON task (tenant, idempotency_key) WHERE idempotency_key IS NOT NULL",
    "CREATE INDEX task_due ON task (state, tenant, deployment, due_unix_ns, id)",
    "CREATE INDEX task_next ON task (due_unix_ns) WHERE state = 'queued'",
    "CREATE INDEX task_expiry ON task (expires_unix_ns) WHERE state = 'queued'",
    "CREATE INDEX task_time ON task (tenant, submitted_unix_ns, id)",
    "CREATE INDEX task_hook ON task (hook_due_unix_ns) WHERE hook_due_unix_ns IS NOT NULL",
    "CREATE INDEX task_end ON task (ended_unix_ns, id) WHERE ended_unix_ns > 0",
    "CREATE INDEX task_bytes ON task (stored_bytes) WHERE stored_bytes > 0",
    "CREATE INDEX task_id ON task (id)",
)

# Tenants that have their share are passed over in the index, without a look at their rows.
TASK_HOOK_INDEX: tuple[str, ...] = (
    "CREATE INDEX task_hook_whose ON task (hook_due_unix_ns, id, tenant) WHERE hook_due_unix_ns IS NOT NULL",
    "DROP INDEX task_hook",
)


class SqliteTasks:
    """See the port."""

    def __init__(self, transact: Transact) -> None:
        self._transact = GroupCommit(transact)

    async def submit(self, task: Task, body: bytes | None, *, waiting_max: int) -> tuple[Task, bool]:
        def work(db: sqlite3.Connection) -> tuple[Task, bool]:
            if task.idempotency_key:
                row = db.execute(
                    "SELECT body FROM task WHERE tenant=? AND idempotency_key=?",
                    (task.tenant, task.idempotency_key),
                ).fetchone()
                if row is not None:
                    stored = _decode(row[0])
                    if not same_request(stored, task):
                        raise key_reused(stored)
                    return stored, False
            (waiting,) = db.execute(
                "SELECT count(*) FROM (SELECT 1 FROM task WHERE state='queued' AND tenant=? LIMIT ?)",
                (task.tenant, waiting_max),
            ).fetchone()
            if waiting >= waiting_max:
                raise too_many_waiting(waiting_max)
            db.execute(
                "INSERT INTO task VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,NULL)",
                (*_columns(task), task.idempotency_key or None, _encode(task), body),
            )
            return task, True

        return await self._transact(work)

    async def change(self, tenant: TenantId, task: TaskId, change: Change, *, result: bytes | None = None) -> Task:
        def work(db: sqlite3.Connection) -> Task:
            row = db.execute("SELECT body FROM task WHERE tenant=? AND id=?", (tenant, task)).fetchone()
            if row is None:
                raise unknown_task(task)
            changed = change(_decode(row[0]))
            _store(db, changed)
            if changed.answer is None:
                db.execute("UPDATE task SET result=NULL WHERE tenant=? AND id=?", (tenant, task))
            elif result is not None:
                db.execute("UPDATE task SET result=? WHERE tenant=? AND id=?", (result, tenant, task))
            if changed.state is TaskState.SUCCEEDED:
                db.execute("UPDATE task SET request=NULL WHERE tenant=? AND id=?", (tenant, task))
            return changed

        return await self._transact(work)

    async def lease(
        self, key: DeploymentKey, change: Change, *, now_unix_ns: int, limit: int
    ) -> list[tuple[Task, bytes | None]]:
        def work(db: sqlite3.Connection) -> list[tuple[Task, bytes | None]]:
            rows = db.execute(
                """SELECT body, request FROM task WHERE state='queued' AND tenant=? AND deployment=?
                   AND due_unix_ns<=? ORDER BY due_unix_ns, id LIMIT ?""",
                (*key, now_unix_ns, limit),
            ).fetchall()
            leased = [(change(_decode(body)), request) for body, request in rows]
            for task, _request in leased:
                _store(db, task)
            return leased

        return await self._transact(work)

    async def get(self, tenant: TenantId, task: TaskId) -> Task | None:
        found = await self._tasks("SELECT body FROM task WHERE tenant=? AND id=?", (tenant, task))
        return found[0] if found else None

    async def result(self, tenant: TenantId, task: TaskId) -> bytes | None:
        rows = await self._rows("SELECT result FROM task WHERE tenant=? AND id=?", (tenant, task))
        return rows[0][0] if rows else None

    async def listed(self, tenant: TenantId, which: TaskFilter, *, limit: int) -> list[Task]:
        before = which.before or (1 << 62, "")
        return await self._tasks(
            """SELECT body FROM task WHERE tenant=? AND (? IS NULL OR deployment=?) AND (? IS NULL OR state=?)
               AND (submitted_unix_ns, id) < (?, ?) ORDER BY submitted_unix_ns DESC, id DESC LIMIT ?""",
            (tenant, which.deployment, which.deployment, which.state, which.state, *before, limit),
        )

    async def counts(self, tenant: TenantId) -> dict[tuple[DeploymentName, TaskState], int]:
        rows = await self._rows(
            "SELECT deployment, state, count(*) FROM task WHERE tenant=? GROUP BY deployment, state", (tenant,)
        )
        return {(DeploymentName(name), TaskState(state)): count for name, state, count in rows}

    async def due(self, now_unix_ns: int) -> dict[DeploymentKey, int]:
        rows = await self._rows(
            """SELECT tenant, deployment, count(*) FROM task WHERE state='queued' AND due_unix_ns<=?
               GROUP BY tenant, deployment""",
            (now_unix_ns,),
        )
        return {(TenantId(tenant), DeploymentName(name)): count for tenant, name, count in rows}

    async def next_due_unix_ns(self, now_unix_ns: int) -> int | None:
        rows = await self._rows(
            "SELECT min(due_unix_ns) FROM task WHERE state='queued' AND due_unix_ns>?", (now_unix_ns,)
        )
        found: int | None = rows[0][0]
        return found

    async def running(self) -> list[Task]:
        return await self._tasks("SELECT body FROM task WHERE state='running'", ())

    async def expired(self, now_unix_ns: int, *, limit: int) -> list[Task]:
        return await self._tasks(
            """SELECT body FROM task WHERE state='queued' AND expires_unix_ns<=?
               ORDER BY expires_unix_ns LIMIT ?""",
            (now_unix_ns, limit),
        )

    async def hooks_due(
        self, now_unix_ns: int, *, limit: int, without: frozenset[TenantId] = frozenset()
    ) -> list[Task]:
        marks = ",".join("?" * len(without))
        return await self._tasks(
            f"""SELECT body FROM task WHERE hook_due_unix_ns<=? AND tenant NOT IN ({marks})
                ORDER BY hook_due_unix_ns, id LIMIT ?""",  # noqa: S608 -- only question marks
            (now_unix_ns, *sorted(without), limit),
        )

    async def trim(self, *, ended_before_unix_ns: int, tasks_max: int, bytes_max: int, limit: int) -> list[Task]:
        def work(db: sqlite3.Connection) -> list[Task]:
            (count,) = db.execute("SELECT count(*) FROM task WHERE ended_unix_ns>0").fetchone()
            stored_bytes = _stored_bytes(db)
            rows = db.execute(
                "SELECT body FROM task WHERE ended_unix_ns>0 ORDER BY ended_unix_ns, id LIMIT ?", (limit,)
            )
            gone: list[Task] = []
            for (body,) in rows:
                task = _decode(body)
                if task.ended_unix_ns >= ended_before_unix_ns and count <= tasks_max and stored_bytes <= bytes_max:
                    break
                count, stored_bytes = count - 1, stored_bytes - task.stored_bytes
                gone.append(task)
            db.executemany("DELETE FROM task WHERE tenant=? AND id=?", [(t.tenant, t.id) for t in gone])
            return gone

        return await self._transact(work)

    async def stored_bytes(self) -> int:
        return await self._transact(_stored_bytes)

    async def exist(self, ids: frozenset[str]) -> dict[str, Task]:
        found: dict[str, Task] = {}
        left = sorted(ids)
        while left:
            part, left = left[:IDS_MAX], left[IDS_MAX:]
            marks = ",".join("?" * len(part))
            sql = f"SELECT body FROM task WHERE id IN ({marks})"  # noqa: S608 -- only question marks
            found.update({task.id: task for task in await self._tasks(sql, tuple(part))})
        return found

    async def _rows(self, sql: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        return await self._transact(lambda db: db.execute(sql, values).fetchall())

    async def _tasks(self, sql: str, values: tuple[Any, ...]) -> list[Task]:
        return [_decode(body) for (body,) in await self._rows(sql, values)]


def _columns(task: Task) -> tuple[Any, ...]:
    hook_due = task.webhook.due_unix_ns if task.webhook is not None else 0
    times = (task.submitted_unix_ns, task.due_unix_ns, task.expires_unix_ns, task.ended_unix_ns)
    return (task.tenant, task.id, task.deployment, task.state, *times, hook_due or None, task.stored_bytes)


def _store(db: sqlite3.Connection, task: Task) -> None:
    tenant, name, _deployment, state, _submitted, due, expires, ended, hook_due, stored = _columns(task)
    db.execute(
        """UPDATE task SET state=?, due_unix_ns=?, expires_unix_ns=?, ended_unix_ns=?, hook_due_unix_ns=?,
           stored_bytes=?, body=? WHERE tenant=? AND id=?""",
        (state, due, expires, ended, hook_due, stored, _encode(task), tenant, name),
    )


def _stored_bytes(db: sqlite3.Connection) -> int:
    (total,) = db.execute("SELECT coalesce(sum(stored_bytes), 0) FROM task WHERE stored_bytes>0").fetchone()
    return int(total)

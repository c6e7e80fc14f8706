"""What autoscaling decided and learned, in the SQLite file of the state, on its one connection."""

from __future__ import annotations

from typing import Any

import msgspec

from snowdrop.domain.ids import DeploymentName, TenantId
from snowdrop.policy.autoscale.learned import Learned
from snowdrop.policy.autoscale.record import ScalingRecord
from snowdrop.state.group_commit import Transact
from snowdrop.wire.waits import WaitRecord

_encode = msgspec.json.Encoder().encode

SCALING_TABLES: tuple[str, ...] = (
    """CREATE TABLE scaling_decision (
        tenant TEXT NOT NULL, deployment TEXT NOT NULL, unix_ns INTEGER NOT NULL, body BLOB NOT NULL,
        PRIMARY KEY (tenant, deployment, unix_ns)) WITHOUT ROWID""",
    """CREATE TABLE scaling_learned (
        tenant TEXT NOT NULL, deployment TEXT NOT NULL, body BLOB NOT NULL,
        PRIMARY KEY (tenant, deployment)) WITHOUT ROWID""",
)

WAIT_TABLES: tuple[str, ...] = (
    """CREATE TABLE request_wait (
        tenant TEXT NOT NULL, request TEXT NOT NULL, ended_unix_ns INTEGER NOT NULL, deployment TEXT NOT NULL,
        body BLOB NOT NULL,
        PRIMARY KEY (tenant, request, ended_unix_ns)) WITHOUT ROWID""",
    "CREATE INDEX request_wait_time ON request_wait (tenant, deployment, ended_unix_ns)",
    "CREATE INDEX request_wait_age ON request_wait (ended_unix_ns)",
)


class SqliteScaling:
    """The port over the connection of the state."""

    def __init__(self, transact: Transact) -> None:
        self._transact = transact

    async def put_decision(self, record: ScalingRecord) -> None:
        row = (record.tenant, record.deployment, record.unix_ns, _encode(record))
        await self._write("INSERT OR REPLACE INTO scaling_decision VALUES (?,?,?,?)", row)

    async def list_decisions(
        self, tenant: TenantId, deployment: DeploymentName, *, since_unix_ns: int, limit: int
    ) -> list[ScalingRecord]:
        sql = """SELECT body FROM scaling_decision WHERE tenant=? AND deployment=? AND unix_ns>=?
                 ORDER BY unix_ns DESC LIMIT ?"""
        rows = await self._transact(
            lambda db: db.execute(sql, (tenant, deployment, since_unix_ns, limit)).fetchall()
        )
        return [msgspec.json.decode(body, type=ScalingRecord) for (body,) in rows]

    async def put_learned(self, tenant: TenantId, deployment: DeploymentName, learned: Learned) -> None:
        row = (tenant, deployment, _encode(learned))
        await self._write("INSERT OR REPLACE INTO scaling_learned VALUES (?,?,?)", row)

    async def get_learned(self, tenant: TenantId, deployment: DeploymentName) -> Learned | None:
        sql = "SELECT body FROM scaling_learned WHERE tenant=? AND deployment=?"
        row = await self._transact(lambda db: db.execute(sql, (tenant, deployment)).fetchone())
        return None if row is None else msgspec.json.decode(row[0], type=Learned)

    async def put_waits(self, waits: tuple[WaitRecord, ...]) -> None:
        rows = [(w.tenant, w.request_id, w.ended_unix_ns, w.deployment, _encode(w)) for w in waits]
        sql = "INSERT OR REPLACE INTO request_wait VALUES (?,?,?,?,?)"
        await self._transact(lambda db: db.executemany(sql, rows).rowcount)

    async def get_waits(
        self, tenant: TenantId, deployment: DeploymentName, *, request_id: str | None, limit: int
    ) -> list[WaitRecord]:
        sql = "SELECT body FROM request_wait WHERE tenant=? AND deployment=? ORDER BY ended_unix_ns DESC LIMIT ?"
        values: tuple[Any, ...] = (tenant, deployment, limit)
        if request_id is not None:
            sql = """SELECT body FROM request_wait WHERE tenant=? AND request=? AND deployment=?
                     ORDER BY ended_unix_ns DESC LIMIT ?"""
            values = (tenant, request_id, deployment, limit)
        rows = await self._transact(lambda db: db.execute(sql, values).fetchall())
        return [msgspec.json.decode(body, type=WaitRecord) for (body,) in rows]

    async def trim(self, *, decisions_max: int, waits_max: int) -> None:
        sql = """DELETE FROM scaling_decision WHERE (tenant, deployment, unix_ns) IN (
                   SELECT tenant, deployment, unix_ns FROM (
                     SELECT tenant, deployment, unix_ns, row_number() OVER (
                       PARTITION BY tenant, deployment ORDER BY unix_ns DESC) AS place
                     FROM scaling_decision) WHERE place > ?)"""
        await self._write(sql, (decisions_max,))
        sql = """DELETE FROM request_wait WHERE (tenant, request, ended_unix_ns) IN (
                   SELECT tenant, request, ended_unix_ns FROM request_wait
                   ORDER BY ended_unix_ns DESC LIMIT -1 OFFSET ?)"""
        await self._write(sql, (waits_max,))

    async def _write(self, sql: str, values: tuple[Any, ...]) -> None:
        await self._transact(lambda db: db.execute(sql, values).rowcount)

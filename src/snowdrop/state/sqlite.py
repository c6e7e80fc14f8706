"""State in one SQLite file (WAL). One connection, used by one worker thread at a time.

`synchronous=FULL`: an acknowledged usage record has left the agent's journal, so it must survive a power cut.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import msgspec

from snowdrop.domain.deployment import Deployment, ModelRecord, Revision
from snowdrop.domain.errors import ConflictError, SnowdropError, StorageFullError, UnavailableError
from snowdrop.domain.ids import DeploymentName, ModelName, NodeId, ReceiptId, RevisionId, TenantId
from snowdrop.domain.receipt import CallerTimes, Receipt
from snowdrop.domain.ref import Seen
from snowdrop.domain.replica import TERMINAL_STATES, ReplicaReport
from snowdrop.domain.usage import UsageRecord, UsageTotal
from snowdrop.state.memory import stale_deployment, stale_model
from snowdrop.state.migrations import MIGRATIONS
from snowdrop.state.port import LIST_MAX, KeyRecord
from snowdrop.state.secrets import SqliteSecrets
from snowdrop.state.sqlite_scaling import SqliteScaling
from snowdrop.state.sqlite_tasks import SqliteTasks

BUSY_S_MAX = 5.0
T = TypeVar("T")
Row = tuple[Any, ...]
_NEWEST_REF = "SELECT generation, manifest FROM ref_seen WHERE tenant=? AND name=?"
_encode = msgspec.json.Encoder().encode


def open_database(path: Path, migrations: tuple[tuple[str, ...], ...]) -> sqlite3.Connection:
    """A connection with all migrations applied, one transaction each; SnowdropError if the schema is newer."""
    connection = sqlite3.connect(path, timeout=BUSY_S_MAX, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > len(migrations):
            raise SnowdropError(
                f"state has schema {version}, this snowdrop knows {len(migrations)}",
                where=str(path),
                next_step="run the newer snowdrop that wrote it, or use another --state folder",
            )
        for number in range(version, len(migrations)):
            connection.execute("BEGIN IMMEDIATE")
            for statement in migrations[number]:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version={number + 1}")
            connection.execute("COMMIT")
    except BaseException:
        connection.close()
        raise
    return connection


class SqliteState:
    """The port over SQLite. Open with `SqliteState.open`, close with `aclose`."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path
        self._one = anyio.CapacityLimiter(1)
        self.tasks = SqliteTasks(self._transaction)
        self.scaling = SqliteScaling(self._transaction)
        self.secrets = SqliteSecrets(self._transaction)

    @classmethod
    async def open(cls, path: Path) -> SqliteState:
        path.parent.mkdir(parents=True, exist_ok=True)
        return cls(await anyio.to_thread.run_sync(open_database, path, MIGRATIONS), path)

    async def aclose(self) -> None:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._connection.close, limiter=self._one)

    async def put_model(self, record: ModelRecord) -> None:
        key = (record.tenant, record.name)

        def work(db: sqlite3.Connection) -> None:
            row = db.execute(_NEWEST_REF, key).fetchone()
            newest = Seen(generation=row[0], manifest=row[1]) if row else None
            if newest is not None and not newest.allows(record.generation, record.artefact.manifest):
                raise stale_model(record, newest)
            db.execute(
                "INSERT OR REPLACE INTO ref_seen VALUES (?,?,?,?)",
                (*key, record.generation, record.artefact.manifest),
            )
            db.execute("INSERT OR REPLACE INTO model VALUES (?,?,?)", (*key, _encode(record)))

        await self._transaction(work)

    async def newest_ref(self, tenant: TenantId, name: ModelName) -> Seen | None:
        rows = await self._rows(_NEWEST_REF, (tenant, name))
        return Seen(generation=rows[0][0], manifest=rows[0][1]) if rows else None

    async def get_model(self, tenant: TenantId, name: ModelName) -> ModelRecord | None:
        return await self._one_body(
            ModelRecord, "SELECT body FROM model WHERE tenant=? AND name=?", (tenant, name)
        )

    async def list_models(self, tenant: TenantId | None) -> list[ModelRecord]:
        sql = "SELECT body FROM model WHERE ? IS NULL OR tenant=? ORDER BY tenant, name"
        return await self._bodies(ModelRecord, sql, (tenant, tenant))

    async def delete_model(self, tenant: TenantId, name: ModelName) -> bool:
        return await self._write("DELETE FROM model WHERE tenant=? AND name=?", (tenant, name)) > 0

    async def put_revision(self, revision: Revision) -> None:
        key = (revision.tenant, revision.deployment, revision.id)
        body = _encode(revision)

        def work(db: sqlite3.Connection) -> None:
            row = db.execute("SELECT body FROM revision WHERE tenant=? AND deployment=? AND id=?", key).fetchone()
            if row is not None and row[0] != body:
                raise ConflictError(f"revision {revision.id} exists already", where=str(revision.deployment))
            db.execute("INSERT OR IGNORE INTO revision VALUES (?,?,?,?,?)", (*key, revision.created_unix_ns, body))

        await self._transaction(work)

    async def get_revision(
        self, tenant: TenantId, deployment: DeploymentName, revision: RevisionId
    ) -> Revision | None:
        sql = "SELECT body FROM revision WHERE tenant=? AND deployment=? AND id=?"
        return await self._one_body(Revision, sql, (tenant, deployment, revision))

    async def list_revisions(self, tenant: TenantId, deployment: DeploymentName) -> list[Revision]:
        sql = "SELECT body FROM revision WHERE tenant=? AND deployment=? ORDER BY created_unix_ns DESC LIMIT ?"
        return await self._bodies(Revision, sql, (tenant, deployment, LIST_MAX))

    async def list_all_revisions(self) -> list[Revision]:
        return await self._bodies(Revision, "SELECT body FROM revision", ())

    async def put_deployment(self, deployment: Deployment, *, expected_generation: int) -> None:
        key = (deployment.tenant, deployment.name)

        def work(db: sqlite3.Connection) -> None:
            row = db.execute("SELECT generation FROM deployment WHERE tenant=? AND name=?", key).fetchone()
            stored = row[0] if row else 0
            if stored != expected_generation:
                raise stale_deployment(deployment.name, stored, expected_generation)
            db.execute(
                "INSERT OR REPLACE INTO deployment VALUES (?,?,?,?)",
                (*key, deployment.generation, _encode(deployment)),
            )

        await self._transaction(work)

    async def get_deployment(self, tenant: TenantId, name: DeploymentName) -> Deployment | None:
        sql = "SELECT body FROM deployment WHERE tenant=? AND name=?"
        return await self._one_body(Deployment, sql, (tenant, name))

    async def list_deployments(self, tenant: TenantId | None) -> list[Deployment]:
        sql = "SELECT body FROM deployment WHERE ? IS NULL OR tenant=? ORDER BY tenant, name LIMIT ?"
        return await self._bodies(Deployment, sql, (tenant, tenant, LIST_MAX))

    async def delete_deployment(self, tenant: TenantId, name: DeploymentName, *, expected_generation: int) -> bool:
        def work(db: sqlite3.Connection) -> bool:
            sql = "DELETE FROM deployment WHERE tenant=? AND name=? AND generation=?"
            gone = db.execute(sql, (tenant, name, expected_generation)).rowcount > 0
            if gone:
                for table in ("revision", "scaling_learned"):
                    db.execute(f"DELETE FROM {table} WHERE tenant=? AND deployment=?", (tenant, name))  # noqa: S608
            return gone

        return await self._transaction(work)

    async def put_replica(self, report: ReplicaReport) -> None:
        key = report.key
        await self._write(
            """INSERT INTO replica VALUES (?,?,?,?,?,?,?) ON CONFLICT (tenant, deployment, id) DO UPDATE SET
               ended=excluded.ended, version=excluded.version, body=excluded.body
               WHERE excluded.version > replica.version""",
            (
                *(key.tenant, key.deployment, key.replica, report.started_unix_ns),
                *(report.state in TERMINAL_STATES, report.version, _encode(report)),
            ),
        )

    async def list_replicas(
        self, tenant: TenantId | None, deployment: DeploymentName | None, *, ended: bool, limit: int
    ) -> list[ReplicaReport]:
        sql = """SELECT body FROM replica WHERE (? IS NULL OR tenant=?) AND (? IS NULL OR deployment=?)
                 AND (? OR ended=0) ORDER BY started_unix_ns DESC LIMIT ?"""
        return await self._bodies(ReplicaReport, sql, (tenant, tenant, deployment, deployment, ended, limit))

    async def put_receipt(self, receipt: Receipt) -> None:
        def work(db: sqlite3.Connection) -> None:
            body = receipt
            row = db.execute("SELECT body FROM receipt WHERE id=?", (receipt.id,)).fetchone()
            if row is not None and receipt.caller is None:
                stored = msgspec.json.decode(row[0], type=Receipt)
                body = msgspec.structs.replace(receipt, caller=stored.caller)
            db.execute(
                "INSERT OR REPLACE INTO receipt VALUES (?,?,?,?,?)",
                (receipt.tenant, receipt.id, receipt.deployment, receipt.started_unix_ns, _encode(body)),
            )

        await self._transaction(work)

    async def set_caller(self, receipt: ReceiptId, caller: CallerTimes) -> bool:
        def work(db: sqlite3.Connection) -> bool:
            row = db.execute("SELECT body FROM receipt WHERE id=?", (receipt,)).fetchone()
            if row is None:
                return False
            stored = msgspec.json.decode(row[0], type=Receipt)
            if stored.caller is None:
                body = _encode(msgspec.structs.replace(stored, caller=caller))
                db.execute("UPDATE receipt SET body=? WHERE id=?", (body, receipt))
            return True

        return await self._transaction(work)

    async def get_receipt(self, tenant: TenantId, receipt: ReceiptId) -> Receipt | None:
        sql = "SELECT body FROM receipt WHERE tenant=? AND id=?"
        return await self._one_body(Receipt, sql, (tenant, receipt))

    async def list_receipts(
        self, tenant: TenantId, deployment: DeploymentName | None, *, limit: int
    ) -> list[Receipt]:
        sql = """SELECT body FROM receipt WHERE tenant=? AND (? IS NULL OR deployment=?)
                 ORDER BY started_unix_ns DESC LIMIT ?"""
        return await self._bodies(Receipt, sql, (tenant, deployment, deployment, limit))

    async def trim(self, *, receipts_max: int, replicas_max: int) -> None:
        def work(db: sqlite3.Connection) -> None:
            newest = "SELECT id FROM {} ORDER BY started_unix_ns DESC LIMIT -1 OFFSET ?"
            db.execute(f"DELETE FROM receipt WHERE id IN ({newest.format('receipt')})", (receipts_max,))  # noqa: S608
            old = newest.format("replica WHERE ended=1")
            db.execute(f"DELETE FROM replica WHERE id IN ({old})", (replicas_max,))  # noqa: S608

        await self._transaction(work)

    async def append_usage(self, records: tuple[UsageRecord, ...]) -> None:
        rows = [
            (
                *(r.tenant, r.node, r.source, r.sequence, r.deployment, r.revision, r.replica),
                *(r.unit, r.detail, r.quantity, r.from_unix_ns, r.to_unix_ns),
            )
            for r in records
        ]

        def work(db: sqlite3.Connection) -> None:
            db.executemany("INSERT OR IGNORE INTO usage VALUES (?,?,?,?,?,?,?,?,?,?,?,?)", rows)

        await self._transaction(work)

    async def last_usage_sequence(self, node: NodeId, source: str) -> int:
        rows = await self._rows("SELECT max(sequence) FROM usage WHERE node=? AND source=?", (node, source))
        return int(rows[0][0] or 0)

    async def usage_totals(self, tenant: TenantId) -> list[UsageTotal]:
        rows = await self._rows(
            """SELECT deployment, unit, detail, sum(quantity) FROM usage WHERE tenant=?
               GROUP BY deployment, unit, detail ORDER BY deployment, unit, detail LIMIT ?""",
            (tenant, LIST_MAX),
        )
        return [UsageTotal(deployment=d, unit=u, detail=t, quantity=q) for d, u, t, q in rows]

    async def put_key(self, record: KeyRecord) -> None:
        def work(db: sqlite3.Connection) -> None:
            try:
                db.execute("INSERT INTO api_key VALUES (?,?,?)", (record.tenant, record.name, _encode(record)))
            except sqlite3.IntegrityError as error:
                raise ConflictError(
                    f"a key named {record.name!r} exists", next_step="revoke it first, or choose another"
                ) from error

        await self._transaction(work)

    async def list_keys(self, tenant: TenantId | None) -> list[KeyRecord]:
        sql = "SELECT body FROM api_key WHERE ? IS NULL OR tenant=? ORDER BY tenant, name LIMIT ?"
        return await self._bodies(KeyRecord, sql, (tenant, tenant, LIST_MAX))

    async def delete_key(self, tenant: TenantId, name: str) -> bool:
        return await self._write("DELETE FROM api_key WHERE tenant=? AND name=?", (tenant, name)) > 0

    async def _write(self, sql: str, values: Row) -> int:
        return await self._transaction(lambda db: db.execute(sql, values).rowcount)

    async def _rows(self, sql: str, values: Row) -> list[Row]:
        return await self._transaction(lambda db: db.execute(sql, values).fetchall())

    async def _bodies(self, kind: type[T], sql: str, values: Row) -> list[T]:
        return [msgspec.json.decode(body, type=kind) for (body,) in await self._rows(sql, values)]

    async def _one_body(self, kind: type[T], sql: str, values: Row) -> T | None:
        found = await self._bodies(kind, sql, values)
        return found[0] if found else None

    async def _transaction(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Runs `work` in one transaction in the worker thread; all of it happens or nothing does."""

        def run() -> T:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    result = work(self._connection)
                    self._connection.execute("COMMIT")
                except BaseException:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
            except sqlite3.OperationalError as error:
                raise self._translated(error) from error
            return result

        return await anyio.to_thread.run_sync(run, limiter=self._one)

    def _translated(self, error: sqlite3.OperationalError) -> SnowdropError:
        if error.sqlite_errorcode == sqlite3.SQLITE_FULL or "disk I/O" in str(error):
            return StorageFullError(
                f"cannot write state: {error}", where=str(self._path), next_step="free space on that disk"
            )
        if error.sqlite_errorcode in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
            return UnavailableError(f"state database: {error}", where=str(self._path), next_step="try again")
        return SnowdropError(f"state database: {error}", where=str(self._path))

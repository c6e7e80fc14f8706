"""The port to stored secrets, which are encrypted before they come here; SQLite and a fake."""

from __future__ import annotations

import sqlite3
from typing import Protocol

import msgspec

from snowdrop.domain.errors import ConflictError
from snowdrop.domain.ids import TenantId
from snowdrop.domain.secret import SecretRecord
from snowdrop.state.group_commit import Transact

SECRET_TABLES: tuple[str, ...] = (
    """CREATE TABLE secret (
        tenant TEXT NOT NULL, name TEXT NOT NULL, version INTEGER NOT NULL, key_id TEXT NOT NULL,
        body BLOB NOT NULL, PRIMARY KEY (tenant, name)) WITHOUT ROWID""",
)


class SecretStore(Protocol):
    """Records by tenant and name."""

    async def put(self, record: SecretRecord, *, expected: SecretRecord | None) -> None:
        """Stores it in the place of `expected` (None: nothing there); ConflictError if something else is."""
        ...

    async def get(self, tenant: TenantId, name: str) -> SecretRecord | None: ...
    async def listed(self, tenant: TenantId | None) -> list[SecretRecord]:
        """Of one tenant, or of all; by tenant and name."""
        ...

    async def delete(self, tenant: TenantId, name: str) -> bool:
        """Whether it was there."""
        ...


class MemorySecrets:
    """The fake."""

    def __init__(self) -> None:
        self._records: dict[tuple[TenantId, str], SecretRecord] = {}

    async def put(self, record: SecretRecord, *, expected: SecretRecord | None) -> None:
        if self._records.get((record.tenant, record.name)) != expected:
            raise _changed(record)
        self._records[record.tenant, record.name] = record

    async def get(self, tenant: TenantId, name: str) -> SecretRecord | None:
        return self._records.get((tenant, name))

    async def listed(self, tenant: TenantId | None) -> list[SecretRecord]:
        return [self._records[key] for key in sorted(self._records) if tenant in {None, key[0]}]

    async def delete(self, tenant: TenantId, name: str) -> bool:
        return self._records.pop((tenant, name), None) is not None


class SqliteSecrets:
    """In the SQLite file of the state."""

    def __init__(self, transact: Transact) -> None:
        self._transact = transact

    async def put(self, record: SecretRecord, *, expected: SecretRecord | None) -> None:
        key = (record.tenant, record.name)
        body = msgspec.msgpack.encode(record)

        def work(db: sqlite3.Connection) -> None:
            row = db.execute("SELECT body FROM secret WHERE tenant=? AND name=?", key).fetchone()
            if (row[0] if row else None) != (msgspec.msgpack.encode(expected) if expected is not None else None):
                raise _changed(record)
            db.execute(
                "INSERT OR REPLACE INTO secret VALUES (?,?,?,?,?)", (*key, record.version, record.key_id, body)
            )

        await self._transact(work)

    async def get(self, tenant: TenantId, name: str) -> SecretRecord | None:
        def work(db: sqlite3.Connection) -> SecretRecord | None:
            row = db.execute("SELECT body FROM secret WHERE tenant=? AND name=?", (tenant, name)).fetchone()
            return msgspec.msgpack.decode(row[0], type=SecretRecord) if row else None

        return await self._transact(work)

    async def listed(self, tenant: TenantId | None) -> list[SecretRecord]:
        def work(db: sqlite3.Connection) -> list[SecretRecord]:
            sql = "SELECT body FROM secret WHERE ? IS NULL OR tenant=? ORDER BY tenant, name"
            rows = db.execute(sql, (tenant, tenant)).fetchall()
            return [msgspec.msgpack.decode(body, type=SecretRecord) for (body,) in rows]

        return await self._transact(work)

    async def delete(self, tenant: TenantId, name: str) -> bool:
        def work(db: sqlite3.Connection) -> bool:
            return db.execute("DELETE FROM secret WHERE tenant=? AND name=?", (tenant, name)).rowcount > 0

        return await self._transact(work)


def _changed(record: SecretRecord) -> ConflictError:
    return ConflictError(
        f"secret {record.name!r} is being changed by somebody else", where=record.name, next_step="try again"
    )

"""The agent's outbox of usage records: durable before they are sent, gone when control has them.

A record gets its sequence number in the same transaction that stores it. Numbers are never given twice, also
not after a crash; `source` names this journal, so a new journal on an old node does not repeat old numbers.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

import msgspec

from snowdrop.domain.ids import NodeId, ReplicaId, fresh_id
from snowdrop.domain.usage import UsageRecord
from snowdrop.metering.meter import UsageDraft
from snowdrop.state.sqlite import open_database

PENDING_MAX = 500
"""Records sent in one batch."""

_MIGRATIONS = (
    (
        "CREATE TABLE identity (source TEXT NOT NULL)",
        # AUTOINCREMENT: a number is not given again after its row was acknowledged and deleted.
        "CREATE TABLE outbox (sequence INTEGER PRIMARY KEY AUTOINCREMENT, body BLOB NOT NULL)",
        "CREATE TABLE metered (replica TEXT PRIMARY KEY, until_unix_ns INTEGER NOT NULL) WITHOUT ROWID",
    ),
)


class UsageJournal:
    """One per node. Calls block for a transaction on a local file, so run them in a thread."""

    def __init__(self, path: Path, node: NodeId) -> None:
        self._node = node
        self._db = open_database(path, _MIGRATIONS)
        row = self._db.execute("SELECT source FROM identity").fetchone()
        if row is None:
            row = (fresh_id("jrn"),)
            self._db.execute("INSERT INTO identity VALUES (?)", row)
        self.source = str(row[0])

    def metered_until(self, replica: ReplicaId) -> int:
        """Up to when the replica's time has been recorded, in unix nanoseconds; 0 if never."""
        row = self._db.execute("SELECT until_unix_ns FROM metered WHERE replica=?", (replica,)).fetchone()
        return int(row[0]) if row else 0

    def append(self, drafts: list[UsageDraft]) -> None:
        """Stores all drafts and how far their replicas are metered, or nothing (sqlite3.OperationalError)."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for draft in drafts:
                self._db.execute("INSERT INTO outbox (body) VALUES (?)", (msgspec.json.encode(draft),))
                if draft.unit == "replica_ns":
                    self._db.execute(
                        "INSERT OR REPLACE INTO metered VALUES (?,?)", (draft.key.replica, draft.to_unix_ns)
                    )
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def pending(self) -> tuple[UsageRecord, ...]:
        """The oldest records that control has not confirmed, at most PENDING_MAX, in order."""
        rows: list[tuple[int, bytes]] = self._db.execute(
            "SELECT sequence, body FROM outbox ORDER BY sequence LIMIT ?", (PENDING_MAX,)
        ).fetchall()
        return tuple(self._numbered(sequence, body) for sequence, body in rows)

    def acknowledge(self, sequence: int) -> None:
        """Control has everything up to and with `sequence`."""
        self._db.execute("DELETE FROM outbox WHERE sequence <= ?", (sequence,))

    def forget(self, replica: ReplicaId) -> None:
        """The replica has ended and is metered to its end."""
        self._db.execute("DELETE FROM metered WHERE replica=?", (replica,))

    def close(self) -> None:
        self._db.close()

    def _numbered(self, sequence: int, body: bytes) -> UsageRecord:
        draft = msgspec.json.decode(body, type=UsageDraft)
        return UsageRecord(
            node=self._node,
            source=self.source,
            sequence=sequence,
            tenant=draft.key.tenant,
            deployment=draft.key.deployment,
            revision=draft.key.revision,
            replica=draft.key.replica,
            unit=draft.unit,
            quantity=draft.quantity,
            detail=draft.detail,
            from_unix_ns=draft.from_unix_ns,
            to_unix_ns=draft.to_unix_ns,
        )


def lost_usage(error: sqlite3.Error) -> str:
    """What to log when a record could not be stored; the time is metered again with the next tick."""
    return f"usage journal: {error}; the stretch is recorded when it can be written again"

"""Several callers' transactions in one commit: a flush of the disk costs far more than the work before it.

Each piece of work has a savepoint of its own, so one that raises takes back its own changes and nobody else's. Who
finds the lock free commits for all who wait by then; nobody waits on purpose.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import anyio

T = TypeVar("T")
BATCH_MAX = 200


class Transact(Protocol):
    """Runs work in one transaction; all of it happens or nothing does."""

    async def __call__(self, work: Callable[[sqlite3.Connection], T]) -> T: ...


class _Entry:
    __slots__ = ("done", "error", "result", "work")

    def __init__(self, work: Callable[[sqlite3.Connection], Any]) -> None:
        self.work = work
        self.done = False
        self.result: Any = None
        self.error: Exception | None = None


class GroupCommit:
    """A `Transact` over another one."""

    def __init__(self, transact: Transact) -> None:
        self._transact = transact
        self._waiting: list[_Entry] = []
        self._lock = anyio.Lock()

    async def __call__(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """The result of `work`, durable; raises what it raised, or why nothing could be written."""
        entry = _Entry(work)
        self._waiting.append(entry)
        try:
            async with self._lock:
                if not entry.done:
                    batch, self._waiting = self._waiting[:BATCH_MAX], self._waiting[BATCH_MAX:]
                    with anyio.CancelScope(shield=True):
                        await self._commit(batch)
        finally:
            if entry in self._waiting:  # given up before its turn came
                self._waiting.remove(entry)
        if entry.error is not None:
            raise entry.error
        result: T = entry.result
        return result

    async def _commit(self, batch: list[_Entry]) -> None:
        def run(db: sqlite3.Connection) -> None:
            for entry in batch:
                _run_one(db, entry)

        try:
            await self._transact(run)
        except Exception as error:  # noqa: BLE001 -- handed to each of those whose work was not written
            for entry in batch:
                entry.error = error
        finally:
            for entry in batch:
                entry.done = True


def _run_one(db: sqlite3.Connection, entry: _Entry) -> None:
    db.execute("SAVEPOINT one")
    try:
        entry.result = entry.work(db)
    except sqlite3.Error:
        raise  # the database's own trouble is everybody's
    except Exception as error:  # noqa: BLE001 -- it is the caller's, who gets it
        entry.error = error
        db.execute("ROLLBACK TO one")
    db.execute("RELEASE one")

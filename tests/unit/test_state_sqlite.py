"""What only the file can do: schema versions, reopening, a full disk, append-only rows."""

import sqlite3
from pathlib import Path

import pytest

from platform_helpers import NAME, deployment, report, revision, usage
from snowdrop.domain.errors import SnowdropError, StorageFullError
from snowdrop.domain.ids import DEFAULT_TENANT
from snowdrop.state.migrations import MIGRATIONS
from snowdrop.state.sqlite import SqliteState, open_database

pytestmark = pytest.mark.anyio


async def test_reopening_keeps_all(tmp_path: Path) -> None:
    path = tmp_path / "control.db"
    state = await SqliteState.open(path)
    await state.put_revision(revision())
    await state.put_deployment(deployment(), expected_generation=0)
    await state.put_replica(report())
    await state.append_usage((usage(1, 5),))
    await state.aclose()
    again = await SqliteState.open(path)
    try:
        assert await again.get_deployment(DEFAULT_TENANT, NAME) == deployment()
        assert await again.list_revisions(DEFAULT_TENANT, NAME) == [revision()]
        assert await again.list_replicas(None, None, ended=False, limit=5) == [report()]
        await again.append_usage((usage(1, 5), usage(2, 6)))
        assert [t.quantity for t in await again.usage_totals(DEFAULT_TENANT)] == [11]
    finally:
        await again.aclose()


async def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "control.db"
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version={len(MIGRATIONS) + 3}")
    db.close()
    with pytest.raises(SnowdropError, match=f"schema {len(MIGRATIONS) + 3}") as caught:
        await SqliteState.open(path)
    assert str(path) in caught.value.where
    db = sqlite3.connect(path)
    assert db.execute("SELECT count(*) FROM sqlite_schema").fetchone() == (0,)
    db.close()


def test_a_migration_that_fails_leaves_the_schema_before_it(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    first = ("CREATE TABLE one (a)",)
    open_database(path, (first,)).close()
    with pytest.raises(sqlite3.OperationalError):
        open_database(path, (first, ("CREATE TABLE two (a)", "not sql")))
    db = open_database(path, (first,))
    tables = db.execute("SELECT name FROM sqlite_schema").fetchall()
    db.close()
    assert tables == [("one",)]


def test_migrations_are_applied_from_where_the_file_stands(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    steps = (("CREATE TABLE one (a)", "INSERT INTO one VALUES (1)"), ("ALTER TABLE one ADD COLUMN b DEFAULT 7",))
    open_database(path, steps[:1]).close()
    db = open_database(path, steps)
    assert db.execute("SELECT a, b FROM one").fetchall() == [(1, 7)]
    assert db.execute("PRAGMA user_version").fetchone() == (2,)
    db.close()


async def test_a_full_disk_is_a_typed_error_and_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "control.db"
    state = await SqliteState.open(path)
    try:
        (pages,) = state._connection.execute("PRAGMA page_count").fetchone()
        state._connection.execute(f"PRAGMA max_page_count={pages}")
        with pytest.raises(StorageFullError) as caught:
            await state.append_usage(tuple(usage(n) for n in range(1, 2_000)))
        assert caught.value.where == str(path)
        assert caught.value.retryable
        assert await state.usage_totals(DEFAULT_TENANT) == []
        state._connection.execute("PRAGMA max_page_count=100000")
        await state.append_usage((usage(1),))
        assert await state.last_usage_sequence(usage(1).node, "jrn-1") == 1
    finally:
        await state.aclose()


@pytest.mark.parametrize("statement", ["UPDATE usage SET quantity=0", "DELETE FROM usage"])
async def test_usage_can_only_be_added_to(tmp_path: Path, statement: str) -> None:
    state = await SqliteState.open(tmp_path / "control.db")
    try:
        await state.append_usage((usage(1, 5),))
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            state._connection.execute(statement)
        assert [t.quantity for t in await state.usage_totals(DEFAULT_TENANT)] == [5]
    finally:
        await state.aclose()


async def test_another_process_holding_the_file_is_a_typed_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snowdrop.state.sqlite.BUSY_S_MAX", 0.0)
    path = tmp_path / "control.db"
    state = await SqliteState.open(path)
    holder = sqlite3.connect(path, isolation_level=None)
    try:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(SnowdropError, match="locked"):
            await state.append_usage((usage(1),))
        holder.execute("ROLLBACK")
        await state.append_usage((usage(1),))
    finally:
        holder.close()
        await state.aclose()

"""Many transactions, few commits; each stands or falls by itself."""

import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from snowdrop.domain.errors import ConflictError, StorageFullError
from snowdrop.state.group_commit import GroupCommit
from snowdrop.state.sqlite import SqliteState

pytestmark = pytest.mark.anyio


class Counting:
    """The state's own transaction, counted."""

    def __init__(self, state: SqliteState) -> None:
        self._state = state
        self.commits = 0

    async def __call__(self, work: Callable[[sqlite3.Connection], Any]) -> Any:
        self.commits += 1
        return await self._state._transaction(work)


@pytest.fixture
async def counting(tmp_path: Path) -> AsyncIterator[Counting]:
    state = await SqliteState.open(tmp_path / "control.db")
    state._connection.execute("CREATE TABLE x (n INTEGER PRIMARY KEY)")
    yield Counting(state)
    await state.aclose()


async def put(group: GroupCommit, number: int, *, fails: bool = False) -> int:
    def work(db: sqlite3.Connection) -> int:
        db.execute("INSERT INTO x VALUES (?)", (number,))
        if fails:
            raise ConflictError("no")
        return number

    return await group(work)


async def stored(group: GroupCommit) -> list[int]:
    return await group(lambda db: [n for (n,) in db.execute("SELECT n FROM x ORDER BY n")])


async def test_those_who_wait_share_a_commit_and_one_that_raises_takes_back_only_its_own(
    counting: Counting,
) -> None:
    group = GroupCommit(counting)
    results: dict[int, object] = {}

    async def one(number: int) -> None:
        try:
            results[number] = await put(group, number, fails=number % 5 == 0)
        except ConflictError as error:
            results[number] = error.kind

    async with anyio.create_task_group() as tasks:
        for number in range(100):
            tasks.start_soon(one, number)
    assert results == {n: "conflict" if n % 5 == 0 else n for n in range(100)}
    assert counting.commits <= 3
    assert await stored(group) == [n for n in range(100) if n % 5]


async def test_the_databases_own_trouble_is_everybodys_and_nothing_is_written(counting: Counting) -> None:
    group = GroupCommit(counting)
    connection = counting._state._connection
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count={pages}")
    connection.execute("CREATE TEMP TABLE big AS SELECT 1")
    failed: list[int] = []

    async def one(number: int) -> None:
        def work(db: sqlite3.Connection) -> None:
            db.execute("INSERT INTO x VALUES (?)", (number,))
            if number == 3:
                db.execute("CREATE TABLE y AS SELECT zeroblob(1000000)")

        try:
            await group(work)
        except StorageFullError:
            failed.append(number)

    await put(group, 99)
    async with anyio.create_task_group() as tasks:
        for number in range(5):
            tasks.start_soon(one, number)
    assert 3 in failed
    assert await stored(group) == sorted({99, *range(5)} - set(failed))


async def test_one_given_up_before_its_turn_is_not_done(counting: Counting) -> None:
    group = GroupCommit(counting)
    begun, go_on = threading.Event(), threading.Event()

    def slow(db: sqlite3.Connection) -> None:
        begun.set()
        assert go_on.wait(10)
        db.execute("INSERT INTO x VALUES (1)")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(group, slow)
        await anyio.to_thread.run_sync(begun.wait)
        async with anyio.create_task_group() as given_up:
            given_up.start_soon(put, group, 2)
            await anyio.wait_all_tasks_blocked()
            given_up.cancel_scope.cancel()
        go_on.set()
    assert await stored(group) == [1]

"""One suite for every TaskStore: the memory fake, a fresh SQLite file, one of an earlier life."""

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import anyio
import pytest

from platform_helpers import NAME
from snowdrop.domain.errors import ConflictError, InvalidInputError, NotFoundError, QueueFullError
from snowdrop.domain.ids import DEFAULT_TENANT, DeploymentName, TaskId, TenantId
from snowdrop.domain.task import Task, TaskState, Webhook
from snowdrop.policy.tasks import Event, step
from snowdrop.state.memory import MemoryState
from snowdrop.state.sqlite import SqliteState
from snowdrop.state.tasks import TaskFilter, TaskStore
from task_helpers import answer, happening, task

pytestmark = pytest.mark.anyio
OTHER = TenantId("other")
KEY = (DEFAULT_TENANT, NAME)
MANY = 1_000


@pytest.fixture(params=["memory", "sqlite", "sqlite-reopened"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TaskStore]:
    if request.param == "memory":
        yield MemoryState().tasks
        return
    if request.param == "sqlite-reopened":
        await (await SqliteState.open(tmp_path / "control.db")).aclose()
    state = await SqliteState.open(tmp_path / "control.db")
    try:
        yield state.tasks
    finally:
        await state.aclose()


async def put(store: TaskStore, *tasks: Task, body: bytes | None = None) -> None:
    for given in tasks:
        await store.submit(given, body, waiting_max=MANY)


async def lease(store: TaskStore, now: int = 100, limit: int = 10) -> list[Task]:
    change = partial(step, happened=happening(Event.LEASED, now, holder="g"))
    return [leased for leased, _body in await store.lease(KEY, change, now_unix_ns=now, limit=limit)]


async def end(
    store: TaskStore, given: Task, event: Event = Event.SUCCEEDED, now: int = 200, **more: object
) -> Task:
    answered = more.pop("answer", answer(generation=given.generation))
    change = partial(step, happened=happening(event, now, given.generation, answer=answered))
    return await store.change(given.tenant, given.id, change, **more)  # type: ignore[arg-type]


class TestSubmit:
    async def test_an_idempotency_key_makes_one_task_of_a_repeated_request(self, store: TaskStore) -> None:
        first = task("task-1", idempotency_key="k", sha256="aa")
        assert await store.submit(first, b"x", waiting_max=MANY) == (first, True)
        again = task("task-2", idempotency_key="k", sha256="aa", submitted=9)
        assert await store.submit(again, b"x", waiting_max=MANY) == (first, False)
        assert await store.submit(
            task("task-3", tenant=OTHER, idempotency_key="k", sha256="bb"), None, waiting_max=MANY
        ) == (task("task-3", tenant=OTHER, idempotency_key="k", sha256="bb"), True)
        with pytest.raises(InvalidInputError, match="task-1"):
            await store.submit(task("task-4", idempotency_key="k", sha256="bb"), None, waiting_max=MANY)
        assert [t.id for t in await store.listed(DEFAULT_TENANT, TaskFilter(), limit=9)] == ["task-1"]

    async def test_without_a_key_each_is_a_task(self, store: TaskStore) -> None:
        await put(store, task("task-1"), task("task-2"))
        assert len(await store.listed(DEFAULT_TENANT, TaskFilter(), limit=9)) == 2

    async def test_at_most_so_many_wait_of_a_tenant(self, store: TaskStore) -> None:
        await put(store, task("task-1"), task("task-2"))
        with pytest.raises(QueueFullError, match="waiting_max=2"):
            await store.submit(task("task-3"), None, waiting_max=2)
        await store.submit(task("task-3", tenant=OTHER), None, waiting_max=2)
        await end(store, (await lease(store, limit=1))[0])
        await store.submit(task("task-3"), None, waiting_max=2)


class TestChange:
    async def test_a_change_that_raises_changes_nothing(self, store: TaskStore) -> None:
        await put(store, task())
        (leased,) = await lease(store)
        await end(store, leased, result=b"one")
        for event in (Event.SUCCEEDED, Event.FAILED, Event.LEASE_LOST):
            with pytest.raises(ConflictError):
                await end(store, leased, event, result=b"two")
        assert await store.result(DEFAULT_TENANT, TaskId("task-1")) == b"one"
        with pytest.raises(NotFoundError):
            await end(store, task("task-9"))

    async def test_what_is_tried_again_keeps_its_request_and_loses_the_old_answer(self, store: TaskStore) -> None:
        await put(store, task(attempts_max=1), body=b"request")
        (leased,) = await lease(store)
        await end(store, leased, Event.FAILED, result=b"bad")
        assert await store.result(DEFAULT_TENANT, leased.id) == b"bad"
        await store.change(DEFAULT_TENANT, leased.id, partial(step, happened=happening(Event.REDRIVEN)))
        assert await store.result(DEFAULT_TENANT, leased.id) is None
        change = partial(step, happened=happening(Event.LEASED, 300))
        ((again, body),) = await store.lease(KEY, change, now_unix_ns=300, limit=1)
        assert (again.generation, body) == (2, b"request")


class TestLease:
    async def test_each_is_leased_once_longest_due_first(self, store: TaskStore) -> None:
        await put(store, task("task-1", due=50), task("task-2", due=40), task("task-3", due=999))
        await put(store, task("task-4", deployment="other"))
        assert [t.id for t in await lease(store, limit=1)] == ["task-2"]
        assert [t.id for t in await lease(store)] == ["task-1"]
        assert await lease(store) == []
        assert {t.id for t in await store.running()} == {"task-1", "task-2"}

    async def test_two_who_lease_at_once_get_different_ones(self, store: TaskStore) -> None:
        await put(store, *(task(f"task-{number}") for number in range(20)))
        got: list[str] = []

        async def take() -> None:
            got.extend(t.id for t in await lease(store, limit=7))

        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(take)
        assert sorted(got) == sorted(f"task-{number}" for number in range(20))

    async def test_due_ones_are_counted_by_deployment(self, store: TaskStore) -> None:
        await put(store, task("task-1"), task("task-2"), task("task-3", due=500), task("task-4", tenant=OTHER))
        assert await store.due(100) == {KEY: 2, (OTHER, NAME): 1}
        assert await store.next_due_unix_ns(100) == 500
        await lease(store)
        assert await store.due(100) == {(OTHER, NAME): 1}
        assert await store.next_due_unix_ns(500) is None
        assert await store.counts(DEFAULT_TENANT) == {(NAME, TaskState.RUNNING): 2, (NAME, TaskState.QUEUED): 1}


class TestLists:
    async def test_pages_by_filter_newest_first(self, store: TaskStore) -> None:
        for number in range(5):
            await put(store, task(f"task-{number}", submitted=number // 2, deployment="a" if number % 2 else "b"))
        first = await store.listed(DEFAULT_TENANT, TaskFilter(), limit=3)
        assert [t.id for t in first] == ["task-4", "task-3", "task-2"]
        before = (first[-1].submitted_unix_ns, first[-1].id)
        rest = await store.listed(DEFAULT_TENANT, TaskFilter(before=before), limit=3)
        assert [t.id for t in rest] == ["task-1", "task-0"]
        only = TaskFilter(deployment=DeploymentName("a"), state=TaskState.QUEUED)
        assert [t.id for t in await store.listed(DEFAULT_TENANT, only, limit=9)] == ["task-3", "task-1"]
        assert await store.listed(DEFAULT_TENANT, TaskFilter(state=TaskState.FAILED), limit=9) == []

    async def test_expired_ones(self, store: TaskStore) -> None:
        await put(store, task("task-1", expires=50), task("task-2", expires=40), task("task-3", expires=99))
        assert [t.id for t in await store.expired(50, limit=9)] == ["task-2", "task-1"]
        assert [t.id for t in await store.expired(50, limit=1)] == ["task-2"]

    async def test_webhooks_that_are_due(self, store: TaskStore) -> None:
        await put(store, task("task-1", webhook=Webhook(url="http://x/")), task("task-2"))
        assert await store.hooks_due(10**9, limit=9) == []
        for leased in await lease(store):
            await end(store, leased, now=200)
        assert await store.hooks_due(199, limit=9) == []
        assert [t.id for t in await store.hooks_due(200, limit=9)] == ["task-1"]
        others = frozenset({TenantId("a"), TenantId("b")})
        assert [t.id for t in await store.hooks_due(200, limit=9, without=others)] == ["task-1"]
        assert await store.hooks_due(200, limit=9, without=others | {DEFAULT_TENANT}) == []


class TestTrim:
    async def test_old_ones_too_many_and_too_large_go_oldest_end_first(self, store: TaskStore) -> None:
        await put(store, *(task(f"task-{number}", body_bytes=10) for number in range(4)), task("task-9", due=999))
        for number, leased in enumerate(await lease(store)):
            await end(store, leased, now=200 + number, answer=answer(body_bytes=100), result=b"r")
        assert await store.stored_bytes() == 400
        bounds = {"tasks_max": 9, "bytes_max": 999, "limit": 9}

        async def trimmed(**changed: int) -> list[str]:
            given = {"ended_before_unix_ns": 0, **bounds, **changed}
            return [t.id for t in await store.trim(**given)]

        assert await trimmed() == []
        assert await trimmed(ended_before_unix_ns=201) == ["task-0"]
        assert await trimmed(tasks_max=2) == ["task-1"]
        assert await trimmed(bytes_max=150) == ["task-2"]
        assert await trimmed(bytes_max=0, limit=9) == ["task-3"]
        assert await store.get(DEFAULT_TENANT, TaskId("task-0")) is None
        assert await store.exist(frozenset({"task-0", "task-9"})) == {"task-9": task("task-9", due=999)}

    async def test_what_has_not_ended_is_never_trimmed(self, store: TaskStore) -> None:
        await put(store, task("task-1"), task("task-2"))
        await lease(store, limit=1)
        assert await store.trim(ended_before_unix_ns=10**18, tasks_max=0, bytes_max=0, limit=9) == []


async def test_tenants_never_see_each_others_tasks(store: TaskStore) -> None:
    await put(store, task(), body=b"secret")
    assert await store.get(OTHER, TaskId("task-1")) is None
    assert await store.listed(OTHER, TaskFilter(), limit=9) == []
    assert await store.counts(OTHER) == {}
    with pytest.raises(NotFoundError):
        await store.change(OTHER, TaskId("task-1"), partial(step, happened=happening(Event.CANCELLED)))
    change = partial(step, happened=happening(Event.LEASED))
    assert await store.lease((OTHER, NAME), change, now_unix_ns=99, limit=9) == []

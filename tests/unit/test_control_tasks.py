"""The queue of tasks in control: leases, what is due, bodies on disk, and the API over its socket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp
import anyio
import msgspec
import pytest

from platform_helpers import deployment, revision
from snowdrop.control.tasks.files import INLINE_BYTES_MAX
from snowdrop.domain.errors import ConflictError
from snowdrop.domain.ids import TaskId, TenantId
from snowdrop.domain.task import Task, TaskState
from snowdrop.state.port import KeyRecord
from snowdrop.state.sqlite import SqliteState
from snowdrop.wire.tasks import END_HEADER, KEY_HEADER, LeasedTask, LeaseName, TaskEnd
from task_helpers import task
from task_world import KEY, TaskWorld

pytestmark = pytest.mark.anyio
LARGE = "x" * (INLINE_BYTES_MAX + 1)


@pytest.fixture
def world(tmp_path: Path) -> TaskWorld:
    return TaskWorld(tmp_path, lease_s=10.0)


async def submit(http: aiohttp.ClientSession, body: Any = 1, **more: Any) -> str:
    headers = more.pop("headers", {})
    task = {"deployment": "embed", "path": "/x", "body": body, **more}
    async with http.post("/v1/tasks", json=task, headers=headers) as answer:
        assert answer.status == 202, await answer.text()
        name: str = (await answer.json())["id"]
        assert answer.headers["location"] == f"/v1/tasks/{name}"
        return name


async def leased(world: TaskWorld, holder: str = "g1", room: int = 10) -> list[LeasedTask]:
    return list((await world.queue.lease(holder, room, poll_s=0)).tasks)


def name_of(given: LeasedTask) -> LeaseName:
    return LeaseName(tenant=given.task.tenant, task=given.task.id, generation=given.task.generation)


async def finish(
    http: aiohttp.ClientSession, given: LeasedTask, body: bytes = b"done", **end: Any
) -> tuple[int, dict[str, Any]]:
    told = TaskEnd(**{"started": True, "status": 200, **end})
    name = name_of(given)
    url = f"/v1/task-leases/{name.tenant}/{name.task}/{name.generation}"
    headers = {END_HEADER: msgspec.json.encode(told).decode()}
    async with http.post(url, data=body, headers=headers) as answer:
        return answer.status, await answer.json()


async def state_of(world: TaskWorld, name: str) -> TaskState:
    return (await world.queue.get(KEY[0], TaskId(name))).state


class TestLoad:
    async def test_due_tasks_are_load_until_they_are_leased_so_that_they_activate(self, world: TaskWorld) -> None:
        await world.deployed(slots=0)
        async with world.serving() as http:
            await submit(http)
            await submit(http, delay_s=60)
            assert world.loop.world.load(KEY) == (0, 1, 1)
            assert await leased(world) == [], "nobody is ready to take it"
            await world.deployed(slots=1)
            assert len(await leased(world)) == 1
            assert world.loop.world.load(KEY) == (0, 0, 0)
            world.clock.s += 61
            await world.queue.look()
            assert world.loop.world.load(KEY) == (0, 1, 1)

    async def test_no_more_are_leased_than_the_ready_slots_can_use(self, world: TaskWorld) -> None:
        await world.deployed(slots=3)
        async with world.serving() as http:
            for _ in range(10):
                await submit(http)
            assert len(await leased(world, "g1")) == 6
            assert await leased(world, "g2") == []

    async def test_a_task_of_a_deployment_that_is_gone_is_leased_so_that_it_fails(self, world: TaskWorld) -> None:
        await world.deployed()
        async with world.serving() as http:
            await submit(http)
            world.loop.world.deployments.pop(KEY)
            assert len(await leased(world)) == 1

    async def test_a_task_of_no_deployment_is_refused_before_anything_is_kept(self, world: TaskWorld) -> None:
        async with world.serving() as http:
            task = {"deployment": "embde", "path": "/x", "body": LARGE}
            async with http.post("/v1/tasks", json=task) as answer:
                assert (answer.status, (await answer.json())["error"]["where"]) == (404, "deployment")
            assert await world.state.tasks.counts(KEY[0]) == {}
            assert list((world.folder / "tasks").iterdir()) == []


class TestLeases:
    async def test_one_that_is_not_kept_goes_to_another_and_the_late_answer_is_refused(
        self, world: TaskWorld
    ) -> None:
        await world.deployed()
        async with world.serving() as http:
            name = await submit(http)
            (first,) = await leased(world, "g1")
            world.clock.s += 9
            assert world.queue.leases.keep("g1", (name_of(first),)) == ()
            world.clock.s += 9
            await world.queue.look()
            assert await state_of(world, name) is TaskState.RUNNING, "it was kept"
            world.clock.s += 2
            await world.queue.look()
            world.clock.s += 2
            await world.queue.look()
            (second,) = await leased(world, "g2")
            assert (second.task.generation, second.task.attempts) == (2, 2)
            assert (await finish(http, first, b"late"))[0] == 409
            assert world.queue.leases.keep("g1", (name_of(first),)) == (name_of(first),)
            assert (await finish(http, second))[0] == 200
            assert (await finish(http, second, b"again"))[0] == 409
            async with http.get(f"/v1/tasks/{name}/result") as answer:
                assert await answer.read() == b"done"

    async def test_a_gateway_that_is_gone_loses_its_tasks_soon_one_that_comes_back_does_not(
        self, world: TaskWorld
    ) -> None:
        await world.deployed()
        async with world.serving() as http:
            gone, back = await submit(http), await submit(http)
            one, two = await leased(world, "g1"), await leased(world, "g2")
            assert not two
            (mine,) = [lease for lease in one if lease.task.id == back]
            world.loop.gateway_gone("g1")
            world.queue.leases.keep("g1", (name_of(mine),))
            world.clock.s += 4
            await world.queue.look()
            assert await state_of(world, gone) is TaskState.QUEUED
            assert await state_of(world, back) is TaskState.RUNNING

    async def test_a_restarted_control_gives_each_lease_its_time_again(self, tmp_path: Path) -> None:
        state = await SqliteState.open(tmp_path / "control.db")
        world = TaskWorld(tmp_path, state, lease_s=10.0)
        await world.deployed()
        async with world.serving() as http:
            name = await submit(http)
            (held,) = await leased(world)
        await state.aclose()
        state = await SqliteState.open(tmp_path / "control.db")
        again = TaskWorld(tmp_path, state, lease_s=10.0)
        await again.deployed()
        async with again.serving() as http:
            again.clock.s += 9
            await again.queue.look()
            assert again.queue.leases.keep("g1", (name_of(held),)) == ()
            assert (await finish(http, held))[0] == 200
            assert await state_of(again, name) is TaskState.SUCCEEDED
        await state.aclose()

    async def test_cancelling_one_that_runs_tells_its_gateway_at_once(self, world: TaskWorld) -> None:
        await world.deployed()
        async with world.serving() as http:
            name = await submit(http)
            (held,) = await leased(world)
            told: list[LeaseName] = []

            async def poll() -> None:
                told.extend((await world.queue.lease("g1", 10, poll_s=10)).revoked)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(poll)
                await anyio.wait_all_tasks_blocked()
                async with http.delete(f"/v1/tasks/{name}") as answer:
                    assert (await answer.json())["state"] == "cancelled"
            assert told == [name_of(held)]
            assert (await finish(http, held))[0] == 409

    async def test_one_lease_without_a_holder_in_memory_is_found_again(self, world: TaskWorld) -> None:
        await world.deployed()
        async with world.serving() as http:
            name = await submit(http)
            (held,) = await leased(world)
            world.queue.leases.end((KEY[0], held.task.id), held.task.generation, tell=False)
            await world.queue.trim()
            world.clock.s += 11
            await world.queue.look()
            assert await state_of(world, name) is TaskState.QUEUED

    async def test_one_that_ran_out_while_its_task_went_to_another_leaves_the_new_one(
        self, world: TaskWorld, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await world.deployed()
        async with world.serving() as http:
            name = await submit(http)
            (first,) = await leased(world, "g1")
            world.clock.s += 11
            change = world.queue.store.change

            async def late(*given: Any, **more: Any) -> Task:
                """The holder gives the task back, and another gets it, before the loss is written."""
                monkeypatch.undo()
                assert (await finish(http, first, status=0, started=False))[0] == 200
                (second,) = await leased(world, "g2")
                taken.append(second)
                return await change(*given, **more)

            taken: list[LeasedTask] = []
            monkeypatch.setattr(world.queue.store, "change", late)
            await world.queue.look()
            assert world.queue.leases.keep("g2", (name_of(taken[0]),)) == ()
            assert (await finish(http, taken[0]))[0] == 200
            assert await state_of(world, name) is TaskState.SUCCEEDED

    async def test_one_of_a_task_that_is_gone_keeps_nothing_else_waiting(self, world: TaskWorld) -> None:
        await world.deployed()
        async with world.serving() as http:
            gone = task(state=TaskState.RUNNING, generation=1, holder="g1")
            world.queue.leases.hold(gone)
            name = await submit(http, ttl_s=5)
            world.clock.s += 11
            await world.queue.look()
            assert await state_of(world, name) is TaskState.FAILED
            assert (gone.tenant, gone.id) not in world.queue.leases


class TestAnswers:
    async def test_a_wait_ends_with_the_task_or_with_its_time(self, world: TaskWorld) -> None:
        await world.deployed()
        async with world.serving() as http:
            name = await submit(http)
            async with http.get(f"/v1/tasks/{name}?wait=0.01") as answer:
                assert (await answer.json())["state"] == "queued"
            (held,) = await leased(world)
            seen: list[str] = []

            async def wait() -> None:
                async with http.get(f"/v1/tasks/{name}?wait=30") as answer:
                    seen.append((await answer.json())["state"])

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait)
                await anyio.wait_all_tasks_blocked()
                await finish(http, held)
            assert seen == ["succeeded"]
            assert not world.queue._watched

    async def test_the_result_is_the_answer_with_its_status_headers_and_body(self, world: TaskWorld) -> None:
        await world.deployed()
        async with world.serving() as http:
            name = await submit(http)
            async with http.get(f"/v1/tasks/{name}/result") as answer:
                assert answer.status == 202
                assert answer.headers["retry-after"] == "1"
            (held,) = await leased(world)
            await finish(http, held, b"<a>", status=201, headers=(("content-type", "text/html"), ("x-y", "z")))
            async with http.get(f"/v1/tasks/{name}/result") as answer:
                assert (answer.status, await answer.read()) == (201, b"<a>")
                assert (answer.headers["content-type"], answer.headers["x-y"]) == ("text/html", "z")
                assert answer.headers["snowdrop-task-state"] == "succeeded"

    async def test_large_bodies_lie_in_files_that_go_with_their_task(self, world: TaskWorld) -> None:
        await world.deployed()
        async with world.serving() as http:
            name = await submit(http, LARGE)
            folder = world.folder / "tasks"
            assert [path.name for path in folder.iterdir()] == [f"{name}.request"]
            (held,) = await leased(world)
            assert held.body is None
            async with http.get(f"/v1/task-leases/default/{name}/1") as answer:
                assert msgspec.json.decode(await answer.read()) == LARGE
            await finish(http, held, LARGE.encode())
            assert [path.name for path in folder.iterdir()] == [f"{name}.1.result"]
            async with http.get(f"/v1/tasks/{name}/result") as answer:
                assert await answer.text() == LARGE
            world.clock.s += world.queue.settings.kept_s + 1
            await world.queue.trim()
            assert not list(folder.iterdir())

    async def test_a_body_above_its_bound_leaves_nothing(self, tmp_path: Path) -> None:
        world = TaskWorld(tmp_path, body_bytes_max=1_000, result_bytes_max=300_000)
        await world.deployed()
        async with world.serving() as http:
            async with http.post("/v1/tasks", json={"deployment": "embed", "body": LARGE}) as answer:
                assert answer.status == 413
                assert "tasks.body_bytes_max" in (await answer.json())["error"]["where"]
            await submit(http)
            (held,) = await leased(world)
            assert (await finish(http, held, b"x" * 600_000))[0] == 413
            assert not list((tmp_path / "tasks").iterdir())

    async def test_files_that_a_crash_left_are_swept(self, world: TaskWorld) -> None:
        await world.deployed()
        async with world.serving() as http:
            name = await submit(http, LARGE)
        for left in ("task-zz.request", f"{name}.7.result", "task-zz.1.result.new"):
            (world.folder / "tasks" / left).write_bytes(b"x")
        await world.tasks.load()
        assert [path.name for path in (world.folder / "tasks").iterdir()] == [f"{name}.request"]

    async def test_what_is_handed_back_or_failed_is_tried_again_and_then_dead_until_somebody_says_so(
        self, world: TaskWorld
    ) -> None:
        await world.deployed()
        async with world.serving() as http:
            name = await submit(http, attempts_max=1)
            (held,) = await leased(world)
            await finish(http, held, b"", started=False, status=0)
            await world.queue.look()
            (held,) = await leased(world)
            assert held.task.attempts == 1
            await finish(http, held, b"oops", status=500, retryable=True)
            async with http.get("/v1/tasks?state=failed") as answer:
                (dead,) = (await answer.json())["tasks"]
            assert dead["id"] == name
            async with http.get(f"/v1/tasks/{name}/result") as answer:
                assert (answer.status, await answer.read()) == (500, b"oops")
            async with http.post(f"/v1/tasks/{name}/retry") as answer:
                assert (answer.status, (await answer.json())["attempts"]) == (202, 0)
            (held,) = await leased(world)
            await finish(http, held)
            assert await state_of(world, name) is TaskState.SUCCEEDED
            async with http.post(f"/v1/tasks/{name}/retry") as answer:
                assert answer.status == 409

    async def test_one_that_does_not_run_in_its_time_fails(self, world: TaskWorld) -> None:
        await world.deployed(slots=0)
        async with world.serving() as http:
            name = await submit(http, ttl_s=30)
            world.clock.s += 31
            await world.queue.look()
            assert await state_of(world, name) is TaskState.FAILED
            assert world.loop.world.load(KEY) == (0, 0, 0)


class TestApi:
    async def test_an_idempotency_key_gives_the_same_task_and_refuses_another_request(
        self, world: TaskWorld
    ) -> None:
        await world.deployed()
        async with world.serving() as http:
            key = {"idempotency-key": "abc"}
            first = await submit(http, LARGE, headers=key)
            assert await submit(http, LARGE, headers=key) == first
            task = {"deployment": "embed", "path": "/x", "body": 2}
            async with http.post("/v1/tasks", json=task, headers=key) as answer:
                assert answer.status == 422
            assert [path.name for path in (world.folder / "tasks").iterdir()] == [f"{first}.request"]

    async def test_a_gateways_key_decides_the_tenant(self, tmp_path: Path) -> None:
        world = TaskWorld(tmp_path, keys_required=True)
        record = KeyRecord(tenant="other", name="k", key_sha256="abc", created_unix_ns=1)  # type: ignore[arg-type]
        await world.state.put_key(record)
        await world.peers.load_keys()
        other = msgspec.structs.replace(deployment(), tenant=TenantId("other"))
        await world.state.put_revision(msgspec.structs.replace(revision(), tenant=TenantId("other")))
        await world.loop.set_deployment(other)
        async with world.serving() as http:
            name = await submit(http, headers={KEY_HEADER: "abc", "x-snowdrop-tenant": "default"})
            for headers, status in (({KEY_HEADER: ""}, 401), ({KEY_HEADER: "wrong"}, 401), ({}, 404)):
                async with http.get(f"/v1/tasks/{name}", headers=headers) as answer:
                    assert answer.status == status
            async with http.get(f"/v1/tasks/{name}", headers={KEY_HEADER: "abc"}) as answer:
                assert (await answer.json())["tenant"] == "other"
            async with http.post("/v1/task-webhook-secret", headers={KEY_HEADER: "abc"}) as answer:
                assert answer.status == 409, "only the owner of the platform rotates"

    @pytest.mark.parametrize(
        ("task", "where"),
        [
            ({"deployment": "Not Good"}, "deployment name"),
            ({"deployment": "embed", "path": "x"}, "path"),
            ({"deployment": "embed", "path": "/a b"}, "path"),
            ({"deployment": "embed", "headers": {"x": "a\r\nb: c"}}, "headers"),
            ({"deployment": "embed", "headers": {"x y": "a"}}, "headers"),
            ({"deployment": "embed", "headers": {"x": "\u00e9"}}, "headers"),
            ({"deployment": "embed", "path": "/\u00e9"}, "path"),
            ({"deployment": "embed", "webhook": "ftp://x/"}, "webhook"),
            ({"deployment": "embed", "webhook": "http://127.0.0.1/"}, "webhook"),
            ({"deployment": "embed", "attempts_max": 0}, "request body"),
            ({"deployment": "embed", "atempts_max": 5}, "request body"),
            ({"path": "/"}, "request body"),
        ],
    )
    async def test_what_can_never_be_carried_is_refused_with_its_place(
        self, world: TaskWorld, task: dict[str, Any], where: str
    ) -> None:
        async with world.serving() as http, http.post("/v1/tasks", json=task) as answer:
            assert answer.status == 422
            assert (await answer.json())["error"]["where"] == where

    async def test_lists_page_by_page(self, world: TaskWorld) -> None:
        await world.deployed()
        async with world.serving() as http:
            made = []
            for _ in range(5):
                world.clock.s += 1
                made.append(await submit(http))
            seen: list[str] = []
            before = ""
            for _ in range(3):
                async with http.get("/v1/tasks", params={"limit": "2", "before": before}) as answer:
                    page = await answer.json()
                seen += [task["id"] for task in page["tasks"]]
                before = page["next"]
            assert (seen, before) == (made[::-1], "")
            async with http.get("/v1/tasks?before=nonsense") as answer:
                assert answer.status == 422

    async def test_a_full_store_refuses_and_makes_room_by_dropping_the_oldest(self, tmp_path: Path) -> None:
        world = TaskWorld(tmp_path, stored_bytes_max=100_000)
        await world.deployed()
        async with world.serving() as http:
            await submit(http, "x" * 60_000)
            async with http.post("/v1/tasks", json={"deployment": "embed", "body": "x" * 60_000}) as answer:
                assert answer.status == 507
            (held,) = await leased(world)
            await finish(http, held, b"y" * 50_000)
            await submit(http, "x" * 60_000)
            async with http.get("/v1/tasks") as answer:
                assert len((await answer.json())["tasks"]) == 1

    def test_a_lease_that_has_ended_takes_no_body(self, world: TaskWorld) -> None:
        world.queue.leases.hold(task("task-2", generation=2, holder="g2"))
        world.queue.leases.check(LeaseName(tenant=KEY[0], task=TaskId("task-2"), generation=2))
        with pytest.raises(ConflictError):
            world.queue.leases.check(LeaseName(tenant=KEY[0], task=TaskId("task-2"), generation=1))
        with pytest.raises(ConflictError):
            world.queue.leases.check(LeaseName(tenant=KEY[0], task=TaskId("task-1"), generation=1))

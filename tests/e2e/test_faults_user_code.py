"""A service's own code fails in every stage: the caller hears why and what to do, and nothing hangs."""

from __future__ import annotations

from functools import partial

import aiohttp
import anyio
import anyio.to_thread
import pytest

from e2e_platform import CommandError, Platform, session, wait_until

pytestmark = pytest.mark.anyio


async def refused(platform: Platform, name: str) -> tuple[int, dict[str, object]]:
    async with session() as http, http.post(f"{platform.url}/{name}/x", json={}) as answer:
        return answer.status, (await answer.json())["error"]


FAILING = {
    "import-raises": ("fails_at_import.py", "the import is broken on purpose"),
    "startup-raises": ("fails_in_startup.py:Raises", "no such accelerator"),
    "startup-hangs": ("fails_in_startup.py:Never", "startup_s_max=0.5"),
    "startup-exits": ("fails_in_startup.py:Exits", "exited with code 9"),
}


async def test_a_revision_that_does_not_start_stops_trying_and_says_why(platform: Platform) -> None:
    """All at once: each is tried four times with back-off, then refused until somebody acts."""
    for name, (target, _) in FAILING.items():
        platform.deploy(target, name)
    async with anyio.create_task_group() as tasks:
        for name, (_, said) in FAILING.items():
            tasks.start_soon(_fails_and_says_why, platform, name, said)


async def _fails_and_says_why(platform: Platform, name: str, said: str) -> None:
    status, error = await refused(platform, name)
    assert (status, error["kind"]) == (503, "revision_failed"), error
    assert said in str(error["message"])
    assert f"snowdrop logs {name}" in str(error["next_step"])
    view = await anyio.to_thread.run_sync(platform.view, name)
    assert view["health"] == "crash-looping"
    assert said in view["why"]
    assert view["ready"] + view["starting"] == 0
    # Refused at once from now on: nothing is started for it any more.
    before = await anyio.to_thread.run_sync(partial(platform.receipts, name, at_least=4))
    assert len(before) >= 4  # and one more try, where the machine was so slow that the first pause is over
    assert before[0]["outcome"].startswith("failed")
    assert (await refused(platform, name))[1]["kind"] == "revision_failed"
    assert len(await anyio.to_thread.run_sync(platform.receipts, name)) <= len(before) + 1


async def test_scale_gives_a_failing_revision_another_chance(platform: Platform) -> None:
    platform.deploy("fails_in_startup.py:Exits", "retried")
    await refused(platform, "retried")
    platform.run("scale", "retried", "--max", "1")
    assert platform.view("retried")["health"] != "crash-looping"
    await refused(platform, "retried")
    assert len(platform.receipts("retried", at_least=8)) == 8


async def test_a_request_that_raises_leaves_the_replica_serving(platform: Platform) -> None:
    platform.deploy("basic.py:Echo", "raiser")
    async with session() as http:
        async with http.post(f"{platform.url}/raiser/fail", json={"message": "broken on purpose"}) as answer:
            error = (await answer.json())["error"]
            assert answer.status == 500
            assert error["kind"] == "user_code"
            assert "broken on purpose" in error["message"]
            assert error["request_id"] == answer.headers["x-request-id"]
        async with http.post(f"{platform.url}/raiser/echo", json={"text": "still here"}) as answer:
            assert (await answer.json())["text"] == "still here"
    assert len(platform.receipts("raiser", at_least=1)) == 1


async def test_a_replica_that_dies_before_it_answers(platform: Platform) -> None:
    """The request had started, so it is not sent again; the next one finds a new replica."""
    platform.deploy("basic.py:Echo", "dier")
    async with session() as http:
        async with http.post(f"{platform.url}/dier/die", json={}) as answer:
            error = (await answer.json())["error"]
            assert (answer.status, error["kind"]) == (502, "replica_died")
            assert error["retryable"] is True
        async with http.post(f"{platform.url}/dier/echo", json={"text": "next"}) as answer:
            assert answer.status == 200
    assert len(platform.receipts("dier", at_least=2)) == 2


async def test_a_replica_that_dies_in_the_middle_of_an_answer(platform: Platform) -> None:
    platform.deploy("basic.py:Echo", "midway")
    async with session() as http:
        async with http.post(f"{platform.url}/midway/die-midway", json={}) as answer:
            assert answer.status == 200
            body = (await answer.read()).decode()
            assert body.startswith("data: 1\n\n")
            assert "event: error" in body
            assert "replica_died" in body
        async with http.post(f"{platform.url}/midway/die-midway-bytes", json={}) as answer:
            assert answer.status == 200
            with pytest.raises((aiohttp.ClientPayloadError, aiohttp.ClientConnectionError)):
                await answer.read()


async def test_a_replica_over_its_memory_is_ended_alone(platform: Platform) -> None:
    platform.deploy("basic.py:Echo", "eater")
    async with session() as http:
        async with http.post(f"{platform.url}/eater/eat", json={"mebibytes": 1024}) as answer:
            assert answer.status in {500, 502}, await answer.text()
            kind = (await answer.json())["error"]["kind"]
        if kind == "replica_died":
            reasons = [r["reason"] for r in platform.describe("eater")["recent"]]
            wait_until(
                lambda: any("memory" in r["reason"] for r in platform.describe("eater")["recent"]),
                f"the reason is said: {reasons}",
            )
        async with http.post(f"{platform.url}/eater/echo", json={"text": "again"}) as answer:
            assert answer.status == 200


async def test_requests_that_had_not_started_survive_a_death(platform: Platform) -> None:
    """Queued requests of a dead replica are answered by the next one, each once."""
    platform.deploy("basic.py:Echo", "survivor")
    answers: list[int] = []

    async def work(number: int, http: aiohttp.ClientSession) -> None:
        body = {"number": number, "work_s": 0.3}
        async with http.post(f"{platform.url}/survivor/work", json=body) as answer:
            answers.append(answer.status)

    platform.run("scale", "survivor", "--max", "1")
    async with session() as http:
        async with http.post(f"{platform.url}/survivor/echo", json={"text": "up"}) as answer:
            assert answer.status == 200
        async with anyio.create_task_group() as tasks:
            for number in range(12):
                tasks.start_soon(work, number, http)
            await anyio.sleep(0.1)
            (replica,) = platform.replicas("survivor")
            assert replica["state"] == "ready"
            tasks.start_soon(_die, platform, http)
    assert len(answers) == 12
    # At most those in flight at the death fail, and they say so; everybody else got an answer.
    assert answers.count(502) <= 8
    assert answers.count(200) == 12 - answers.count(502)


async def _die(platform: Platform, http: aiohttp.ClientSession) -> None:
    async with http.post(f"{platform.url}/survivor/die", json={}) as answer:
        assert answer.status == 502


async def test_what_is_refused_at_deploy_leaves_nothing(platform: Platform) -> None:
    with pytest.raises(CommandError) as missing:
        platform.deploy("modelled.py", "no-model")
    assert missing.value.error["kind"] == "not_found"
    assert "snowdrop model push e2e-model" in missing.value.error["next_step"]
    with pytest.raises(CommandError) as absent:
        platform.deploy("no_such_file.py", "no-file")
    assert "no_such_file.py" in str(absent.value.error)
    with pytest.raises(CommandError) as bad:
        platform.deploy("basic.py:Echo", "Bad_Name")
    assert bad.value.error["kind"] == "invalid_input"
    names = {view["name"] for view in platform.run("ps")}
    assert not names & {"no-model", "no-file", "Bad_Name"}

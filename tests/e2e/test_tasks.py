"""Tasks over the real platform: the API as clients use it, and kill -9 of everything while two thousand run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections import Counter
from typing import Any

import aiohttp
import anyio
import anyio.to_thread
import pytest

from e2e_platform import CommandError, Platform, session, short_folder, wait_until

pytestmark = pytest.mark.anyio
TASKS = 2_000
AT_ONCE = 64
KILLS = 8
PROCESSES = ("control", "agent", "gateway", "replica")
ENDED = {"succeeded", "failed", "cancelled"}


async def submit(http: aiohttp.ClientSession, url: str, task: dict[str, Any], key: str = "") -> dict[str, Any]:
    """As a careful client does it: the same idempotency key until the answer has come."""
    headers = {"idempotency-key": key} if key else {}
    with anyio.fail_after(60):
        while True:
            try:
                async with http.post(f"{url}/v1/tasks", json=task, headers=headers) as answer:
                    if answer.status == 202:
                        found: dict[str, Any] = await answer.json()
                        return found
                    assert answer.status == 503, await answer.text()
                    assert float(answer.headers["retry-after"]) >= 1
            except aiohttp.ClientError:
                pass
            await anyio.sleep(0.1)


def counts(platform: Platform) -> Counter[str]:
    try:
        return Counter({count["state"]: count["count"] for count in platform.run("task", "counts")})
    except CommandError:
        return Counter({"unknown": 1})  # control is on its way


async def test_two_thousand_tasks_each_end_once_whatever_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 of control, agent, gateway and replicas, twice each, all through the work."""
    monkeypatch.setenv("SNOWDROP_TASKS_LEASE_S", "2")
    chance = random.Random(7)
    with short_folder() as state, Platform(state) as platform:
        platform.deploy("tasked.py:Tasked", "worker")
        async with session() as http:
            sent: dict[str, int] = {}
            numbers = iter(range(TASKS))

            async def send() -> None:
                for number in numbers:
                    task = {"deployment": "worker", "path": "/square", "body": {"number": number}}
                    made = await submit(http, platform.url, {**task, "attempts_max": 50}, f"n-{number}")
                    assert sent.setdefault(made["id"], number) == number, "one number made two tasks"

            async def kill() -> None:
                """One after each part of the work, while some of it is under way: each is to hit something."""
                for number in range(KILLS):
                    await _progress(http, platform.url, (number + 1) * TASKS // (KILLS + 4))
                    await anyio.to_thread.run_sync(_kill, platform, PROCESSES[number % len(PROCESSES)])
                    await anyio.sleep(chance.uniform(0.0, 0.3))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(kill)
                for _ in range(AT_ONCE):
                    tasks.start_soon(send)
            assert len(sent) == TASKS
            done = Counter({"succeeded": TASKS})
            await anyio.to_thread.run_sync(
                lambda: wait_until(lambda: counts(platform) == done, "all have ended", wait_s_max=240)
            )
            seen = await _all(http, platform.url)
            assert {task["id"] for task in seen} == set(sent)
            for task in seen:
                assert [change["after"] in ENDED for change in task["history"]].count(True) == 1
            assert max(task["generation"] for task in seen) > 1, "no kill hit a task"
            for name in chance.sample(sorted(sent), 100):
                async with http.get(f"{platform.url}/v1/tasks/{name}/result") as answer:
                    assert await answer.json() == sent[name] ** 2
        assert not list((state / "tasks").iterdir()), "a body is left"


async def _progress(http: aiohttp.ClientSession, url: str, wanted: int) -> None:
    """Until so many have succeeded and one runs, or all are done."""
    with anyio.fail_after(120):
        while True:
            try:
                async with http.get(f"{url}/v1/task-counts") as answer:
                    if answer.status == 200:
                        found = Counter({count["state"]: count["count"] for count in await answer.json()})
                        if found["succeeded"] >= TASKS or (found["succeeded"] >= wanted and found["running"]):
                            return
            except aiohttp.ClientError:
                pass
            await anyio.sleep(0.1)


async def _all(http: aiohttp.ClientSession, url: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    before = ""
    while True:
        async with http.get(f"{url}/v1/tasks", params={"limit": "900", "before": before}) as answer:
            page = await answer.json()
        found += page["tasks"]
        before = page["next"]
        if not before:
            return found


def _kill(platform: Platform, process: str) -> None:
    if process != "replica":
        try:
            platform.kill(process)
        except (ProcessLookupError, KeyError):  # it is dead already, and not started again yet
            return
        return
    listed = subprocess.run(
        ["ps", "-wwo", "pid=,args=", "--ppid", str(platform.pids()["agent"])],
        check=False,
        capture_output=True,
        text=True,
    )
    sandboxes = [line for line in listed.stdout.splitlines() if "dataplane" not in line]
    for line in sandboxes[:1]:
        try:
            os.kill(int(line.split()[0]), signal.SIGKILL)
        except ProcessLookupError:
            continue

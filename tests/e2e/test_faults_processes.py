"""kill -9 of each of the platform's processes, with work in flight."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import aiohttp
import anyio
import anyio.to_thread
import pytest

from e2e_platform import SNOWDROP, CommandError, Platform, session, short_folder, wait_until

pytestmark = pytest.mark.anyio


async def echo(http: aiohttp.ClientSession, url: str, name: str) -> dict[str, str]:
    async with http.post(f"{url}/{name}/echo", json={"text": "x"}) as answer:
        assert answer.status == 200, await answer.text()
        found: dict[str, str] = await answer.json()
        return found


async def test_control_killed_the_gateway_serves_on_and_replicas_are_adopted(own_platform: Platform) -> None:
    platform = own_platform
    platform.deploy("basic.py:Echo", "steady")
    platform.run("scale", "steady", "--idle-s", "60")
    async with session() as http:
        first = await echo(http, platform.url, "steady")
        (before,) = platform.replicas("steady")
        old = platform.kill("control")
        for _ in range(20):
            assert await echo(http, platform.url, "steady") == first
        wait_until(lambda: platform.pids()["control"] != old, "control is started again")
        wait_until(lambda: _replica_ids(platform, "steady") == [before["key"]["replica"]], "it is adopted")
        assert await echo(http, platform.url, "steady") == first
    wait_until(lambda: platform.view("steady")["ready"] == 1, "it counts")
    # And it still scales: to zero, and up again.
    platform.run("scale", "steady", "--idle-s", "0.5")
    wait_until(lambda: platform.view("steady")["ready"] == 0, "it goes to zero")
    async with session() as http:
        assert await echo(http, platform.url, "steady") != first


async def test_control_killed_while_a_replica_starts(own_platform: Platform) -> None:
    platform = own_platform
    platform.deploy("basic.py:Echo", "waker")
    async with session() as http, anyio.create_task_group() as tasks:
        tasks.start_soon(echo, http, platform.url, "waker")
        await _sync(wait_until, lambda: platform.view("waker")["desired"] == 1, "the request is seen")
        platform.kill("control")
    # The task group ended: the request that was waiting has been answered.
    await _sync(wait_until, lambda: _has_receipt(platform, "waker"), "control is back and knows of the start")


async def test_agent_killed_with_work_in_flight(own_platform: Platform) -> None:
    """Replicas die with their agent. What had started fails clearly; what waits is answered by new ones."""
    platform = own_platform
    platform.deploy("basic.py:Echo", "worker")
    platform.run("scale", "worker", "--max", "1")
    statuses: dict[int, int] = {}

    async def work(number: int, http: aiohttp.ClientSession) -> None:
        async with http.post(f"{platform.url}/worker/work", json={"number": number, "work_s": 0.5}) as answer:
            body = await answer.json()
            statuses[number] = answer.status
            if answer.status != 200:
                assert body["error"]["kind"] == "replica_died"

    async with session() as http:
        await echo(http, platform.url, "worker")
        async with anyio.create_task_group() as tasks:
            for number in range(10):
                tasks.start_soon(work, number, http)
            await anyio.sleep(0.2)
            old = platform.kill("agent")
    assert sorted(statuses) == list(range(10))
    assert list(statuses.values()).count(502) <= 4, "only those in flight, at most its concurrency"
    assert list(statuses.values()).count(200) >= 6
    wait_until(lambda: platform.pids()["agent"] != old, "the agent is started again")
    # Nothing of the dead replica is left.
    states = {r["key"]["replica"]: r["state"] for r in platform.describe("worker")["recent"]}
    assert "failed" in states.values()
    wait_until(lambda: _sockets(platform) == set(_replica_ids(platform, "worker")), "only the living have sockets")


async def test_data_plane_killed_the_agent_starts_it_again(own_platform: Platform) -> None:
    platform = own_platform
    platform.deploy("basic.py:Echo", "loader")
    async with session() as http:
        await echo(http, platform.url, "loader")
        plane = _data_plane(platform)
        os.kill(plane, signal.SIGKILL)
        wait_until(lambda: _data_plane(platform) not in {0, plane}, "a new data plane runs")
        await echo(http, platform.url, "loader")
        platform.deploy("basic.py:Echo", "loader-two")
        await echo(http, platform.url, "loader-two")


async def test_gateway_killed_the_address_stays(own_platform: Platform) -> None:
    platform = own_platform
    platform.deploy("basic.py:Echo", "address")
    platform.run("scale", "address", "--max", "1", "--idle-s", "60")  # it must outlast the gateway's start
    async with session() as http:
        first = await echo(http, platform.url, "address")
        old = platform.kill("gateway")
    wait_until(lambda: platform.pids()["gateway"] != old, "the gateway is started again")
    async with session() as http:
        wait_until(lambda: platform.run("ps") is not None, "control answers")
        async with http.post(f"{platform.url}/address/echo", json={"text": "x"}) as answer:
            # It has just started: either it knows the table already, or it says to come back at once.
            assert answer.status in {200, 503}
        await anyio.to_thread.run_sync(
            wait_until, lambda: bool(platform.run("up")["gateways"]), "the gateway has joined"
        )
        assert await echo(http, platform.url, "address") == first


async def test_two_gateway_workers_one_killed() -> None:
    """Its leases are reclaimed: the slots that its requests held serve others."""
    with short_folder() as state, Platform(state, "--workers", "2") as platform:
        platform.deploy("basic.py:Echo", "shared")
        platform.run("scale", "shared", "--max", "1", "--idle-s", "60")
        async with session() as http:
            await echo(http, platform.url, "shared")
        workers = _workers(platform)
        assert len(workers) == 2
        outcomes: list[str] = []

        async def stream() -> None:
            try:
                async with (
                    session() as http,
                    http.post(f"{platform.url}/shared/count", json={"to": 1000, "every_s": 0.1}) as answer,
                ):
                    outcomes.append(str(answer.status))
                    await answer.read()
            except aiohttp.ClientError:
                outcomes.append("cut")

        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(stream)
            await _sync(wait_until, lambda: platform.view("shared")["in_flight"] == 4, "all slots are taken")
            # The one that holds most connections first: the kernel may have given all of them to one.
            workers.sort(key=lambda pid: len(list(Path(f"/proc/{pid}/fd").iterdir())), reverse=True)
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
                # One at a time: the other goes on relaying.
                if worker == workers[0]:
                    async with session() as http:
                        await _sync(
                            wait_until,
                            lambda: platform.view("shared")["in_flight"] < 4 or outcomes.count("cut") > 0,
                            "leases of the dead worker are reclaimed",
                        )
            await _sync(wait_until, lambda: platform.view("shared")["in_flight"] == 0, "no lease is left")
            await _sync(wait_until, lambda: len(_workers(platform)) == 2, "both are started again")
            async with session() as http, anyio.create_task_group() as calls:
                for _ in range(8):
                    calls.start_soon(echo, http, platform.url, "shared")
        assert outcomes.count("cut") == 4


def test_port_in_use_is_said_by_up_and_leaves_nothing(shared_platform: Platform) -> None:
    port = shared_platform.url.rpartition(":")[2]
    with short_folder() as state:
        second = Platform(state)
        try:
            with pytest.raises(CommandError) as failed:
                second.run("up", "--port", port)
        finally:
            stopped = second.run("down")
        assert f"gateway.port={port}" in failed.value.error["where"]
        assert "--port" in failed.value.error["next_step"]
        assert not (state / "run" / "platform.json").exists()
        assert stopped == {"stopped": False}


def test_up_refuses_without_a_sandbox_unless_told() -> None:
    """Where bubblewrap cannot run: here because it is not to be found."""
    with short_folder() as state:
        second = Platform(state)
        env = {**os.environ, "SNOWDROP_AGENT_BWRAP": "/nonexistent/bwrap"}
        command = [str(SNOWDROP), "--state", str(state), "--json", "up", "--port", "0"]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
        assert done.returncode != 0
        assert "--unsafe-no-sandbox" in done.stdout
        try:
            done = subprocess.run(
                [*command, "--unsafe-no-sandbox"], check=True, capture_output=True, text=True, env=env
            )
            second.url = json.loads(done.stdout)["gateway_url"]
            second.deploy("basic.py:Echo", "plain")
            assert "no sandbox" in second.run("describe", "plain")["sandbox"].lower()
        finally:
            second.run("down")


def _replica_ids(platform: Platform, name: str) -> list[str]:
    try:
        return [replica["key"]["replica"] for replica in platform.replicas(name)]
    except CommandError:
        return []  # control is on its way


def _sockets(platform: Platform) -> set[str]:
    return {path.stem for path in (platform.run_folder / "r").glob("*.sock")}


def _has_receipt(platform: Platform, name: str) -> bool:
    try:
        return bool(platform.receipts(name))
    except CommandError:
        return False  # control is on its way


def _data_plane(platform: Platform) -> int:
    return next(iter(_children(platform.pids()["agent"], "snowdrop.agent.dataplane")), 0)


def _workers(platform: Platform) -> list[int]:
    return _children(platform.pids()["gateway"], "gateway-worker")


def _children(parent: int, word: str) -> list[int]:
    done = subprocess.run(
        ["ps", "-wwo", "pid=,args=", "--ppid", str(parent)], check=False, capture_output=True, text=True
    )
    return [int(line.split()[0]) for line in done.stdout.splitlines() if word in line]


async def _sync(work: object, *arguments: object) -> None:
    await anyio.to_thread.run_sync(work, *arguments)  # type: ignore[arg-type]


async def test_down_lets_requests_end() -> None:
    with short_folder() as state, Platform(state) as platform:
        platform.deploy("basic.py:Echo", "ending")
        async with (
            session() as http,
            http.post(f"{platform.url}/ending/count", json={"to": 15, "every_s": 0.2}) as answer,
        ):
            first = await answer.content.readline()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(anyio.to_thread.run_sync, platform.run, "down")
                rest = await answer.read()
        numbers = [line for line in (first + rest).decode().splitlines() if line]
        assert numbers == [f"data: {number}" for number in range(15)]


async def test_two_platforms_of_one_folder_name_leave_each_other_alone() -> None:
    with short_folder() as one, short_folder() as two, Platform(one / "state") as first:
        first.deploy("basic.py:Echo", "neighbour")
        first.run("scale", "neighbour", "--idle-s", "60")
        async with session() as http:
            before = await echo(http, first.url, "neighbour")
            with Platform(two / "state") as second:
                second.deploy("basic.py:Echo", "neighbour")
                assert await echo(http, second.url, "neighbour") != before
                assert await echo(http, first.url, "neighbour") == before
            assert await echo(http, first.url, "neighbour") == before


def test_two_ups_at_once_make_one_platform() -> None:
    with short_folder() as state:
        platform = Platform(state)
        command = [str(SNOWDROP), "--state", str(state), "--json", "up", "--port", "0"]
        try:
            ups = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
            told = [json.loads(up.communicate()[0])["gateway_url"] for up in ups]
            assert told[0] == told[1]
            listed = subprocess.run(["ps", "-ewwo", "args="], check=True, capture_output=True, text=True).stdout
            supervisors = [line for line in listed.splitlines() if "main supervise" in line and str(state) in line]
            assert len(supervisors) == 1
        finally:
            platform.run("down")


async def test_everything_killed_and_up_again() -> None:
    """As after a power cut: the record of who ran is stale, the state is not."""
    with short_folder() as state, Platform(state) as platform:
        platform.deploy("basic.py:Echo", "phoenix")
        async with session() as http:
            await echo(http, platform.url, "phoenix")
        kept = {receipt["id"] for receipt in platform.receipts("phoenix", at_least=1)}
        record = json.loads((state / "run" / "platform.json").read_text())
        for pid in (record["supervisor_pid"], *record["pids"].values()):
            os.kill(pid, signal.SIGKILL)
        await _sync(wait_until, lambda: platform.run("down") == {"stopped": False}, "nothing runs")
        platform.up()
        async with session() as http:
            await echo(http, platform.url, "phoenix")
        assert kept < {receipt["id"] for receipt in platform.receipts("phoenix", at_least=2)}


async def test_a_redeploy_with_more_concurrency_does_not_overfill_the_old_replica(platform: Platform) -> None:
    platform.deploy("concurrency.py:Narrow", "widened")
    async with session() as http:
        await echo(http, platform.url, "widened")
        platform.deploy("concurrency.py:Wide", "widened")
        async with anyio.create_task_group() as tasks:
            for _ in range(6):
                tasks.start_soon(echo, http, platform.url, "widened")

"""The main job: from nothing running to an answer, with its receipt, and back to nothing."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from pathlib import Path

import aiohttp
import anyio
import anyio.to_thread
import numpy as np
import pytest
from safetensors.numpy import save_file

from e2e_platform import SNOWDROP, Platform, session, wait_until

pytestmark = pytest.mark.anyio


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    rng = np.random.default_rng(7)
    tensors = {f"layer.{i}": rng.standard_normal((256, 300), dtype=np.float32) for i in range(8)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"layers": 8}))
    return folder


def at_zero(platform: Platform, name: str) -> bool:
    view = platform.view(name)
    return view["ready"] + view["starting"] + view["draining"] == 0


async def test_from_zero_to_an_answer_and_back(platform: Platform, model_folder: Path) -> None:
    pushed = platform.run("model", "push", "e2e-model", str(model_folder))
    assert pushed["new_bytes"] > 2_000_000
    platform.deploy("modelled.py", "modelled")
    async with session() as http:
        async with http.post(f"{platform.url}/modelled/facts", json={}) as answer:
            facts, headers = await answer.json(), answer.headers
            assert answer.status == 200, facts
        # At once: the commands below may take longer than the replica stays idle.
        async with http.post(f"{platform.url}/modelled/facts", json={}) as warm:
            assert warm.status == 200
            assert "snowdrop-receipt" not in warm.headers
        whole = (model_folder / "model.safetensors").read_bytes()
        assert facts["sha256"] == hashlib.sha256(whole).hexdigest()
        assert facts["config"] == {"layers": 8}
        assert len(facts["sums"]) == 8

        phases = re.findall(r"(\w+);dur=([\d.]+)", headers["server-timing"])
        assert [name for name, _ in phases] == [
            "activate",
            "mount",
            "start",
            "import",
            "startup",
            "route",
            "answer",
        ]
        receipt = wait_until(
            lambda: (
                (r := platform.run("receipts", "show", headers["snowdrop-receipt"]))["receipt"]["caller"] and r
            ),
            "the receipt has its caller",
        )
        waited_ns = receipt["waited_ns"]
        assert abs(receipt["unaccounted_ns"]) <= 0.05 * waited_ns
        assert abs(sum(float(ms) for _, ms in phases) * 1e6 - waited_ns) <= 0.05 * waited_ns
        content = receipt["receipt"]["content"]
        assert content["origin"] >= len(whole)

        wait_until(lambda: at_zero(platform, "modelled"), "it goes to zero")
        async with http.post(f"{platform.url}/modelled/facts", json={}) as again:
            assert await again.json() == facts
            second = again.headers["snowdrop-receipt"]
    content = platform.run("receipts", "show", second)["receipt"]["content"]
    assert content["origin"] == 0
    assert content["ram"] + content["disk"] >= len(whole)
    wait_until(
        lambda: (
            {(u["unit"], u["detail"]) for u in platform.run("usage") if u["deployment"] == "modelled"}
            >= {("replica_ns", ""), ("content_bytes", "origin"), ("content_bytes", "ram")}
        ),
        "usage is recorded",
    )


async def test_a_burst_at_zero_is_answered_once_each(platform: Platform) -> None:
    platform.deploy("basic.py:Echo", "burst")
    seen_replicas = 0

    async def one(number: int, http: aiohttp.ClientSession) -> dict[str, int | str]:
        async with http.post(f"{platform.url}/burst/work", json={"number": number, "work_s": 0.05}) as answer:
            assert answer.status == 200, await answer.text()
            found: dict[str, int | str] = await answer.json()
            return found

    answers: list[dict[str, int | str]] = []

    async def collect(number: int, http: aiohttp.ClientSession) -> None:
        answers.append(await one(number, http))

    async with session() as http, anyio.create_task_group() as watching:

        async def watch() -> None:
            nonlocal seen_replicas
            while True:
                view = await anyio.to_thread.run_sync(platform.view, "burst")
                seen_replicas = max(seen_replicas, view["ready"] + view["starting"] + view["draining"])

        watching.start_soon(watch)
        async with anyio.create_task_group() as tasks:
            for number in range(200):
                tasks.start_soon(collect, number, http)
        watching.cancel_scope.cancel()
    assert sorted(int(answer["number"]) for answer in answers) == list(range(200))
    assert max(int(answer["peak"]) for answer in answers) <= 4
    assert 1 <= len({answer["replica"] for answer in answers}) <= 3
    assert 1 <= seen_replicas <= 3


async def test_scale_down_cuts_no_stream_and_new_work_wakes_it(platform: Platform) -> None:
    """The stream runs for longer than the idle time, through the drain, to its last number."""
    platform.deploy("basic.py:Echo", "streamed")
    async with (
        session() as http,
        http.post(f"{platform.url}/streamed/count", json={"to": 20, "every_s": 0.1}) as answer,
    ):
        numbers = []
        async for line in answer.content:
            if line.startswith(b"data: "):
                numbers.append(int(line[6:]))
            if len(numbers) == 2:
                platform.run("scale", "streamed", "--max", "1", "--idle-s", "0")
                await _redeploy(platform)
        assert numbers == list(range(20))


async def _redeploy(platform: Platform) -> None:
    """A new revision drains the old one while it streams."""
    await anyio.to_thread.run_sync(platform.deploy, "basic.py:Echo", "streamed")


async def test_a_client_that_goes_away_cancels_the_work(platform: Platform) -> None:
    platform.deploy("basic.py:Echo", "leaver")
    async with session() as http, http.post(f"{platform.url}/leaver/until-cancelled", json={}) as answer:
        assert (await answer.content.readline()).startswith(b"data: ")
        answer.close()
    wait_until(
        lambda: "work was cancelled" in _log(platform, "leaver"), "the replica notices that its client is gone"
    )
    wait_until(lambda: platform.view("leaver")["in_flight"] == 0, "the slot is given back")


async def test_shutdown_runs_when_a_deployment_is_deleted(platform: Platform) -> None:
    platform.deploy("basic.py:Echo", "closing")
    async with session() as http, http.post(f"{platform.url}/closing/echo", json={"text": "x"}) as answer:
        assert answer.status == 200
    assert platform.run("delete", "closing") == {"deleted": "closing", "gone": True}
    assert "shutdown ran" in _log(platform, "closing")
    async with session() as http, http.post(f"{platform.url}/closing/echo", json={"text": "x"}) as answer:
        assert answer.status == 404
        assert (await answer.json())["error"]["kind"] == "not_found"


async def test_bad_requests_name_the_field(platform: Platform) -> None:
    platform.deploy("basic.py:Echo", "strict")
    async with session() as http:
        async with http.post(f"{platform.url}/strict/echo", json={"text": 5}) as answer:
            assert answer.status == 422
            error = (await answer.json())["error"]
            assert error["fields"][0]["field"] == "text"
        async with http.post(f"{platform.url}/strict/echo", data=b"{not json") as answer:
            assert answer.status == 422
        async with http.post(f"{platform.url}/strict/nothing", json={}) as answer:
            assert answer.status == 404
        async with http.get(f"{platform.url}/no-such-deployment/x") as answer:
            assert answer.status == 404


def _log(platform: Platform, name: str) -> str:
    command = [SNOWDROP, "--state", str(platform.state), "logs", name]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout

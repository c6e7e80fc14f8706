"""Tasks and batches as people use them: from zero, by the command line, broken off in the middle."""

from __future__ import annotations

import json
import signal
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from e2e_platform import SNOWDROP, CommandError, Platform, session, short_folder, wait_until

pytestmark = pytest.mark.anyio


def done(platform: Platform, name: str) -> dict[str, Any]:
    found: dict[str, Any] = wait_until(
        lambda: (task := platform.run("task", "show", name))["ended_unix_ns"] and task, "the task has ended"
    )
    return found


def test_a_task_from_zero_by_the_command_line(platform: Platform) -> None:
    platform.deploy("tasked.py:Tasked", "tasked")
    assert platform.run("task", "submit", "tasked", "/square", '{"number": 7}', "--wait") == 49
    (receipt,) = platform.receipts("tasked", at_least=1)
    assert receipt["outcome"] == "ready"
    flaky = platform.run("task", "submit", "tasked", "/fails-first", '{"name": "a", "times": 1}')
    assert (task := done(platform, flaky["id"]))["state"] == "succeeded"
    assert task["attempts"] == 2
    dead = platform.run("task", "submit", "tasked", "/square", '{"number": "x"}')
    assert done(platform, dead["id"])["state"] == "failed"
    assert [task["id"] for task in platform.run("task", "ls", "--state", "failed")["tasks"]] == [dead["id"]]
    with pytest.raises(CommandError) as failed:
        platform.run("task", "result", dead["id"])
    assert failed.value.error["kind"] == "invalid_input"
    (again,) = platform.run("task", "retry", "--all", "--deployment", "tasked")
    assert again["id"] == dead["id"]
    slow = platform.run("task", "submit", "tasked", "/slow", '{"seconds": 600}')
    wait_until(lambda: platform.run("task", "show", slow["id"])["state"] == "running", "it runs")
    (ended,) = platform.run("task", "cancel", slow["id"])
    assert ended["state"] == "cancelled"
    wait_until(lambda: platform.view("tasked")["in_flight"] == 0, "the replica's slot is back")


async def test_respond_async_from_zero_with_several_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dispatcher lives with the owner of the queues, the requests come to any worker."""
    monkeypatch.setenv("SNOWDROP_GATEWAY_WORKERS", "2")
    with short_folder() as state, Platform(state) as platform:
        platform.deploy("tasked.py:Tasked", "tasked")
        async with session() as http:
            made: list[tuple[int, str]] = []
            for number in range(10):
                async with http.post(
                    f"{platform.url}/tasked/square", json={"number": number}, headers={"prefer": "respond-async"}
                ) as answer:
                    assert answer.status == 202
                    made.append((number, answer.headers["location"]))
            for number, location in made:
                async with http.get(f"{platform.url}{location}/result?wait=50") as answer:
                    assert (answer.status, await answer.json()) == (200, number**2)


def test_a_batch_killed_in_the_middle_goes_on_and_loses_and_doubles_nothing(
    platform: Platform, tmp_path: Path
) -> None:
    platform.deploy("tasked.py:Tasked", "batched")
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"number": number} for number in range(600)]
    lines[5] = {"number": "no number"}  # type: ignore[dict-item]
    openai = {"custom_id": "own", "method": "POST", "url": "/square", "body": {"number": 1_000}}
    source.write_text("".join(json.dumps(line) + "\n" for line in [*lines, openai]))
    command = [SNOWDROP, "--state", str(platform.state), "--json"]
    command += ["batch", "run", "batched", str(source), str(out), "--endpoint", "/square"]
    part = out.with_name("out.jsonl.part")
    begun = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        wait_until(lambda: part.exists() and len(part.read_bytes().splitlines()) > 50, "some lines are done")
    finally:
        begun.send_signal(signal.SIGKILL)
        begun.communicate()
    assert not out.exists()
    before = len(part.read_bytes().splitlines()) - 1
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    told = json.loads(ended.stdout)
    assert ended.returncode == 1, "a line failed"
    assert (told["lines"], told["failed"]) == (601, 1)
    assert told["resumed"] in {before, before - 1}, "a line that was being written is done again"
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    numbers = Counter(answer.get("line") or int(answer["id"].rpartition("_")[2]) for answer in answers)
    assert list(numbers) == list(range(1, 602)), "each line once, in the order of the input"
    assert set(numbers.values()) == {1}
    assert answers[600]["custom_id"] == "own"
    assert answers[600]["response"]["body"] == 1_000_000
    assert (answers[5]["status_code"], answers[5]["output"]) == (422, None)
    assert [answer["output"] for answer in answers[6:600]] == [number**2 for number in range(6, 600)]
    assert not part.exists()

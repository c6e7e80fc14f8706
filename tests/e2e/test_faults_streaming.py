"""The data plane dies while it fills an area that a replica is reading."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import anyio
import numpy as np
import pytest
from safetensors.numpy import save_file

from e2e_platform import CommandError, Platform, session, short_folder, wait_until

pytestmark = pytest.mark.anyio

TENSORS, TENSOR_BYTES = 12, 4 << 20
SLOW_BYTES_PER_S = 12 << 20


async def test_a_replica_goes_on_when_the_data_plane_dies_in_the_middle_of_its_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(9)
    tensors = {f"t{index}": rng.integers(0, 255, TENSOR_BYTES, dtype=np.uint8) for index in range(TENSORS)}
    (tmp_path / "m").mkdir()
    save_file(tensors, tmp_path / "m/model.safetensors")
    monkeypatch.setenv("SNOWDROP_CONTENT_ORIGIN_BYTES_PER_S_MAX", str(SLOW_BYTES_PER_S))
    with short_folder() as state, Platform(state) as platform:
        platform.run("model", "push", "e2e-slow", str(tmp_path / "m"))
        platform.deploy("streamed.py", "streamed")
        answers = []

        async def call() -> None:
            async with session() as http, http.post(f"{platform.url}/streamed/facts", json={}) as answer:
                answers.append((answer.status, await answer.json()))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)
            await anyio.to_thread.run_sync(wait_until, lambda: _says(platform, "first tensor"), "it has begun")
            (plane,) = _data_planes(platform)
            os.kill(plane, signal.SIGKILL)
        ((status, facts),) = answers
        assert status == 200, facts
        assert facts["sums"] == {name: int(array.sum()) for name, array in tensors.items()}
        assert facts["first"] == facts["sums"]["t0"]
        assert _data_planes(platform) != [plane]
        (receipt,) = platform.receipts("streamed", at_least=1)
        assert receipt["outcome"] == "ready", "the same replica that had begun"


def _says(platform: Platform, words: str) -> bool:
    logs = platform.state / "logs/default/streamed"
    return logs.is_dir() and any(words in path.read_text() for path in logs.glob("*.log"))


def _data_planes(platform: Platform) -> list[int]:
    try:
        agent = platform.pids()["agent"]
    except CommandError:
        return []
    done = subprocess.run(
        ["ps", "-wwo", "pid=,args=", "--ppid", str(agent)], check=False, capture_output=True, text=True
    )
    return [int(line.split()[0]) for line in done.stdout.splitlines() if "snowdrop.agent.dataplane" in line]

"""A model as a directory in which all files are there: on the command line, in a replica, through deaths."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
from pathlib import Path

import pytest

from content_helpers import noise
from e2e_platform import CommandError, Platform, session, wait_until
from fuse_helpers import needs_fuse
from snowdrop.content.fuse.mount import mounted_trees
from snowdrop.domain.layout import StateLayout
from snowdrop.engine.local import is_running, read_record

pytestmark = [pytest.mark.anyio, needs_fuse]

FILES = {"model.gguf": noise(40 << 20, 1), "config.json": b"{}", "d/vocab.txt": noise(50_000, 2)}
EXPECTED = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}


def pushed(platform: Platform, folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    platform.run("model", "push", "filed", str(folder))


def sums(directory: Path) -> dict[str, str]:
    done = subprocess.run(
        ["sh", "-c", "find . -type f -exec sha256sum {} +"],
        cwd=directory,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = (line.split("  ./") for line in done.stdout.splitlines())
    return {name: digest for digest, name in lines}


async def test_a_replica_starts_before_its_files_are_there(own_platform: Platform, tmp_path: Path) -> None:
    pushed(own_platform, tmp_path / "model")
    own_platform.deploy("filed.py:Filed", "filed")
    async with session() as http:
        async with http.post(f"{own_platform.url}/filed/mounted", json={}) as answer:
            assert await answer.json() is True
        async with http.post(f"{own_platform.url}/filed/sums", json={}) as answer:
            assert await answer.json() == EXPECTED
        # The next replica finds everything on the disk, and no daemon in its way.
        wait_until(lambda: not own_platform.replicas("filed"), "the replica is idle and gone")
        async with http.post(f"{own_platform.url}/filed/mounted", json={}) as answer:
            assert await answer.json() is False
        async with http.post(f"{own_platform.url}/filed/sums", json={}) as answer:
            assert await answer.json() == EXPECTED
    assert not list((own_platform.state / "cache/mounts").iterdir())


async def test_a_model_is_mounted_for_a_person_until_unmounted(own_platform: Platform, tmp_path: Path) -> None:
    pushed(own_platform, tmp_path / "model")
    at = tmp_path / "mine"
    own_platform.run("model", "mount", "filed", str(at))
    assert [entry["directory"] for entry in own_platform.run("model", "mounts")] == [str(at)]
    assert sums(at) == EXPECTED

    own_platform.kill_agent()

    def is_mounted_again() -> bool:
        try:
            return sums(at) == EXPECTED
        except (subprocess.CalledProcessError, OSError):
            return False

    wait_until(is_mounted_again, "the next agent mounts again")
    # It dies again, and before another is there everything goes down: nobody but the supervisor can unmount.
    layout = StateLayout(own_platform.state)
    supervisor = read_record(layout)
    assert supervisor is not None
    own_platform.kill("agent")
    os.kill(supervisor.supervisor_pid, signal.SIGTERM)
    wait_until(lambda: not is_running(layout), "the platform is down")
    assert mounted_trees(at) == []
    assert sums(at) == {}
    own_platform.up()
    wait_until(is_mounted_again, "the platform mounts again when it comes up")
    own_platform.run("model", "unmount", str(at))
    assert sums(at) == {}
    with pytest.raises(CommandError) as failed:
        own_platform.run("model", "unmount", str(at))
    assert failed.value.error["kind"] == "not_found"

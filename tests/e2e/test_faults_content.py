"""Bad models, bad bytes, full disks: a typed error that names the place, and nothing half-done."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from e2e_platform import SNOWDROP, CommandError, Platform, session, short_folder, wait_until

pytestmark = pytest.mark.anyio


def write_model(folder: Path, mebibytes: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(3)
    rows = mebibytes * 256
    save_file({"weight": rng.standard_normal((rows, 1024), dtype=np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def with_header(header: dict[str, object], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(start: int, end: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end]}


CORRUPT = {
    "header too long": struct.pack("<Q", 1 << 60) + b"{}",
    "overlapping": with_header({"a": tensor(0, 16), "b": tensor(8, 24)}, bytes(24)),
    "out of range": with_header({"a": tensor(0, 400)}, bytes(16)),
    "truncated": with_header({"a": tensor(0, 4096)}, bytes(4096))[:200],
}


@pytest.mark.parametrize("case", sorted(CORRUPT))
def test_a_corrupt_model_is_refused_by_name(platform: Platform, tmp_path: Path, case: str) -> None:
    folder = tmp_path / "corrupt"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(CORRUPT[case])
    before = files(platform.state / "origin")
    with pytest.raises(CommandError) as failed:
        platform.run("model", "push", "corrupt", str(folder))
    assert failed.value.error["kind"] == "corrupt_content"
    assert "model.safetensors" in str(failed.value.error)
    assert "corrupt" not in {model["name"] for model in platform.run("model", "ls")}
    assert files(platform.state / "origin") == before


def test_a_link_out_of_the_model_is_refused(platform: Platform, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "passwd").symlink_to("/etc/passwd")
    with pytest.raises(CommandError) as failed:
        platform.run("model", "push", "escaping", str(folder))
    assert "passwd" in str(failed.value.error)


async def test_wrong_bytes_at_the_origin_are_never_served(own_platform: Platform, tmp_path: Path) -> None:
    platform = own_platform
    platform.run("model", "push", "e2e-model", str(write_model(tmp_path / "model")))
    platform.deploy("modelled.py", "poisoned")
    packs = [path for path in (platform.state / "origin").rglob("*") if path.is_file() and "pack" in str(path)]
    flip = max(packs, key=lambda path: path.stat().st_size)
    data = bytearray(flip.read_bytes())
    data[len(data) // 2] ^= 1
    flip.chmod(0o600)
    flip.write_bytes(data)
    async with session() as http, http.post(f"{platform.url}/poisoned/facts", json={}) as answer:
        error = (await answer.json())["error"]
        assert answer.status == 503
    assert error["kind"] == "revision_failed"
    assert "model.safetensors" in error["message"]
    assert platform.receipts("poisoned", at_least=1)[0]["error"]["kind"] == "integrity"


async def test_a_node_without_the_content_says_what_is_missing(own_platform: Platform, tmp_path: Path) -> None:
    platform = own_platform
    platform.run("model", "push", "e2e-model", str(write_model(tmp_path / "model")))
    platform.deploy("modelled.py", "emptied")
    for path in (platform.state / "origin").rglob("*"):
        if path.is_file():
            path.unlink()
    async with session() as http, http.post(f"{platform.url}/emptied/facts", json={}) as answer:
        assert answer.status == 503
        assert (await answer.json())["error"]["kind"] == "revision_failed"
    assert platform.receipts("emptied", at_least=1)[0]["error"]["kind"] == "not_found"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_said_and_leaves_no_half_model(tmp_path: Path) -> None:
    with short_folder() as state:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(state)], check=True)
        try:
            with Platform(state) as platform:
                big = write_model(tmp_path / "big", mebibytes=40)
                with pytest.raises(CommandError) as failed:
                    platform.run("model", "push", "big", str(big))
                assert failed.value.error["kind"] == "storage_full"
                assert failed.value.error["next_step"]
                assert platform.run("model", "ls") == []
                small = write_model(tmp_path / "small")
                assert platform.run("model", "push", "small", str(small))["new_bytes"] > 0
        finally:
            subprocess.run(["umount", str(state)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_and_a_dead_process_take_nothing_down() -> None:
    """The platform serves on, restarts what died, refuses what must be written, and recovers by itself."""
    with short_folder() as state:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(state)], check=True)
        try:
            with Platform(state) as platform:
                platform.deploy("basic.py:Echo", "steadfast")
                call = ("call", "steadfast/echo", '{"text": "x"}')
                assert platform.run(*call)["text"] == "x"
                fill = state / "fill"
                fill_up(fill)
                platform.kill("gateway")
                wait_until(lambda: _answers(platform, call), "a new gateway serves")
                with pytest.raises(CommandError) as refused:
                    platform.run("scale", "steadfast", "--max", "2")
                assert refused.value.error["kind"] == "storage_full"
                fill.unlink()
                assert platform.run("scale", "steadfast", "--max", "2")["max"] == 2
                assert platform.run(*call)["text"] == "x"
        finally:
            subprocess.run(["umount", str(state)], check=True)


def fill_up(path: Path) -> None:
    with suppress(OSError), open(path, "wb", buffering=0) as file:
        while file.write(bytes(1 << 16)):
            pass


def _answers(platform: Platform, call: tuple[str, ...]) -> bool:
    try:
        return bool(platform.run(*call))
    except CommandError:
        return False


def test_a_push_that_is_killed_can_be_repeated(platform: Platform, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", mebibytes=200)
    command = [str(SNOWDROP), "--state", str(platform.state), "model", "push", "killed", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        first = files(platform.state / "origin")
        while process.poll() is None and files(platform.state / "origin") == first:
            pass
    finally:
        process.kill()
        process.wait()
    assert "killed" not in {model["name"] for model in platform.run("model", "ls")}
    done = platform.run("model", "push", "killed", str(folder))
    assert done["reused_bytes"] + done["new_bytes"] >= 200 << 20
    assert done["reused_bytes"] > 0, "what the first push had stored is not stored again"
    platform.run("model", "rm", "killed")


def files(folder: Path) -> set[str]:
    """The objects of an origin; what is still being written has a longer name."""
    return {path.name for path in folder.rglob("*") if path.is_file() and len(path.name) == 64}

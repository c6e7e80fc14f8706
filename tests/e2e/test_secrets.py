"""A secret on its whole way: into the service, and nowhere else."""

import hashlib
import subprocess
from pathlib import Path

import pytest

from e2e_platform import SNOWDROP, CommandError, Platform, session, short_folder, wait_until
from snowdrop.domain.secret import SECRETS_FOLDER

pytestmark = [pytest.mark.anyio, pytest.mark.e2e]
VALUE = "hf_Zq8sVt3xW5-secret-value"
NEXT = "hf_Kd7nXb1mQ2-secret-value"

SERVICE = f"""
import hashlib, os, pathlib
import snowdrop as sd

print("at import", os.environ.get("HF_TOKEN"))

@sd.service(scale=sd.Scale(min=0, max=1, idle_s=600), secrets={{"HF_TOKEN": "hf-token", "file:t.pem": "hf-token"}},
            resources=sd.ResourceSpec(memory_bytes_max=256 << 20), rollout=sd.Rollout(prove_s=0.0), park_s_max=0.0)
class Secretive:
    @sd.startup
    def start(self) -> None:
        if pathlib.Path("/app/fail").exists():
            raise RuntimeError("cannot log in with " + os.environ["HF_TOKEN"])

    @sd.endpoint("/digest")
    def digest(self) -> list[str]:
        file = pathlib.Path(os.environ["SNOWDROP_SECRETS"], "t.pem")
        assert file.stat().st_mode & 0o777 == 0o600, file
        assert str(file).startswith({SECRETS_FOLDER!r}), file
        initial = pathlib.Path("/proc/self/environ").read_text()
        texts = [os.environ["HF_TOKEN"], file.read_text()]
        return [hashlib.sha256(text.encode()).hexdigest() for text in texts] + [str(texts[0] in initial)]
"""


def put(platform: Platform, value: str) -> None:
    command = [SNOWDROP, "--state", str(platform.state), "secret", "set", "hf-token"]
    subprocess.run(command, input=value.encode() + b"\n", check=True, capture_output=True)


async def digests(platform: Platform) -> list[str]:
    async with session() as http, http.post(f"{platform.url}/secretive/digest", json={}) as answer:
        assert answer.status == 200, await answer.text()
        found: list[str] = await answer.json()
        return found


def expected(value: str) -> list[str]:
    return [hashlib.sha256(value.encode()).hexdigest()] * 2 + ["False"]


async def test_a_secret_reaches_its_service_and_nothing_else(own_platform: Platform, tmp_path: Path) -> None:
    platform = own_platform
    (tmp_path / "service.py").write_text(SERVICE)
    target = str(tmp_path / "service.py")
    with pytest.raises(AssertionError) as refused:
        platform.run("deploy", target, "--name", "secretive")
    assert "there is no secret 'hf-token'" in str(refused.value)
    put(platform, VALUE)
    platform.run("deploy", target, "--name", "secretive")
    assert await digests(platform) == expected(VALUE)
    processes = b"".join(_read(path) for path in Path("/proc").glob("[0-9]*/cmdline"))
    assert VALUE.encode() not in processes

    # A change is for the next start; `restart` makes one without a gap. So does a new key of the platform.
    put(platform, NEXT)
    assert await digests(platform) == expected(VALUE)
    assert platform.run("secret", "rotate-key")["rewrapped"] == 1
    platform.run("restart", "secretive")

    def done() -> bool:
        return platform.run("rollout", "status", "secretive")["active"] is None

    wait_until(done, "the restart is done")
    assert await digests(platform) == expected(NEXT)

    # A failing start tells of itself, but not the secret.
    (tmp_path / "fail").touch()
    platform.run("deploy", target, "--name", "secretive")
    wait_until(lambda: platform.run("rollout", "status", "secretive")["active"] is None, "it was rolled back")
    ended = platform.run("rollout", "status", "secretive")["ended"][0]
    assert "cannot log in with [secret]" in ended["reason"]

    told = [platform.run(*words) for words in (["describe", "secretive"], ["ps"], ["receipts"], ["secret", "ls"])]
    log = platform.state / "logs"
    printed = b"".join(_read(path) for path in log.rglob("*") if path.is_file())
    assert b"at import [secret]" in printed
    assert "cannot log in with [secret]" in str(told)
    platform.run("down")
    kept = {path: _read(path) for path in platform.state.rglob("*") if path.is_file()}
    assert any(path.name == "control.db" for path in kept)
    for value in (VALUE, NEXT):
        assert value not in str(told)
        assert not [path for path, data in kept.items() if value.encode() in data]
    platform.up()
    assert await digests(platform) == expected(NEXT), "after a restart, from the database"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


VOLUMES = """
import os, pathlib
from typing import Any
import snowdrop as sd

@sd.service(scale=sd.Scale(min=2, max=2), concurrency=1, park_s_max=0.0,
            volumes=[sd.Volume(target="/data/mine", name="cache"),
                     sd.Volume(target="/data/same", name="cache", read_only=True),
                     sd.Volume(target="/sets", host={host!r}, read_only=True)],
            resources=sd.ResourceSpec(memory_bytes_max=256 << 20))
class Keeper:
    @sd.endpoint("/keep")
    def keep(self, text: str) -> dict[str, Any]:
        with open("/data/mine/log", "a") as log:
            log.write(text)
        refused = []
        for path in ("/data/same/x", "/sets/x"):
            try:
                pathlib.Path(path).write_text("x")
            except OSError:
                refused.append(path)
        return {{"log": pathlib.Path("/data/same/log").read_text(), "refused": refused,
                "sets": os.listdir("/sets"), "seen": sorted(os.listdir("/data")),
                "where": os.environ["SNOWDROP_VOLUME_DATA_MINE"]}}
"""


async def test_volumes_outlive_and_are_shared_by_replicas(tmp_path: Path) -> None:
    shared = tmp_path / "sets"
    shared.mkdir()
    (shared / "a.txt").write_text("a")
    for path in (shared, *shared.parents):
        if path.is_relative_to(shared.parents[2]):
            path.chmod(0o755)
    (tmp_path / "service.py").write_text(VOLUMES.format(host=str(shared)))
    target = str(tmp_path / "service.py")
    with short_folder() as state:
        state.joinpath("config.toml").write_text(f'[agent]\nvolumes_read_only = "{shared}"\n')
        with Platform(state) as platform:
            with pytest.raises(CommandError) as refused:
                platform.run("deploy", target, "--name", "keeper")
            assert "snowdrop volume create cache" in refused.value.error["next_step"]
            platform.run("volume", "create", "cache")
            platform.run("deploy", target, "--name", "keeper")
            wait_until(lambda: platform.view("keeper")["ready"] == 2, "two replicas are ready")
            async with session() as http:
                for text, log in (("a", "a"), ("b", "ab"), ("c", "abc"), ("d", "abcd")):
                    async with http.post(f"{platform.url}/keeper/keep", json={"text": text}) as answer:
                        told = await answer.json()
                    assert told["log"] == log
                    assert told["refused"] == ["/data/same/x", "/sets/x"]
                    assert (told["sets"], told["seen"]) == (["a.txt"], ["mine", "same"])
            with pytest.raises(CommandError) as used:
                platform.run("volume", "rm", "cache")
            assert "used by keeper" in used.value.error["message"]
            platform.run("delete", "keeper")
            (view,) = platform.run("volume", "ls")
            assert (view["files"], view["used_by"]) == (1, [])
            platform.run("volume", "rm", "cache")

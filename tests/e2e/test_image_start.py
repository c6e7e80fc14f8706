"""A start in a mounted image on the command line: what it reads is kept, shown, and there for the next one."""

import subprocess
import tarfile
from pathlib import Path

import pytest

from content_helpers import noise
from e2e_platform import CommandError, Platform, wait_until
from fuse_helpers import needs_fuse
from image_helpers import Layout, member, tar

pytestmark = needs_fuse

START = "python -m app"
WANTED_BYTES, UNWANTED_BYTES = 2 << 20, 6 << 20
EIGHT_MIB = WANTED_BYTES + UNWANTED_BYTES


def cat(path: Path) -> bytes:
    return subprocess.run(["cat", str(path)], check=True, capture_output=True, timeout=60).stdout


def test_a_start_is_recorded_shown_and_its_image_completed(own_platform: Platform, tmp_path: Path) -> None:
    wanted = noise(WANTED_BYTES, 1)
    layer = tar(
        member("app", tarfile.DIRTYPE, mode=0o755),
        member("app/never", data=noise(UNWANTED_BYTES, 2)),
        member("app/read", data=wanted),
    )
    layout = Layout([(layer, "plain")]).write(tmp_path / "layout")
    own_platform.run("image", "push", "app", f"oci:{layout}:latest", "--platform", "linux/amd64")
    with pytest.raises(CommandError) as failed:
        own_platform.run("image", "ready", str(tmp_path / "one"))
    assert failed.value.error["kind"] == "not_found"
    assert own_platform.run("image", "trace", "show", "app")["traces"] == []

    own_platform.run("image", "mount", "app", str(tmp_path / "one"), "--start", START)
    assert cat(tmp_path / "one/app/read") == wanted
    told = own_platform.run("image", "ready", str(tmp_path / "one"))
    assert (told["is_known"], told["foreseen_bytes"]) == (True, 0)
    assert WANTED_BYTES <= told["recorded_bytes"] < UNWANTED_BYTES
    assert told["missed_bytes"] >= WANTED_BYTES

    wait_until(lambda: own_platform.run("image", "trace", "show", "app")["traces"], "the trace is kept")
    (shown,) = own_platform.run("image", "trace", "show", "app")["traces"]
    assert shown["start"] == START
    assert shown["read_bytes"] == told["recorded_bytes"]
    assert shown["read_share"] == pytest.approx(shown["read_bytes"] / EIGHT_MIB)
    assert shown["read_bytes"] <= shown["fetched_bytes"] < EIGHT_MIB
    assert 0 < shown["chunks"] < shown["chunks_total"]
    assert shown["top_files"][0] == {"path": "app/read", "read_bytes": WANTED_BYTES, "size_bytes": WANTED_BYTES}

    cache = own_platform.state / "cache"
    wait_until(lambda: list(cache.rglob("tree/data")), "the image is completed behind")
    again = own_platform.run("image", "ready", str(tmp_path / "one"))
    assert again["late_bytes"] == 0
    own_platform.run("image", "unmount", str(tmp_path / "one"))
    own_platform.run("image", "mount", "app", str(tmp_path / "two"), "--start", START)
    assert cat(tmp_path / "two/app/read") == wanted

    def told_again() -> dict[str, int]:
        return own_platform.run("image", "ready", str(tmp_path / "two"))

    wait_until(lambda: told_again()["foreseen_bytes"] >= WANTED_BYTES, "the trace is used")
    assert told_again()["missed_bytes"] == 0
    own_platform.run("image", "unmount", str(tmp_path / "two"))

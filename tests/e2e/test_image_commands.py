"""Images on the command line: pushed, shown, read at a directory across the agent's death, taken away."""

from __future__ import annotations

import hashlib
import subprocess
import tarfile
from pathlib import Path

import pytest

from content_helpers import noise
from e2e_platform import CommandError, Platform, wait_until
from fuse_helpers import needs_fuse
from image_helpers import Layout, member, tar

pytestmark = [pytest.mark.anyio, needs_fuse]

LARGE = noise(24 << 20, 3)
CONFIG = {"Env": ["LANG=C.UTF-8"], "Entrypoint": ["/bin/serve"], "WorkingDir": "/srv", "User": "1000"}


def made(folder: Path) -> None:
    """Two layers: the second one takes a file of the first away and replaces another."""
    first = tar(
        member("bin", tarfile.DIRTYPE, mode=0o755),
        member("bin/serve", data=b"#!/bin/sh\n", mode=0o755),
        member("srv", tarfile.DIRTYPE, mode=0o750),
        member("srv/large", data=LARGE),
        member("srv/old", data=b"old"),
        member("srv/gone", data=b"gone"),
    )
    second = tar(
        member("srv/.wh.gone"),
        member("srv/old", data=b"new"),
        member("srv/link", tarfile.SYMTYPE, linkname="large"),
    )
    Layout([(first, "gzip"), (second, "zstd")], run=CONFIG).write(folder)


LOOK = "ls srv && sha256sum < srv/link && cat srv/old && stat -c ' %a' bin/serve"
SEEN = f"large\nlink\nold\n{hashlib.sha256(LARGE).hexdigest()}  -\nnew 755\n"


def is_as_pushed(at: Path) -> bool:
    """In a process of its own, which can be ended if it hangs."""
    done = subprocess.run(["sh", "-c", LOOK], cwd=at, check=False, capture_output=True, text=True, timeout=60)
    return done.stdout == SEEN


async def test_an_image_is_pushed_shown_mounted_and_removed(own_platform: Platform, tmp_path: Path) -> None:
    made(tmp_path / "layout")
    source = f"oci:{tmp_path / 'layout'}"
    first = own_platform.run("image", "push", "served", source)
    assert first["new_bytes"] > len(LARGE)
    again = own_platform.run("image", "push", "served", source)
    assert again["new_bytes"] == 0, "what the origin has is not stored twice"
    assert again["image"]["artefact"]["manifest"] == first["image"]["artefact"]["manifest"]

    assert [entry["name"] for entry in own_platform.run("image", "ls")] == ["served"]
    shown = own_platform.run("image", "show", "served")
    assert shown["config"]["entrypoint"] == CONFIG["Entrypoint"]
    assert shown["config"]["user"] == CONFIG["User"]
    assert shown["counts"] == {"dir": 3, "file": 3, "symlink": 1}

    at = tmp_path / "root"
    own_platform.run("image", "mount", "served", str(at))
    assert is_as_pushed(at)
    own_platform.kill_agent()
    wait_until(lambda: is_as_pushed(at), "the next agent shows it again")
    own_platform.run("image", "unmount", str(at))
    assert not at.exists() or not list(at.iterdir())

    own_platform.run("image", "rm", "served")
    assert own_platform.run("image", "ls") == []
    with pytest.raises(CommandError) as failed:
        own_platform.run("image", "mount", "served", str(at))
    assert failed.value.error["kind"] == "not_found"


async def test_what_is_no_image_is_refused_by_name(own_platform: Platform, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_bytes(b"{}")
    own_platform.run("model", "push", "plain", str(tmp_path / "model"))
    for command in (("show", "plain"), ("mount", "plain", str(tmp_path / "at")), ("rm", "plain")):
        with pytest.raises(CommandError) as failed:
            own_platform.run("image", *command)
        assert failed.value.error["kind"] == "not_found"
        assert "not an image" in failed.value.error["message"]
    with pytest.raises(CommandError) as failed:
        own_platform.run("image", "push", "empty", f"oci:{tmp_path / 'model'}")
    assert failed.value.error["next_step"]
    assert own_platform.run("image", "ls") == []

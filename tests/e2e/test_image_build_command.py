"""A service's environment made into an image on the command line, and looked at in a directory."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from e2e_platform import CommandError, Platform
from fuse_helpers import needs_fuse
from image_helpers import Layout, member, tar, wheel

pytestmark = [pytest.mark.anyio, needs_fuse]

SERVICE = """
import snowdrop as sd

image = sd.Image.from_pyproject(
    extras=("more",), name="garden", base="oci:{base}", index_url="{index}"
).copy("words.txt", "/srv/words.txt")


@sd.service(image=image)
class Garden:
    @sd.endpoint("/x")
    async def x(self) -> str:
        return "x"
"""
PROJECT = """
[project]
name = "garden"
dependencies = ["petal"]
[project.optional-dependencies]
more = ["stem"]
"""


async def test_an_environment_is_built_from_its_lock(
    own_platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    index = tmp_path / "index"
    wheel(index, "1.0")
    wheel(index, "2.0", name="stem")
    base = Layout([(tar(member("bin/sh", data=b"sh", mode=0o755)), "gzip")]).write(tmp_path / "base")
    code = tmp_path / "code"
    code.mkdir()
    (code / "service.py").write_text(SERVICE.format(base=base, index=index.as_uri()))
    (code / "pyproject.toml").write_text(PROJECT)
    (code / "words.txt").write_text("snow")
    service = str(code / "service.py")

    with pytest.raises(CommandError, match="there is no lock"):
        own_platform.run("image", "build", service, "--locked")
    first = own_platform.run("image", "build", service)
    wheel(index, "1.1")
    again = own_platform.run("image", "build", service, "--locked")
    assert again["image"]["artefact"]["manifest"] == first["image"]["artefact"]["manifest"]
    assert again["new_bytes"] == 0

    at = tmp_path / "root"
    own_platform.run("image", "mount", "garden", str(at))
    look = "cat srv/words.txt opt/snowdrop/env/petal/__init__.py opt/snowdrop/env/stem/__init__.py bin/sh"
    done = subprocess.run(["sh", "-c", look], cwd=at, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == "snowversion = '1.0'\nversion = '2.0'\nsh"
    own_platform.run("image", "unmount", str(at))

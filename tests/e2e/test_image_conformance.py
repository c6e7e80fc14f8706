"""Images that others' tools made: our tree against what `umoci unpack` makes of them, in everything it shows."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from image_helpers import Pushed, seen_in_directory, seen_in_tree
from snowdrop.image.oci import Platform
from snowdrop.image.opening import ReachOptions, open_image

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(os.geteuid() != 0, reason="umoci unpacks owners as root only"),
    pytest.mark.skipif(
        any(shutil.which(tool) is None for tool in ("umoci", "skopeo", "buildah")),
        reason="scripts/setup.sh installs umoci, skopeo and buildah",
    ),
]
REACH = ReachOptions(platform=Platform())


def run(*words: str | Path, **env: str) -> None:
    done = subprocess.run(words, capture_output=True, timeout=120, env={**os.environ, **env}, check=False)
    assert done.returncode == 0, (words, done.stderr.decode(errors="replace"))


def populate(root: Path) -> None:
    """What a root directory may hold."""
    for folder in ("etc", "usr/bin", "usr/lib/deep/er", "opq/sub", "gone"):
        (root / folder).mkdir(parents=True)
    (root / "etc" / "passwd").write_bytes(b"root:x:0:0::/:/bin/sh\n")
    (root / "usr" / "bin" / "tool").write_bytes(b"#!/bin/sh\n" * 100)
    (root / "usr" / "bin" / "tool").chmod(0o755)
    os.link(root / "usr/bin/tool", root / "usr/bin/tool-too")
    os.link(root / "usr/bin/tool", root / "usr/lib/deep/tool-three")
    (root / "usr" / "lib" / "big").write_bytes(os.urandom(3 << 20) + bytes(1 << 20))
    (root / "bin").symlink_to("usr/bin")
    (root / "dangling").symlink_to("/no/where")
    (root / "opq" / "sub" / "old").write_bytes(b"old")
    (root / "gone" / "file").write_bytes(b"gone")
    (root / "empty").write_bytes(b"")
    odd = os.fsencode(root) + b"/usr/lib/deep/er/\xff\xfe odd\nname"
    Path(os.fsdecode(odd)).write_bytes(b"odd")
    (root / "usr" / "lib" / ("long" * 30)).mkdir()
    (root / "usr" / "lib" / ("long" * 30) / ("name" * 40)).write_bytes(b"x")
    os.setxattr(root / "etc" / "passwd", "user.note", b"any\0\xffbytes")
    os.chown(root / "etc" / "passwd", 1234, 4_000_000)
    os.mkfifo(root / "etc" / "fifo")
    (root / "sticky").mkdir()
    (root / "sticky").chmod(0o1777)
    os.utime(root / "etc" / "passwd", ns=(1, 1_600_000_000_123_456_789))
    os.utime(root / "empty", ns=(1, 86_400_000_000_000))


def change(root: Path) -> None:
    """A layer on top."""
    shutil.rmtree(root / "gone")
    shutil.rmtree(root / "opq")
    (root / "opq").mkdir()
    (root / "opq" / "new").write_bytes(b"new")
    (root / "empty").unlink()
    (root / "empty").mkdir()
    (root / "usr" / "bin" / "tool-too").unlink()
    (root / "usr" / "bin" / "tool-too").write_bytes(b"of its own now")
    (root / "etc").chmod(0o700)
    os.setxattr(root / "etc", "user.dir", b"1")


def umoci_image(tmp: Path) -> Path:
    layout = tmp / "made"
    run("umoci", "init", "--layout", layout)
    run("umoci", "new", "--image", f"{layout}:t")
    for number, alter in enumerate((populate, change)):
        bundle = tmp / f"bundle{number}"
        run("umoci", "unpack", "--image", f"{layout}:t", bundle)
        alter(bundle / "rootfs")
        run("umoci", "repack", "--image", f"{layout}:t", bundle)
    run("umoci", "config", "--image", f"{layout}:t", "--config.env", "A=b c", "--config.workingdir", "/usr")
    return layout


def buildah_image(tmp: Path) -> Path:
    storage = ("--root", str(tmp / "storage"), "--runroot", str(tmp / "run"), "--storage-driver", "vfs")

    def buildah(*words: str) -> str:
        done = subprocess.run(("buildah", *storage, *words), capture_output=True, timeout=120, check=False)
        assert done.returncode == 0, (words, done.stderr.decode(errors="replace"))
        return done.stdout.decode().strip()

    base = "scratch"
    for number, alter in enumerate((populate, change)):
        container = buildah("from", "--pull-never", base)
        alter(Path(buildah("mount", container)))
        buildah("config", "--env", "A=b c", "--workingdir", "/usr", container)
        base = f"localhost/step{number}"
        buildah("commit", "--format", "oci", container, base)
    buildah("push", base, f"oci:{tmp / 'made'}:t")
    buildah("rm", "--all")
    buildah("rmi", "--all", "--force")
    return tmp / "made"


@pytest.mark.parametrize("make", [umoci_image, buildah_image])
@pytest.mark.parametrize("codec", ["gzip", "zstd", "docker"])
def test_the_tree_is_what_umoci_unpacks(make: Any, codec: str, tmp_path: Path) -> None:
    made = make(tmp_path)
    source = f"oci:{made}:t"
    if codec == "zstd":
        run(
            "skopeo",
            "copy",
            "--insecure-policy",
            "--dest-compress-format",
            "zstd",
            source,
            f"oci:{tmp_path}/zstd:t",
        )
        source = f"oci:{tmp_path}/zstd:t"
    if codec == "docker":
        archive = f"docker-archive:{tmp_path}/saved.tar:name:t"
        run("skopeo", "copy", "--insecure-policy", source, archive)
        source = f"docker-archive:{tmp_path}/saved.tar"
    bundle = tmp_path / "unpacked"
    run("umoci", "unpack", "--keep-dirlinks", "--image", f"{made}:t", bundle)
    image, _ = open_image(source, REACH)
    with image.read_layer(image.image().layers[-1], 0) as read:
        assert read(4).startswith({"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "docker": b""}[codec])
    pushed = Pushed(image, tmp_path / "layers")
    ours, theirs = seen_in_tree(pushed.tree(), pushed.data()), seen_in_directory(bundle / "rootfs")
    assert sorted(ours) == sorted(theirs)
    assert {path: (ours[path], theirs[path]) for path in ours if ours[path] != theirs[path]} == {}
    assert b"usr/lib/deep/er/\xff\xfe odd\nname" in ours
    config = pushed.tree().config
    assert (config.env[-1], config.workdir) == ("A=b c", "/usr")

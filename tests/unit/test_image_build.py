"""Builds of environments: locks, layers that are kept, the same tree from the same lock, refusals."""

import base64
import hashlib
import os
import select
from contextlib import closing
from pathlib import Path

import pytest

from image_helpers import Layout, Pushed, member, names, tar, wheel
from snowdrop.domain.errors import (
    ConflictError,
    InvalidInputError,
    NotFoundError,
    SnowdropError,
    StorageFullError,
    TimedOutError,
)
from snowdrop.domain.service import Image
from snowdrop.image.build import build as building
from snowdrop.image.build.build import BuildOptions, build_image
from snowdrop.image.build.cache import BuildCache, chain_key, write_tar
from snowdrop.image.build.tools import ToolFailed, run_tool
from snowdrop.image.oci import Platform
from snowdrop.image.opening import ReachOptions

BASE = Layout([(tar(member("bin/sh", data=b"sh" * 3000, mode=0o755)), "plain")], {"Env": ["PATH=/bin", "A=1"]})
ENV = "opt/snowdrop/env"


class Place:
    """A service's folder, an index and a cache of builds."""

    def __init__(self, root: Path, index: Path) -> None:
        self.root = root
        self.code = root / "code"
        (self.code / "data").mkdir(parents=True)
        (self.code / "data" / "words.txt").write_text("snow\n")
        (self.code / "data" / "link").symlink_to("words.txt")
        (self.code / "run.sh").write_text("#!/bin/sh\n")
        (self.code / "run.sh").chmod(0o700)
        self.base = BASE.write(root / "base")
        self.index = index
        self.lock = self.code / "service.lock"

    def image(self, *requirements: str) -> Image:
        image = Image(requirements=requirements, base=f"oci:{self.base}", index_url=self.index.as_uri())
        return image.copy("data", "/srv/data").copy("run.sh", "/srv/run.sh")

    def push(self, image: Image, *, locked: bool = False, upgrade: bool = False) -> Pushed:
        options = BuildOptions(
            lock=self.lock, reach=ReachOptions(platform=Platform()), locked=locked, upgrade=upgrade
        )
        with closing(BuildCache(self.root / "cache")) as cache:
            built = build_image(image, self.code, cache, options)
            return Pushed(built.source, self.root / "layers", fetch=built.fetch)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    wheel(tmp_path / "index", "1.0", needs="stem")
    wheel(tmp_path / "index", "2.0", name="stem")
    return tmp_path / "index"


@pytest.fixture
def place(tmp_path: Path, index: Path) -> Place:
    return Place(tmp_path / "one", index)


def test_the_same_lock_gives_the_same_image_in_another_folder(tmp_path: Path, place: Place) -> None:
    first = place.push(place.image("petal"))
    wheel(place.index, "1.1", needs="stem")  # newer, but the lock says another one
    other = Place(tmp_path / "elsewhere" / "two", place.index)
    other.base = place.base
    other.lock.write_bytes(place.lock.read_bytes())
    (other.code / "run.sh").touch()
    again = other.push(other.image("petal"), locked=True)
    assert again.pushed.result.artefact == first.pushed.result.artefact
    assert b"petal==1.0" in other.lock.read_bytes()
    other.push(other.image("petal"), upgrade=True)
    assert b"petal==1.1" in other.lock.read_bytes()


def test_the_tree_holds_base_packages_and_copies(place: Place) -> None:
    pushed = place.push(place.image("petal"))
    tree, data = pushed.tree(), pushed.data()
    found = {entry.path.decode(): entry for entry in tree.entries}
    assert {"bin/sh", f"{ENV}/petal/__init__.py", f"{ENV}/stem/__init__.py"} <= found.keys()
    assert found["srv/run.sh"].mode == 0o755
    assert found["srv/data/words.txt"].mode == 0o644
    assert found["srv/data/link"].target == b"words.txt"
    assert tree.config.env == (f"PATH=/{ENV}/bin:/bin", "A=1", f"PYTHONPATH=/{ENV}")
    script = found[f"{ENV}/bin/petal"]
    content = data[script.offset : script.offset + script.size]
    assert content.startswith(b"#!/usr/bin/env python3\n")
    record = found[f"{ENV}/petal-1.0.dist-info/RECORD"]
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    rows = data[record.offset : record.offset + record.size].decode().splitlines()
    assert f"bin/petal,sha256={digest},{len(content)}" in rows
    assert str(place.root).encode() not in data


def test_what_was_made_is_not_made_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    class KilledError(Exception):
        pass

    def killed(*_: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(building, "_copied", killed)
        with pytest.raises(KilledError):
            place.push(place.image("petal"))
    monkeypatch.setattr(building, "install", killed)
    pushed = place.push(place.image("petal"))
    assert f"{ENV}/petal".encode() in names(pushed.tree().entries)
    assert not [path for path in (place.root / "cache").iterdir() if path.name.startswith("work-")]


def test_a_damaged_layer_is_made_again(place: Place) -> None:
    first = place.push(place.image("petal"))
    for path in (place.root / "cache").glob("*.tar"):
        path.write_bytes(path.read_bytes().replace(b"version", b"damaged"))
    assert place.push(place.image("petal")).pushed.result.artefact == first.pushed.result.artefact


def test_a_wheel_that_was_changed_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.push(place.image("petal"))
    wheel(place.index, "1.0", needs="stem>=1")
    monkeypatch.setenv("UV_CACHE_DIR", str(place.root / "uv"))
    for path in (place.root / "cache").glob("*.tar"):
        path.unlink()
    with pytest.raises(SnowdropError, match=r"[Hh]ash mismatch"):
        place.push(place.image("petal"), locked=True)


def test_a_pin_without_a_digest_is_refused(place: Place) -> None:
    place.push(place.image("petal"))
    head = place.lock.read_text().splitlines()[:3]
    place.lock.write_text("\n".join([*head, "petal==1.0", "stem==2.0", ""]))
    with pytest.raises(SnowdropError, match="hash"):
        place.push(place.image("petal"), locked=True)


def test_locked_wants_the_lock_of_what_is_asked(place: Place) -> None:
    with pytest.raises(ConflictError, match="there is no lock"):
        place.push(place.image("petal"), locked=True)
    place.push(place.image("petal"))
    with pytest.raises(ConflictError, match="other requirements"):
        place.push(place.image("petal", "stem<2"), locked=True)
    lock = place.lock.read_text().splitlines()
    lock[2] = f"# base: sha256:{'0' * 64}"
    place.lock.write_text("\n".join(lock))
    with pytest.raises(ConflictError, match="the lock says sha256:0000"):
        place.push(place.image("petal"))
    place.lock.write_text("petal\n")
    with pytest.raises(InvalidInputError, match="no lock of an image"):
        place.push(place.image("petal"))


def test_requirements_without_a_solution_are_told(place: Place) -> None:
    with pytest.raises(InvalidInputError, match="petal") as told:
        place.push(place.image("petal>5"))
    assert "wheels" in told.value.next_step
    assert not place.lock.exists()


@pytest.mark.parametrize(
    ("source", "target", "error"),
    [
        ("../base", "/x", InvalidInputError),
        ("data", "x", InvalidInputError),
        ("data", "/a/../b", InvalidInputError),
        ("data", "/", InvalidInputError),
        ("absent", "/x", NotFoundError),
    ],
)
def test_a_copy_stays_in_its_folders(source: str, target: str, error: type[SnowdropError], place: Place) -> None:
    with pytest.raises(error):
        place.push(place.image().copy(source, target))


def test_a_debian_base_has_its_own_python(place: Place) -> None:
    with pytest.raises(InvalidInputError, match=r"no Python 3\.9"):
        place.push(Image(base="debian:bookworm", python="3.9"))


def test_the_cache_has_a_bound_and_one_user(tmp_path: Path) -> None:
    with closing(BuildCache(tmp_path, bytes_max=25)) as cache:
        with pytest.raises(ConflictError, match="another build"):
            BuildCache(tmp_path)
        cache.layer(chain_key("a"), lambda path: path.write_bytes(b"a" * 10) and None)
    with closing(BuildCache(tmp_path, bytes_max=25)) as cache:
        cache.layer(chain_key("b"), lambda path: path.write_bytes(b"b" * 20) and None)
        assert [path.stem for path in tmp_path.glob("*.tar")] == [chain_key("b")]
        with pytest.raises(StorageFullError, match="build_cache_bytes_max=25"):
            cache.layer(chain_key("c"), lambda path: path.write_bytes(b"c" * 20) and None)


def test_a_layer_has_a_bound(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(11))
    with pytest.raises(StorageFullError, match="layer_bytes_max=10"):
        write_tar(tmp_path / "x.tar", [("file", tmp_path / "file")], bytes_max=10)


def test_a_tool_that_takes_too_long_is_ended_with_what_it_started(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "alive")
    reader = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)
    try:
        command = ["sh", "-c", f"exec 3>{tmp_path}/alive; echo up >&3; sleep 100 & wait"]
        with pytest.raises(TimedOutError, match="take_s_max"):
            run_tool(command, bound="take_s_max", seconds_max=0.5, env={})
        assert os.read(reader, 10) == b"up\n"
        # The end comes once the last process that has the pipe open is gone.
        assert select.select([reader], [], [], 30.0)[0]
        assert os.read(reader, 10) == b""
    finally:
        os.close(reader)


def test_a_tool_that_fails_says_why() -> None:
    with pytest.raises(ToolFailed, match="why") as failed:
        run_tool(["sh", "-c", "echo why >&2; exit 3"], bound="x_s_max", seconds_max=30.0, env={})
    assert failed.value.code == 3


def test_an_index_that_is_not_there_may_be_tried_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    image = Image(requirements=("petal",), base=f"oci:{place.base}", index_url="http://127.0.0.1:9/simple")
    with pytest.raises(SnowdropError) as told:
        place.push(image)
    assert told.value.retryable


def test_a_new_requirement_moves_no_other_package(place: Place) -> None:
    place.push(place.image("petal"))
    wheel(place.index, "1.1", needs="stem")
    wheel(place.index, "3.0", name="root")
    place.push(place.image("petal", "root"))
    assert b"petal==1.0" in place.lock.read_bytes()
    assert b"root==3.0" in place.lock.read_bytes()


DEBOOTSTRAP = """#!/bin/sh
echo "$SOURCE_DATE_EPOCH" "$@" >>{log}
case "$*" in *absent*) echo "no package absent" >&2; exit 25;; esac
for last; do path=$here; here=$last; done
cp {base} "$path"
"""


def test_a_debian_base_has_its_packages_and_is_made_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    (place.root / "base.tar").write_bytes(tar(member("bin/sh", data=b"sh")))
    tool = place.root / "tools" / "mmdebstrap"
    tool.parent.mkdir()
    tool.write_text(DEBOOTSTRAP.format(log=place.root / "log", base=place.root / "base.tar"))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    for _ in range(2):
        pushed = place.push(Image().apt("ffmpeg").apt("git=1:2.0-1"))
        assert b"bin/sh" in names(pushed.tree().entries)
    (run,) = (place.root / "log").read_text().splitlines()
    assert run.startswith("315532800 ")
    assert "--include=ca-certificates,ffmpeg,git=1:2.0-1,python3 bookworm" in run
    with pytest.raises(SnowdropError, match="no package absent"):
        place.push(Image().apt("absent"))
    with pytest.raises(InvalidInputError, match="is no package"):
        place.push(Image().apt("a,b"))
    with pytest.raises(InvalidInputError, match="takes no Debian packages"):
        place.push(place.image().apt("ffmpeg"))

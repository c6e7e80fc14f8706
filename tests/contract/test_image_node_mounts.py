"""Images mounted on a node: held by the agent's side, data served by a real data plane that may die."""

import errno
import hashlib
import os
import signal
import subprocess
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from content_helpers import noise, settings_for
from fuse_helpers import needs_fuse
from image_helpers import Layout, member, seen_in_directory, seen_in_tree, tar
from snowdrop.agent.content import DataPlaneKeeper
from snowdrop.agent.dataplane.client import DataPlane
from snowdrop.agent.imagecontent import open_image
from snowdrop.agent.mounts import ModelMounts
from snowdrop.content.fuse.mount import MOUNTINFO
from snowdrop.content.imageread import read_file, read_tree
from snowdrop.content.ingest import PushOptions
from snowdrop.content.keys import PUBLIC_HASHER
from snowdrop.content.layout import manifest_key
from snowdrop.content.manifest import decode_manifest
from snowdrop.content.origin import DirectoryOrigin
from snowdrop.domain.ids import DEFAULT_TENANT
from snowdrop.domain.manifest import ArtefactRef
from snowdrop.image.mount import methods as methods_module
from snowdrop.image.mount.kernel import possible_methods
from snowdrop.image.mount.methods import ErofsMount
from snowdrop.image.mount.port import Method
from snowdrop.image.oci import parse_platform
from snowdrop.image.opening import ReachOptions
from snowdrop.image.opening import open_image as open_image_source
from snowdrop.image.push import ImageOptions, push_image
from snowdrop.image.unpack import LayerFolder
from snowdrop.wire.mounts import PersonalMount

pytestmark = [pytest.mark.anyio, needs_fuse]

WAIT_S_MAX = 60.0
BIG = noise(6 << 20, 1)
SMALL = noise(10_000, 2)
served_methods = pytest.mark.parametrize("method", [name for name in possible_methods() if name != "unpack"])


class Stage:
    def __init__(self, artefact: ArtefactRef, mounts: ModelMounts, keeper: DataPlaneKeeper, folder: Path) -> None:
        self.artefact, self.mounts, self.keeper, self.folder = artefact, mounts, keeper, folder

    def plane_pid(self) -> int:
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        (pid,) = [
            int(pid)
            for pid in children
            if b"snowdrop.agent.dataplane" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        return pid

    async def mounted(self, holder: str = "rep-1") -> Path:
        return await self.mounts.mount(DEFAULT_TENANT, self.artefact, holder)


def pushed(folder: Path) -> ArtefactRef:
    layer = tar(
        member("bin", tarfile.DIRTYPE, mode=0o755),
        member("bin/big", data=BIG, mode=0o755, mtime=7),
        member("bin/small", data=SMALL, mode=0o640, uid=7, gid=8),
        member("bin/again", tarfile.LNKTYPE, linkname="bin/small"),
        member("link", tarfile.SYMTYPE, linkname="bin/big"),
    )
    source, _ = open_image_source(
        f"oci:{Layout([(layer, 'plain')]).write(folder / 'layout')}:latest",
        ReachOptions(platform=parse_platform("linux/amd64")),
    )
    layers = LayerFolder(folder / "layers", sleep=lambda _: None)
    try:
        origin = DirectoryOrigin(folder / "origin")
        return push_image(source, origin, layers, PushOptions(kind="image"), ImageOptions()).result.artefact
    finally:
        layers.close()
        source.close()


@asynccontextmanager
async def staged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, method: Method | None = None
) -> AsyncIterator[Stage]:
    """A data plane that is kept alive, and mounts over it, as the agent wires them."""
    artefact = pushed(folder)
    if method is not None:
        monkeypatch.setattr(methods_module, "possible_methods", lambda: (method,))
    settings = settings_for(folder / "cache", origin_url=f"file://{folder / 'origin'}")

    async def renew(plane: DataPlane) -> None:
        await mounts.renew(plane)

    keeper = DataPlaneKeeper(settings, renew)
    mounts = ModelMounts(folder / "cache/mounts", folder / "mounts.json", keeper.current)
    mounts.sweep()
    async with anyio.create_task_group() as tasks:
        await tasks.start(keeper.run)
        try:
            yield Stage(artefact, mounts, keeper, folder)
        finally:
            with anyio.CancelScope(shield=True):
                await mounts.close()
            tasks.cancel_scope.cancel()


def mounts_below(folder: Path) -> list[str]:
    return [line for line in MOUNTINFO.read_text().splitlines() if f" {folder}/" in line]


async def read(path: Path) -> bytes:
    with anyio.fail_after(WAIT_S_MAX):
        return await anyio.to_thread.run_sync(path.read_bytes, abandon_on_cancel=True)


@pytest.mark.parametrize("method", possible_methods())
async def test_an_image_that_was_pushed_is_mounted_as_it_was_until_its_last_holder_is_gone(
    method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with staged(tmp_path, monkeypatch, method) as stage:
        origin = DirectoryOrigin(tmp_path / "origin")
        key = manifest_key("public", stage.artefact.manifest)
        encoded = bytearray(origin.size(key))
        origin.read_range(key, 0, memoryview(encoded))
        manifest = decode_manifest(bytes(encoded), expected=stage.artefact.manifest)
        tree = read_tree(origin, manifest, PUBLIC_HASHER)
        data = read_file(origin, manifest, manifest.files[1], PUBLIC_HASHER)
        at = await stage.mounted("rep-1")
        assert await stage.mounted("rep-2") == at
        seen = await anyio.to_thread.run_sync(seen_in_directory, at)
        assert seen == seen_in_tree(tree, data)
        await stage.mounts.release("rep-1")
        assert await read(at / "bin/small") == SMALL
        await stage.mounts.release("rep-2")
        assert not at.exists()
        assert mounts_below(tmp_path) == []
        assert list((tmp_path / "cache/mounts").rglob("*")) in ([], [tmp_path / "cache/mounts/images"])


@served_methods
async def test_a_dead_data_plane_gives_no_reader_of_an_image_an_error(
    method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with staged(tmp_path, monkeypatch, method) as stage:
        at = await stage.mounted()
        pid = stage.plane_pid()
        os.kill(pid, signal.SIGSTOP)  # so that the read is surely under way when it dies
        reader = subprocess.Popen(["sha256sum", str(at / "bin/big")], stdout=subprocess.PIPE)
        with anyio.move_on_after(0.5):
            await anyio.to_thread.run_sync(reader.wait, abandon_on_cancel=True)
        assert reader.poll() is None
        os.kill(pid, signal.SIGKILL)
        with anyio.fail_after(WAIT_S_MAX):
            output, _ = await anyio.to_thread.run_sync(reader.communicate, abandon_on_cancel=True)
        assert reader.returncode == 0
        assert output.split()[0].decode() == hashlib.sha256(BIG).hexdigest()
        assert stage.keeper.restarts == 1
        assert await read(at / "bin/small") == SMALL


@served_methods
async def test_wrong_bytes_at_the_origin_are_an_error_and_never_served(
    method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with staged(tmp_path, monkeypatch, method) as stage:
        at = await stage.mounted()  # by now the tree is here
        place = BIG[3 << 20 :][:64]
        damaged = 0
        for path in (tmp_path / "origin").rglob("*"):
            content = path.read_bytes() if path.is_file() else b""
            if place in content:
                path.chmod(0o600)
                path.write_bytes(content.replace(place, bytes(64)))
                damaged += 1
        assert damaged == 1
        with pytest.raises(OSError, match="Input/output error") as caught:
            await read(at / "bin/big")
        assert caught.value.errno == errno.EIO
        assert await read(at / "bin/small") == SMALL


@served_methods
async def test_an_origin_that_goes_away_is_an_error_and_its_return_is_enough(
    method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with staged(tmp_path, monkeypatch, method) as stage:
        at = await stage.mounted()
        (tmp_path / "origin").rename(tmp_path / "away")
        with pytest.raises(OSError, match="Input/output error"):
            await read(at / "bin/big")
        (tmp_path / "away").rename(tmp_path / "origin")
        assert await read(at / "bin/big") == BIG


async def test_an_image_that_is_complete_is_read_without_the_data_plane(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "erofs" not in possible_methods():
        pytest.skip("no EROFS over files in this kernel")
    async with staged(tmp_path, monkeypatch, "erofs") as stage:
        content = await open_image(stage.keeper.current, DEFAULT_TENANT, stage.artefact, "test")
        assert content.local_data() is None
        assert content.here_bytes() < len(BIG)
        await content.bring_all()
        assert content.here_bytes() == content.tree.data_bytes
        at = await stage.mounted()
        pid = stage.plane_pid()
        os.kill(pid, signal.SIGSTOP)
        try:
            assert await read(at / "bin/big") == BIG
        finally:
            os.kill(pid, signal.SIGCONT)


async def test_what_an_agent_that_was_killed_left_is_removed_and_mounted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "erofs" not in possible_methods():
        pytest.skip("no EROFS over files in this kernel")
    at = tmp_path / "mine"
    async with staged(tmp_path, monkeypatch, "erofs") as stage:
        wanted = PersonalMount(directory=str(at), tenant=DEFAULT_TENANT, model="i", artefact=stage.artefact)
        await stage.mounts.add(wanted)
        content = await open_image(stage.keeper.current, DEFAULT_TENANT, stage.artefact, "test")
        await content.bring_all()
        await stage.mounts.close()
        left = ErofsMount(content, tmp_path / "cache/mounts/images/left")
        await left.mount(at)
        next_mounts = ModelMounts(tmp_path / "cache/mounts", tmp_path / "mounts.json", stage.keeper.current)
        next_mounts.sweep()
        assert mounts_below(tmp_path) == []
        assert not (tmp_path / "cache/mounts/images/left").exists()
        await next_mounts.restore()
        assert await read(at / "bin/small") == SMALL
        await next_mounts.remove(str(at))
        assert mounts_below(tmp_path) == []

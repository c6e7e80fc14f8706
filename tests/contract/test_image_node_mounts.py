"""Images mounted on a node: held by the agent's side, data served by a real data plane that may die."""

import errno
import hashlib
import os
import signal
import subprocess
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from fuse_helpers import needs_fuse
from image_helpers import seen_in_directory, seen_in_tree
from image_node_helpers import BIG, SMALL, WAIT_S_MAX, mounts_below, read, staged
from snowdrop.agent.imagecontent import open_image
from snowdrop.agent.mounts import ModelMounts
from snowdrop.content.imageread import read_file, read_tree
from snowdrop.content.keys import PUBLIC_HASHER
from snowdrop.content.layout import manifest_key
from snowdrop.content.manifest import decode_manifest
from snowdrop.content.origin import DirectoryOrigin
from snowdrop.domain.ids import DEFAULT_TENANT
from snowdrop.image.mount.kernel import possible_methods
from snowdrop.image.mount.methods import ErofsMount
from snowdrop.image.mount.port import Method
from snowdrop.wire.mounts import PersonalMount

pytestmark = [pytest.mark.anyio, needs_fuse]

served_methods = pytest.mark.parametrize("method", [name for name in possible_methods() if name != "unpack"])


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

"""Mounts of the node: held by the agent's side, served by a real data plane that may die."""

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from content_helpers import noise, push, settings_for
from fuse_helpers import drop_cached, needs_fuse
from snowdrop.agent.content import DataPlaneKeeper
from snowdrop.agent.dataplane.client import DataPlane
from snowdrop.agent.mounts import ModelMounts
from snowdrop.content.fuse.mount import mount_tree, mounted_trees
from snowdrop.content.origin import DirectoryOrigin
from snowdrop.domain.errors import ConflictError, InvalidInputError, NotFoundError
from snowdrop.domain.ids import DEFAULT_TENANT, Digest
from snowdrop.domain.manifest import ArtefactRef
from snowdrop.wire.mounts import PersonalMount

pytestmark = [pytest.mark.anyio, needs_fuse]

WAIT_S_MAX = 60.0
FILES = {"model.gguf": noise(20 << 20, 1), "config.json": b'{"a": 1}', "deep/er/vocab.txt": noise(100_000, 2)}


class Stage:
    def __init__(self, folder: Path, artefact: ArtefactRef, mounts: ModelMounts, keeper: DataPlaneKeeper) -> None:
        self.folder, self.artefact, self.mounts, self.keeper = folder, artefact, mounts, keeper

    def wanted(self, directory: Path, model: str = "m") -> PersonalMount:
        return PersonalMount(directory=str(directory), tenant=DEFAULT_TENANT, model=model, artefact=self.artefact)

    def plane_pid(self) -> int:
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        (pid,) = [
            int(pid)
            for pid in children
            if b"snowdrop.agent.dataplane" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        return pid


def artefact_in(folder: Path) -> ArtefactRef:
    for name, content in FILES.items() if not (folder / "source").exists() else ():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_bytes(content)
    return push(folder / "source", DirectoryOrigin(folder / "origin")).artefact


@asynccontextmanager
async def staged(folder: Path) -> AsyncIterator[Stage]:
    """A data plane that is kept alive, and mounts over it, as the agent wires them."""
    artefact = artefact_in(folder)
    settings = settings_for(folder / "cache", origin_url=f"file://{folder / 'origin'}")

    async def renew(plane: DataPlane) -> None:
        await mounts.renew(plane)

    keeper = DataPlaneKeeper(settings, renew)
    mounts = ModelMounts(folder / "cache/mounts", folder / "mounts.json", keeper.current)
    mounts.sweep()
    async with anyio.create_task_group() as tasks:
        await tasks.start(keeper.run)
        try:
            yield Stage(folder, artefact, mounts, keeper)
        finally:
            with anyio.CancelScope(shield=True):
                await mounts.close()
            tasks.cancel_scope.cancel()


async def sums(directory: Path) -> dict[str, str]:
    """As a shell sees it."""
    script = 'cd "$1" && find . -type f -exec sha256sum {} +'
    with anyio.fail_after(WAIT_S_MAX):
        done = await anyio.run_process(["sh", "-c", script, "sh", str(directory)])
    lines = (line.split("  ./") for line in done.stdout.decode().splitlines())
    return {name: digest for digest, name in lines}


EXPECTED = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}


async def test_a_mount_is_there_until_its_last_holder_is_gone(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        at = await stage.mounts.mount(DEFAULT_TENANT, stage.artefact, "rep-1")
        assert await stage.mounts.mount(DEFAULT_TENANT, stage.artefact, "rep-2") == at
        assert await sums(at) == EXPECTED
        await stage.mounts.release("rep-1")
        assert await sums(at) == EXPECTED
        await stage.mounts.release("rep-2")
        assert mounted_trees(tmp_path) == []
        assert not at.exists()


async def test_a_dead_data_plane_gives_no_reader_an_error(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        at = await stage.mounts.mount(DEFAULT_TENANT, stage.artefact, "rep-1")
        with (at / "config.json").open("rb") as early:
            pid = stage.plane_pid()
            os.kill(pid, signal.SIGSTOP)  # so that the read is surely under way when it dies
            reader = subprocess.Popen(["sha256sum", str(at / "model.gguf")], stdout=subprocess.PIPE)
            with anyio.move_on_after(0.5):
                await anyio.to_thread.run_sync(reader.wait, abandon_on_cancel=True)
            assert reader.poll() is None
            os.kill(pid, signal.SIGKILL)
            with anyio.fail_after(WAIT_S_MAX):
                output, _ = await anyio.to_thread.run_sync(reader.communicate, abandon_on_cancel=True)
            assert reader.returncode == 0
            assert output.split()[0].decode() == EXPECTED["model.gguf"]
            assert await anyio.to_thread.run_sync(early.read) == FILES["config.json"]
        assert stage.keeper.restarts == 1
        assert await sums(at) == EXPECTED


async def test_a_person_s_mount_comes_back_with_the_next_agent(tmp_path: Path) -> None:
    at = tmp_path / "mine"
    async with staged(tmp_path) as stage:
        await stage.mounts.add(stage.wanted(at))
        await stage.mounts.add(stage.wanted(at))
        assert await sums(at) == EXPECTED
    assert mounted_trees(tmp_path) == []
    # What an agent that was killed leaves behind: a mount that nobody serves.
    os.close(mount_tree(at))
    async with staged(tmp_path) as stage:
        assert mounted_trees(tmp_path) == []
        await stage.mounts.restore()
        assert [entry.directory for entry in stage.mounts.personal()] == [str(at)]
        assert await sums(at) == EXPECTED
        await stage.mounts.remove(str(at))
        assert mounted_trees(tmp_path) == []
        assert at.is_dir()
        with pytest.raises(NotFoundError):
            await stage.mounts.remove(str(at))
    async with staged(tmp_path) as stage:
        assert stage.mounts.personal() == []


async def test_where_something_is_already_nothing_is_mounted(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        (tmp_path / "full").mkdir()
        (tmp_path / "full/file").touch()
        with pytest.raises(InvalidInputError, match="not empty"):
            await stage.mounts.add(stage.wanted(tmp_path / "full"))
        with pytest.raises(InvalidInputError, match="absolute"):
            await stage.mounts.add(stage.wanted(Path("relative")))
        await stage.mounts.add(stage.wanted(tmp_path / "mine"))
        other = stage.wanted(tmp_path / "mine")
        unknown = ArtefactRef(manifest=Digest("b3:" + "0" * 64), kind="model", total_bytes=1, file_count=1)
        with pytest.raises(ConflictError):
            await stage.mounts.add(
                PersonalMount(directory=other.directory, tenant=DEFAULT_TENANT, model="n", artefact=unknown)
            )
        with pytest.raises(NotFoundError):
            await stage.mounts.mount(DEFAULT_TENANT, unknown, "rep-1")
        assert len(mounted_trees(tmp_path)) == 1, "nothing is left of what failed"


_TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in sys.argv[1:]]
answers = [model(torch.tensor([[1, 2, 3]])).logits for model in models]
sys.exit(0 if torch.equal(*answers) else "another model")
"""


@pytest.mark.slow
async def test_transformers_loads_from_a_mount_whose_bytes_are_at_the_origin(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, vocab_size=8000
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "source")
    async with staged(tmp_path) as stage:
        at = await stage.mounts.mount(DEFAULT_TENANT, stage.artefact, "rep-1")
        assert list(tmp_path.glob("cache/artefacts/*/partial/model.safetensors")), "its bytes are not here yet"
        with anyio.fail_after(WAIT_S_MAX * 2):
            await anyio.run_process(
                [sys.executable, "-c", _TRANSFORMERS, str(at), str(tmp_path / "source")], stdout=None, stderr=None
            )


async def test_what_is_complete_is_read_without_the_data_plane(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        at = await stage.mounts.mount(DEFAULT_TENANT, stage.artefact, "rep-1")
        assert await sums(at) == EXPECTED
        with (at / "model.gguf").open("rb") as file:
            pid = stage.plane_pid()
            os.kill(pid, signal.SIGSTOP)
            try:
                (landed,) = tmp_path.glob("cache/artefacts/*/tree/model.gguf")
                drop_cached(landed)
                with anyio.fail_after(WAIT_S_MAX):
                    content = await anyio.to_thread.run_sync(file.read, abandon_on_cancel=True)
                assert content == FILES["model.gguf"]
            finally:
                os.kill(pid, signal.SIGCONT)

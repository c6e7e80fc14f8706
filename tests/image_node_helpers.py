"""A node's mounts over a real data plane, and an image that was pushed, for tests."""

from __future__ import annotations

import os
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import mkdtemp

import anyio
import anyio.to_thread
import pytest

from content_helpers import noise, settings_for
from image_helpers import Layout, member, tar
from snowdrop.agent.content import DataPlaneKeeper
from snowdrop.agent.dataplane.client import DataPlane
from snowdrop.agent.mounts import ModelMounts
from snowdrop.content.fuse.mount import MOUNTINFO
from snowdrop.content.ingest import PushOptions
from snowdrop.content.origin import DirectoryOrigin
from snowdrop.domain.ids import DEFAULT_TENANT
from snowdrop.domain.manifest import ArtefactRef
from snowdrop.image.mount import methods as methods_module
from snowdrop.image.mount.port import Method
from snowdrop.image.oci import parse_platform
from snowdrop.image.opening import ReachOptions
from snowdrop.image.opening import open_image as open_image_source
from snowdrop.image.push import ImageOptions, push_image
from snowdrop.image.unpack import LayerFolder

WAIT_S_MAX = 60.0
BIG = noise(6 << 20, 1)
SMALL = noise(10_000, 2)


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


def some_layer() -> bytes:
    return tar(
        member("bin", tarfile.DIRTYPE, mode=0o755),
        member("bin/big", data=BIG, mode=0o755, mtime=7),
        member("bin/small", data=SMALL, mode=0o640, uid=7, gid=8),
        member("bin/again", tarfile.LNKTYPE, linkname="bin/small"),
        member("link", tarfile.SYMTYPE, linkname="bin/big"),
    )


def pushed(folder: Path, layer: bytes) -> ArtefactRef:
    source, _ = open_image_source(
        f"oci:{Layout([(layer, 'plain')]).write(Path(mkdtemp(dir=folder)) / 'layout')}:latest",
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
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: Method | None = None,
    *,
    layer: bytes | None = None,
    node: str = "cache",
    origin_url: str = "",
) -> AsyncIterator[Stage]:
    """A data plane that is kept alive, and mounts over it, as the agent wires them. Each `node` has a cache."""
    artefact = pushed(folder, layer or some_layer())
    if method is not None:
        monkeypatch.setattr(methods_module, "possible_methods", lambda: (method,))
    settings = settings_for(folder / node, origin_url=origin_url or f"file://{folder / 'origin'}")

    async def renew(plane: DataPlane) -> None:
        await mounts.renew(plane)

    keeper = DataPlaneKeeper(settings, renew)
    mounts = ModelMounts(folder / node / "mounts", folder / "mounts.json", keeper.current)
    mounts.sweep()
    async with anyio.create_task_group() as tasks:
        await tasks.start(keeper.run)
        tasks.start_soon(mounts.run)
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

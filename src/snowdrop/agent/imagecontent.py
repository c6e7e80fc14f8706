"""The content of one image as the agent has it: by way of the data plane, which verifies every byte."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio.to_thread

from snowdrop.agent.dataplane.client import DataPlane
from snowdrop.content.diskio import translated
from snowdrop.content.imagetree import decode_tree
from snowdrop.domain.errors import IntegrityError
from snowdrop.domain.ids import TenantId
from snowdrop.domain.image import DATA_FILE, TREE_FILE, ImageTree
from snowdrop.domain.manifest import ArtefactRef
from snowdrop.image.mount.port import View

_SECTOR_BYTES = 512


class NodeImage:
    """An `ImageContent`; made by `open_image`."""

    def __init__(
        self,
        data_plane: Callable[[], Awaitable[DataPlane]],
        artefact: ArtefactRef,
        directory: Path,
        tree: ImageTree,
    ) -> None:
        self._data_plane = data_plane
        self._artefact = artefact
        self._directory = directory
        self._tree = tree
        self._served: list[tuple[View, int, int]] = []

    @property
    def name(self) -> str:
        return f"image {self._artefact.manifest[:19]}"

    @property
    def tree(self) -> ImageTree:
        return self._tree

    def here_bytes(self) -> int:
        """By what the landing file takes on the disk: nothing is written there before it is verified."""
        for path in (self._directory / DATA_FILE, self._directory.parent / "partial" / DATA_FILE):
            try:
                return min(path.stat().st_blocks * _SECTOR_BYTES, self._tree.data_bytes)
            except OSError:
                continue
        return 0

    def local_data(self) -> Path | None:
        """In the tree's directory only once all of it is there and proven."""
        path = self._directory / DATA_FILE
        return path if path.is_file() else None

    async def read(self, offset: int, length: int) -> bytes:
        """Brings everything first: who reads like this is going to need it."""
        if self.local_data() is None:
            await self.bring_all()
        return await anyio.to_thread.run_sync(_read, self._directory / DATA_FILE, offset, length)

    async def bring_all(self) -> None:
        await (await self._data_plane()).wait_directory(self._artefact.manifest)

    async def serve(self, view: View, device_fd: int, journal_fd: int) -> None:
        served = view, device_fd, journal_fd
        await self._serve(await self._data_plane(), served)
        self._served.append(served)

    async def renew(self, plane: DataPlane) -> None:
        """Has a new data plane serve what the last one did. It has ensured the artefact."""
        for served in self._served:
            await self._serve(plane, served)

    async def _serve(self, plane: DataPlane, served: tuple[View, int, int]) -> None:
        view, device_fd, journal_fd = served
        # Copies: the mount may be removed while they wait to be sent, and its numbers go to other files.
        copies: list[int] = []
        try:
            copies.extend(os.dup(fd) for fd in (device_fd, journal_fd))
            await plane.serve_mount(self._artefact.manifest, copies[0], copies[1], view=view)
        except OSError as error:
            raise translated(error, self._directory) from error
        finally:
            for fd in copies:
                os.close(fd)


async def ensure_image(plane: DataPlane, tenant: TenantId, artefact: ArtefactRef, pin: str) -> Path:
    """Pins an image for `pin`; the landing directory, in which its tree is."""
    got = await plane.ensure(
        tenant, artefact.manifest, pin, map_tensors=False, lazy=True, key_domain=artefact.key_domain
    )
    got.close()
    return got.directory


async def open_image(
    data_plane: Callable[[], Awaitable[DataPlane]], tenant: TenantId, artefact: ArtefactRef, pin: str
) -> NodeImage:
    """Pins the image and reads its tree. Raises CorruptContentError and what the content path raises."""
    directory = await ensure_image(await data_plane(), tenant, artefact, pin)
    tree = await anyio.to_thread.run_sync(_read_tree, directory / TREE_FILE)
    return NodeImage(data_plane, artefact, directory, tree)


def _read_tree(path: Path) -> ImageTree:
    try:
        return decode_tree(path.read_bytes())
    except OSError as error:
        raise translated(error, path) from error


def _read(path: Path, offset: int, length: int) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            data = os.pread(fd, length, offset)
        finally:
            os.close(fd)
    except OSError as error:
        raise translated(error, path) from error
    if len(data) != length:
        raise IntegrityError("the landing file is cut short", where=str(path))
    return data

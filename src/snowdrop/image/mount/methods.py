"""The three ways to have an image at a directory, and the choice among them."""

from __future__ import annotations

import logging
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread

from snowdrop.content.diskio import translated
from snowdrop.domain.errors import InvalidInputError, UnavailableError
from snowdrop.domain.image import DATA_FILE
from snowdrop.image.mount.erofs import write_erofs
from snowdrop.image.mount.kernel import mount_erofs, possible_methods, unmount
from snowdrop.image.mount.port import ImageContent, ImageMount, Method, MountProgress
from snowdrop.image.mount.served import ServedDirectory, serve_directory
from snowdrop.image.mount.unpack import remove_unpacked, unpack

FOLDER_MODE = 0o700

log = logging.getLogger("snowdrop.image")


def image_mount(content: ImageContent, work: Path, method: Method | None = None) -> ImageMount:
    """A mount by the best method that this node has, or by `method`. `work` is a folder of its own for it.

    Raises UnavailableError if `method` is not possible here.
    """
    possible = possible_methods()
    if method is not None and method not in possible:
        raise UnavailableError(
            f"images cannot be mounted with {method} here",
            where=f"possible: {', '.join(possible)}",
            next_step="run `snowdrop doctor`, or leave the choice to Snowdrop",
        )
    chosen = method or possible[0]
    if chosen == "erofs":
        return ErofsMount(content, work)
    if chosen == "fuse":
        return FuseMount(content)
    if method is None:
        log.warning(
            "%s is unpacked before it can be used, because neither EROFS nor FUSE works here: starts wait for all "
            "of its %d bytes; see `snowdrop doctor`",
            content.name,
            content.tree.data_bytes,
        )
    return UnpackedImage(content)


def _progress(content: ImageContent, method: Method, *, needs_daemon: bool) -> MountProgress:
    return MountProgress(
        method=method,
        here_bytes=content.here_bytes(),
        total_bytes=content.tree.data_bytes,
        needs_daemon=needs_daemon,
    )


class ErofsMount:
    """Names by the kernel from a file of metadata; contents from the local file if it is complete, otherwise from
    a FUSE mount of one file that is served lazily."""

    method: Method = "erofs"

    def __init__(self, content: ImageContent, work: Path) -> None:
        self._content = content
        self._work = work
        self._at: Path | None = None
        self._served: ServedDirectory | None = None

    async def mount(self, at: Path) -> None:
        await anyio.to_thread.run_sync(_check_empty, at)
        metadata = self._work / "metadata.erofs"
        try:
            try:
                self._work.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
                await anyio.to_thread.run_sync(write_erofs, self._content.tree, metadata)
            except OSError as error:
                raise translated(error, self._work) from error
            data = await self._data()
            await anyio.to_thread.run_sync(mount_erofs, metadata.resolve(), data, at)
            self._at = at
        except BaseException:
            with anyio.CancelScope(shield=True), suppress(UnavailableError):
                await self.unmount()
            raise

    def progress(self) -> MountProgress:
        return _progress(self._content, self.method, needs_daemon=self._served is not None)

    async def complete(self) -> None:
        await self._content.bring_all()

    async def unmount(self) -> None:
        if self._at is not None:
            await anyio.to_thread.run_sync(unmount, self._at)
            self._at = None
        if self._served is not None:
            await self._served.close()
            self._served = None
        await anyio.to_thread.run_sync(partial(shutil.rmtree, self._work, ignore_errors=True))

    async def _data(self) -> Path:
        local = self._content.local_data()
        if local is not None:
            return local
        folder = self._work / "served"
        folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
        self._served = await serve_directory(self._content, "data", folder)
        return folder / DATA_FILE


class FuseMount:
    """Names and contents by the data plane."""

    method: Method = "fuse"

    def __init__(self, content: ImageContent) -> None:
        self._content = content
        self._served: ServedDirectory | None = None

    async def mount(self, at: Path) -> None:
        await anyio.to_thread.run_sync(_check_empty, at)
        self._served = await serve_directory(self._content, "tree", at)

    def progress(self) -> MountProgress:
        return _progress(self._content, self.method, needs_daemon=True)

    async def complete(self) -> None:
        await self._content.bring_all()

    async def unmount(self) -> None:
        if self._served is not None:
            await self._served.close()
            self._served = None


class UnpackedImage:
    """A copy of everything, made before `mount` returns. Writable: it is the only user's own."""

    method: Method = "unpack"

    def __init__(self, content: ImageContent) -> None:
        self._content = content
        self._at: Path | None = None

    async def mount(self, at: Path) -> None:
        await anyio.to_thread.run_sync(_check_empty, at)
        await unpack(self._content, at)
        self._at = at

    def progress(self) -> MountProgress:
        return _progress(self._content, self.method, needs_daemon=False)

    async def complete(self) -> None:
        """All was there when `mount` returned; brings the data for mounts that come after."""
        await self._content.bring_all()

    async def unmount(self) -> None:
        if self._at is not None:
            await anyio.to_thread.run_sync(remove_unpacked, self._at)
            self._at = None


def _check_empty(at: Path) -> None:
    try:
        if not any(at.iterdir()):
            return
        message = "the directory is not empty"
    except OSError as error:
        message = f"no directory for an image: {error.strerror}"
    raise InvalidInputError(message, where=str(at), next_step="name an empty directory")

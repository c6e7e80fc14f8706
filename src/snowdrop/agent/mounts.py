"""Mounted directories of this node, of models and images: made and held here, served by the data plane.

The agent holds what keeps a mount alive (device and journal), so that a new data plane takes over where a dead
one stopped. There is one mount for each artefact that replicas use before it is complete on disk, at
`<cache>/mounts/<digest>`, and one for each directory that a person asked for; those are written down and made
again after the agent's restart.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from weakref import WeakValueDictionary

import anyio
import anyio.to_thread
import msgspec

from snowdrop.agent.dataplane.client import DataPlane
from snowdrop.agent.imagecontent import NodeImage, ensure_image, open_image
from snowdrop.agent.leftmounts import images_below, sweep_mounts
from snowdrop.agent.mountfiles import DIRECTORY_MODE, check_directory, replace_file
from snowdrop.agent.starts import ImageStarts
from snowdrop.content.fuse.journal import create_journal
from snowdrop.content.fuse.mount import (
    may_mount,
    mount_tree,
    set_read_ahead,
    unmount_tree,
)
from snowdrop.domain.errors import (
    ConflictError,
    NotFoundError,
    SnowdropError,
    TimedOutError,
    UnavailableError,
)
from snowdrop.domain.ids import TenantId, fresh_id
from snowdrop.domain.manifest import ArtefactRef
from snowdrop.image.mount.methods import image_mount
from snowdrop.image.mount.port import ImageMount
from snowdrop.wire.dataplane import StartTold
from snowdrop.wire.mounts import PersonalMount

SERVE_S_MAX = 60.0
"""How long a data plane may take to begin serving a mount; it has to know the manifest and the small files."""
RENEWALS_MAX = 30
RENEWAL_REST_S = 2.0
"""A mount that no data plane serves after so many attempts is given up: its readers get an error, not a hang."""

log = logging.getLogger("snowdrop.agent")


class _Mount:
    def __init__(self, at: Path, tenant: TenantId, artefact: ArtefactRef) -> None:
        self.at = at
        self.tenant = tenant
        self.artefact = artefact
        self.pin = fresh_id("mnt")
        self.holders: set[str] = set()
        self.device_fd = -1
        self.journal_fd = -1
        self.content: NodeImage | None = None
        self.image: ImageMount | None = None

    def copies(self) -> tuple[int, int]:
        """Its descriptors again, the caller's. Raises UnavailableError if it was removed."""
        try:
            device_fd = os.dup(self.device_fd)
        except OSError as error:
            raise UnavailableError(f"the mount is not there: {error.strerror}", where=str(self.at)) from error
        try:
            return device_fd, os.dup(self.journal_fd)
        except OSError as error:
            os.close(device_fd)
            raise UnavailableError(f"the mount is not there: {error.strerror}", where=str(self.at)) from error


class ModelMounts:
    """`mount` and `release` by holder (a replica); `add` and `remove` by directory (a person)."""

    def __init__(self, folder: Path, record: Path, data_plane: Callable[[], Awaitable[DataPlane]]) -> None:
        self._folder = folder
        self._images = images_below(folder)
        self._record = record
        self._data_plane = data_plane
        self._mounts: dict[Path, _Mount] = {}
        self._personal: dict[Path, PersonalMount] = {}
        self._locks: WeakValueDictionary[Path, anyio.Lock] = WeakValueDictionary()
        self._recording = anyio.Lock()
        self._starts = ImageStarts(data_plane)
        self.is_possible = bool(may_mount())

    def sweep(self) -> None:
        """Removes mounts that an earlier agent left. Blocks. Before anything else."""
        left = sweep_mounts(self._folder, self._record)
        self._personal = {Path(entry.directory): entry for entry in left}

    async def run(self) -> None:
        """Restores, and completes images behind the starts that are ready, until cancelled."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.restore)
            await self._starts.run()

    async def mount(self, tenant: TenantId, artefact: ArtefactRef, holder: str, *, start: str = "") -> Path:
        """The directory in which all files of the artefact are there, until every holder has released it.

        `start` names what `holder` starts in an image (`python -m app`), up to START_CHARS_MAX characters: what
        an earlier start of this name has read is fetched ahead. If the mount is a new one, what is read until
        `ready` is recorded. Raises UnavailableError if it cannot be mounted, and what the content path raises.
        """
        at = self._folder / artefact.manifest
        async with self._lock_of(at):
            mount = self._mounts.get(at)
            if mount is None:
                mount = await self._make(at, tenant, artefact, holder=holder, start=start)
            elif artefact.kind == "image" and start:
                await self._starts.begin(tenant, artefact.manifest, mount.pin, holder, start, record=False)
            mount.holders.add(holder)
            return at

    async def ready(self, holder: str) -> StartTold | None:
        """What `holder` starts has started: its images are completed from now on, and what its readers still
        have to wait for counts as late. None if it started in no image, or nothing is known of it any more."""
        mounts = [each for each in self._mounts.values() if holder in each.holders and each.image is not None]
        if not mounts:
            return None
        told = await self._starts.ready(holder)
        for mount in mounts:
            if mount.image is not None:
                self._starts.complete(mount.artefact.manifest, mount.image)
        return told

    async def started(self, holder: str) -> StartTold | None:
        """The start of `holder` as it is now, with its late bytes; None as above."""
        return await self._starts.told(holder)

    async def release(self, holder: str) -> None:
        """Once no sandbox of `holder` lives. Mounts without holders are removed."""
        self._starts.over(holder)
        for mount in list(self._mounts.values()):
            if holder in mount.holders:
                async with self._lock_of(mount.at):
                    mount.holders.discard(holder)
                    if not mount.holders and self._is_ours(mount):
                        await self._remove(mount)

    async def add(self, wanted: PersonalMount) -> None:
        """Mounts a model at a directory, which is made or must be empty; done already is fine.

        Raises InvalidInputError, ConflictError, UnavailableError, and what the content path raises.
        """
        at = Path(wanted.directory)
        async with self._lock_of(at):
            known = self._personal.get(at)
            if known is not None and at in self._mounts:
                if known.artefact.manifest == wanted.artefact.manifest:
                    return
                raise ConflictError(
                    f"model {known.model!r} is mounted there",
                    where=str(at),
                    next_step=f"`snowdrop model unmount {at}` first",
                )
            await anyio.to_thread.run_sync(check_directory, at)
            holder = person(wanted.directory)
            mount = await self._make(at, wanted.tenant, wanted.artefact, holder=holder, start=wanted.start)
            mount.holders.add(holder)
            self._personal[at] = wanted
            try:
                await self._write_record()
            except UnavailableError:
                del self._personal[at]
                await self._remove(mount)
                raise

    async def remove(self, directory: str) -> None:
        """Unmounts what `add` has mounted; raises NotFoundError if that is nothing."""
        at = Path(directory)
        async with self._lock_of(at):
            wanted = self._personal.pop(at, None)
            if wanted is None:
                raise NotFoundError(
                    "no model is mounted there", where=directory, next_step="see `snowdrop model mounts`"
                )
            try:
                await self._write_record()
            except UnavailableError:
                self._personal[at] = wanted  # so that it can be tried again
                raise
            mount = self._mounts.get(at)
            if mount is not None:
                await self._remove(mount)

    async def ready_at(self, directory: str) -> StartTold | None:
        """`ready` for what somebody started in an image at a directory; again, it gives the start as it is now.

        Raises NotFoundError if nothing is mounted there.
        """
        if Path(directory) not in self._personal:
            raise NotFoundError(
                "nothing is mounted there", where=directory, next_step="see `snowdrop model mounts`"
            )
        return await self.ready(person(directory))

    def personal(self) -> list[PersonalMount]:
        return [self._personal[at] for at in sorted(self._personal)]

    async def restore(self) -> None:
        """Makes the mounts again that people had asked for; one that fails is said and tried at the next start."""
        for wanted in list(self._personal.values()):
            try:
                await self.add(wanted)
            except SnowdropError as error:
                log.warning("model %s is not mounted again at %s: %s", wanted.model, wanted.directory, error)

    async def renew(self, plane: DataPlane) -> None:
        """Has a new data plane serve every mount. Readers that waited for the old one are answered by it."""
        async with anyio.create_task_group() as tasks:
            for mount in list(self._mounts.values()):
                tasks.start_soon(self._renew, mount, plane)

    async def close(self) -> None:
        """Removes all mounts, for this life; those of people come back with the next."""
        for mount in list(self._mounts.values()):
            async with self._lock_of(mount.at):
                if self._is_ours(mount):
                    await self._remove(mount)

    # --- inside -------------------------------------------------------------------------------------------

    def _lock_of(self, at: Path) -> anyio.Lock:
        """One task at a time changes a directory. Others go on: making one may wait for the origin."""
        lock = self._locks.get(at)
        if lock is None:
            lock = self._locks[at] = anyio.Lock()
        return lock

    def _is_ours(self, mount: _Mount) -> bool:
        """Whether it is still there, and no other in its place."""
        return self._mounts.get(mount.at) is mount

    async def _make(self, at: Path, tenant: TenantId, artefact: ArtefactRef, *, holder: str, start: str) -> _Mount:
        mount = _Mount(at, tenant, artefact)
        if artefact.kind == "image":
            return await self._make_image(mount, holder, start)
        try:
            # Shielded: a mount whose descriptor was lost could not be served by anybody.
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(_make_blocking, mount)
            self._mounts[at] = mount
            await self._serve(mount, await self._data_plane())
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._remove(mount)
            raise
        return mount

    async def _make_image(self, mount: _Mount, holder: str, start: str) -> _Mount:
        try:
            mount.at.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
            mount.content = await open_image(self._data_plane, mount.tenant, mount.artefact, mount.pin)
            if start:
                manifest = mount.artefact.manifest
                await self._starts.begin(mount.tenant, manifest, mount.pin, holder, start, record=True)
            mount.image = image_mount(mount.content, self._images / mount.pin)
            await mount.image.mount(mount.at)
            self._mounts[mount.at] = mount
        except BaseException as error:
            self._starts.over(holder)
            with anyio.CancelScope(shield=True):
                await self._remove(mount)
            if isinstance(error, OSError):
                raise UnavailableError(
                    f"a mount cannot be prepared: {error.strerror}", where=str(mount.at)
                ) from error
            raise
        return mount

    async def _serve(self, mount: _Mount, plane: DataPlane) -> None:
        if mount.content is not None:
            with anyio.move_on_after(SERVE_S_MAX):
                await ensure_image(plane, mount.tenant, mount.artefact, mount.pin)
                await mount.content.renew(plane)
                return
            raise TimedOutError("the data plane does not serve the image", where=f"serve_s_max={SERVE_S_MAX}")
        with anyio.move_on_after(SERVE_S_MAX):
            got = await plane.ensure(
                mount.tenant,
                mount.artefact.manifest,
                mount.pin,
                map_tensors=False,
                lazy=True,
                key_domain=mount.artefact.key_domain,
            )
            got.close()
            # Copies: the mount may be removed while they wait to be sent, and its numbers go to other files.
            device_fd, journal_fd = mount.copies()
            try:
                await plane.serve_mount(mount.artefact.manifest, device_fd, journal_fd)
            finally:
                os.close(device_fd)
                os.close(journal_fd)
            return
        raise TimedOutError("the data plane does not serve the mount", where=f"serve_s_max={SERVE_S_MAX}")

    async def _renew(self, mount: _Mount, plane: DataPlane) -> None:
        for _ in range(RENEWALS_MAX):
            failed: SnowdropError | None = None
            try:
                await self._serve(mount, plane)
            except SnowdropError as error:
                failed = error
            if not self._is_ours(mount):
                await plane.release(mount.pin)  # it was removed meanwhile, maybe before this pin
                return
            if failed is None:
                return
            log.warning("%s is not served yet: %s", mount.at, failed)
            await anyio.sleep(RENEWAL_REST_S)
        async with self._lock_of(mount.at):
            if self._is_ours(mount):
                await self._remove(mount)

    async def _remove(self, mount: _Mount) -> None:
        self._mounts.pop(mount.at, None)
        for holder in mount.holders:
            self._starts.over(holder)
        if all(each.artefact.manifest != mount.artefact.manifest for each in self._mounts.values()):
            self._starts.forget(mount.artefact.manifest)
        try:
            if mount.image is not None:
                await mount.image.unmount()
            await anyio.to_thread.run_sync(_remove_blocking, mount, mount.at.parent == self._folder)
        except UnavailableError as error:
            log.warning("%s", error)
        try:
            await (await self._data_plane()).release(mount.pin)
        except SnowdropError:
            return  # a data plane that is gone holds no pins

    async def _write_record(self) -> None:
        async with self._recording:
            await anyio.to_thread.run_sync(replace_file, self._record, msgspec.json.encode(self.personal()))


def person(directory: str) -> str:
    """The holder of a mount that somebody asked for at a directory."""
    return f"person:{directory}"


def _make_blocking(mount: _Mount) -> None:
    try:
        mount.at.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
        mount.journal_fd = create_journal(mount.artefact.file_count)
    except OSError as error:
        raise UnavailableError(f"a mount cannot be prepared: {error.strerror}", where=str(mount.at)) from error
    mount.device_fd = mount_tree(mount.at)
    set_read_ahead(mount.at)


def _remove_blocking(mount: _Mount, with_directory: bool) -> None:
    device_fd, journal_fd = mount.device_fd, mount.journal_fd
    mount.device_fd = mount.journal_fd = -1
    try:
        if device_fd >= 0:
            unmount_tree(mount.at)
    finally:
        for fd in (device_fd, journal_fd):
            if fd >= 0:
                os.close(fd)
    if with_directory:
        try:
            mount.at.rmdir()
        except OSError as error:
            log.info("%s stays: %s", mount.at, error.strerror)

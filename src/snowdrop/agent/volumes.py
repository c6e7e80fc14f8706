"""The volumes of one replica on this node: opened without following links, and the uid that may write them.

A tenant's volumes belong to one host uid, which all its replicas with volumes run as, so that what one wrote
another may change; tenants differ. It is the owner of the tenant's folder, which replicas never see.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from snowdrop.agent.sandbox.launcher import Mount
from snowdrop.domain.errors import InvalidInputError, NotFoundError, SandboxError
from snowdrop.domain.ids import TenantId
from snowdrop.domain.settings import AgentSettings
from snowdrop.domain.volume import Volume, is_shared, not_shared, variable_of

DATA = "data"
_OPEN = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class VolumeMounts(msgspec.Struct, frozen=True):
    """Mounts by open descriptors, which the caller closes, and the host uid to run as; None: any."""

    mounts: tuple[Mount, ...] = ()
    uid: int | None = None

    def variables(self, volumes: tuple[Volume, ...], visible: Callable[[Mount], str]) -> dict[str, str]:
        """Where the replica finds each, by environment variable: without a sandbox that is not at its target."""
        return {variable_of(each): visible(mount) for each, mount in zip(volumes, self.mounts, strict=True)}


@contextmanager
def opened(
    volumes: tuple[Volume, ...], tenant: TenantId, folder: Path, settings: AgentSettings
) -> Iterator[VolumeMounts]:
    """Opens a service's volumes for the time of a launch.

    Raises NotFoundError for a named volume that is not there, InvalidInputError for a host's directory that the
    operator does not share, SandboxError for one that cannot be opened. Blocking.
    """
    fds: list[int] = []
    mounts: list[Mount] = []
    uid: int | None = None
    try:
        for volume in volumes:
            fd = _open_named(volume, folder / tenant) if volume.name else _open_host(volume, settings)
            fds.append(fd)
            mounts.append(Mount(source=fd, target=volume.target, read_only=volume.read_only))
            if volume.name and os.geteuid() == 0:
                uid = (folder / tenant).stat().st_uid
        yield VolumeMounts(tuple(mounts), uid or None)
    finally:
        for fd in fds:
            os.close(fd)


def _open_named(volume: Volume, folder: Path) -> int:
    try:
        return os.open(folder / volume.name / DATA, _OPEN)
    except OSError as error:
        raise NotFoundError(
            f"there is no volume {volume.name!r}",
            where=f"volume {volume.target}",
            next_step=f"`snowdrop volume create {volume.name}`",
        ) from error


def _open_host(volume: Volume, settings: AgentSettings) -> int:
    shared = settings.volumes_writable
    if volume.read_only:
        shared = f"{shared}:{settings.volumes_read_only}"
    allowed = ":".join(os.path.realpath(folder) for folder in shared.split(":") if folder)
    real = os.path.realpath(volume.host)
    if not is_shared(real, allowed):
        raise not_shared(volume)
    try:
        fd = os.open(real, _OPEN)
    except OSError as error:
        raise SandboxError(
            f"cannot open {volume.host}: {error.strerror}",
            where=f"volume {volume.target}",
            next_step="is it a directory of this node?",
        ) from error
    try:
        # What was opened, whatever has become of the path meanwhile.
        if not is_shared(str(Path(f"/proc/self/fd/{fd}").readlink()), allowed):
            raise not_shared(volume)
    except InvalidInputError:
        with suppress(OSError):
            os.close(fd)
        raise
    return fd

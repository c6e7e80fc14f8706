"""Persistent volumes: made, listed with their sizes, held to their bounds, removed when nobody uses them."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec

from snowdrop.control.uses import refuse_in_use, users_of
from snowdrop.control.world import World
from snowdrop.domain.deployment import Revision
from snowdrop.domain.errors import ConflictError, NotFoundError, StorageFullError
from snowdrop.domain.ids import DeploymentName, TenantId, fresh_id, parse_name
from snowdrop.domain.settings import AgentSettings
from snowdrop.domain.volume import Volume, VolumeFacts, is_shared, not_shared
from snowdrop.state.port import StateStore
from snowdrop.wire.api import VolumeView

DATA, FACTS, GONE = "data", "volume.json", ".gone-"
MEASURED_MAX = 1_000_000
"""Files that are looked at to say how large a volume is."""
WATCH_S = 10.0
"""How often bounded volumes in use are measured."""
UID_SPAN = 65_536
"""Uids from `agent.uid_base` on are replicas' own; those after them belong to tenants' volumes."""


class Filling(msgspec.Struct, frozen=True, kw_only=True):
    """How full a bounded volume was when it was last looked at."""

    used_bytes: int
    size_bytes_max: int


class Volumes:
    """The volumes below one folder: TENANT/NAME/data, and beside it what is known of it."""

    def __init__(self, state: StateStore, folder: Path, agent: AgentSettings, world: World) -> None:
        self._state = state
        self._folder = folder
        self._agent = agent
        self._world = world
        self._changing = anyio.Lock()
        self._filling: dict[tuple[TenantId, str], Filling] = {}

    async def create(self, tenant: TenantId, name: str, size_bytes_max: int) -> VolumeView:
        """Raises ConflictError if it is there, InvalidInputError for a name that cannot be."""
        parse_name(name, what="volume name")
        parse_name(tenant, what="tenant")
        facts = VolumeFacts(name=name, created_unix_ns=time.time_ns(), size_bytes_max=size_bytes_max)
        async with self._changing:
            await anyio.to_thread.run_sync(self._make, tenant, facts)
        return await self._view(tenant, facts)

    async def listed(self, tenant: TenantId) -> list[VolumeView]:
        found = await anyio.to_thread.run_sync(self._all, tenant)
        return [await self._view(tenant, facts) for facts in found]

    async def remove(self, tenant: TenantId, name: str) -> None:
        """Raises ConflictError while a deployment names it or a replica still has it, NotFoundError."""
        async with self._changing:
            users = self._users(tenant, name)
            draining = [user for user in await self._still_using(tenant, name) if user not in users]
            refuse_in_use("volume", name, [*users, *draining])
            await anyio.to_thread.run_sync(self._remove, tenant, name)

    async def check(self, tenant: TenantId, volumes: tuple[Volume, ...]) -> None:
        """Raises NotFoundError or InvalidInputError for what a service cannot be given, StorageFullError for a
        volume that is above its bound.
        """
        for volume in volumes:
            if not volume.name:
                shared = self._agent.volumes_writable
                shared = f"{shared}:{self._agent.volumes_read_only}" if volume.read_only else shared
                if not is_shared(os.path.normpath(volume.host), shared):
                    raise not_shared(volume)
                continue
            facts = await anyio.to_thread.run_sync(self._facts, tenant, volume.name)
            if facts is None:
                raise unknown_volume(volume.name)
            if not volume.read_only:
                await self._measure(tenant, facts)
        self.check_start(tenant, volumes)

    def check_start(self, tenant: TenantId, volumes: tuple[Volume, ...]) -> None:
        """Raises StorageFullError for a volume that was above its bound when it was last looked at."""
        for volume in volumes:
            filling = self._filling.get((tenant, volume.name))
            if filling is None or volume.read_only or filling.used_bytes <= filling.size_bytes_max:
                continue
            raise StorageFullError(
                f"volume {volume.name!r} holds {filling.used_bytes} bytes",
                where=f"size_bytes_max={filling.size_bytes_max}",
                next_step="remove files from it with a service that runs, or make a larger one",
            )

    async def watch(self) -> None:
        """For ever: looks how full the bounded volumes are that deployments may write."""
        while True:
            await self.look()
            await anyio.sleep(WATCH_S)

    async def look(self) -> None:
        """Measures them once, so that a start need not wait for it. Those that nobody names are forgotten."""
        wanted = {
            (key[0], volume.name)
            for key, entry in self._world.deployments.items()
            for revision in (entry.revision, entry.rival)
            if revision is not None
            for volume in revision.spec.volumes
            if volume.name and not volume.read_only
        }
        self._filling = {place: filling for place, filling in self._filling.items() if place in wanted}
        for tenant, name in sorted(wanted):
            facts = await anyio.to_thread.run_sync(self._facts, tenant, name)
            if facts is not None:
                await self._measure(tenant, facts)

    async def _measure(self, tenant: TenantId, facts: VolumeFacts) -> None:
        if facts.size_bytes_max:
            place = self._folder / tenant / facts.name / DATA
            used_bytes, _ = await anyio.to_thread.run_sync(measure, place)
            filling = Filling(used_bytes=used_bytes, size_bytes_max=facts.size_bytes_max)
            self._filling[tenant, facts.name] = filling

    # --- on the disk --------------------------------------------------------------------------------------

    def _make(self, tenant: TenantId, facts: VolumeFacts) -> None:
        owner = self._owner(tenant)
        place = self._folder / tenant / facts.name
        if place.exists():
            raise ConflictError(f"there is a volume {facts.name!r} already", where="volume name")
        # Complete before it has its name: a half-made one is never seen.
        fresh = self._folder / tenant / f"{GONE}{fresh_id('vol')}"
        (fresh / DATA).mkdir(parents=True, mode=0o700)
        (fresh / FACTS).write_bytes(msgspec.json.encode(facts))
        if os.geteuid() == 0:
            os.chown(fresh / DATA, owner, owner)
        fresh.rename(place)

    def _owner(self, tenant: TenantId) -> int:
        """The uid of a tenant's volumes: the owner of its folder, chosen when that is made."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        mine = self._folder / tenant
        if not mine.exists():
            taken = [path.stat().st_uid for path in self._folder.iterdir()]
            owner = max([self._agent.uid_base + UID_SPAN - 1, *taken]) + 1
            mine.mkdir(mode=0o700)
            if os.geteuid() == 0:
                os.chown(mine, owner, owner)
        return mine.stat().st_uid

    def _facts(self, tenant: TenantId, name: str) -> VolumeFacts | None:
        try:
            return msgspec.json.decode((self._folder / tenant / name / FACTS).read_bytes(), type=VolumeFacts)
        except FileNotFoundError:
            return None

    def _all(self, tenant: TenantId) -> list[VolumeFacts]:
        found = sorted((self._folder / tenant).glob(f"[!.]*/{FACTS}"))
        return [msgspec.json.decode(path.read_bytes(), type=VolumeFacts) for path in found]

    def _remove(self, tenant: TenantId, name: str) -> None:
        place = self._folder / tenant / parse_name(name, what="volume name")
        gone = self._folder / tenant / f"{GONE}{fresh_id('vol')}"
        try:
            place.rename(gone)
        except FileNotFoundError:
            raise unknown_volume(name) from None
        for left in (self._folder / tenant).glob(f"{GONE}*"):  # also what an earlier life left half-removed
            shutil.rmtree(left, ignore_errors=True)

    async def _view(self, tenant: TenantId, facts: VolumeFacts) -> VolumeView:
        place = self._folder / tenant / facts.name / DATA
        used_bytes, files = await anyio.to_thread.run_sync(measure, place)
        return VolumeView(
            name=facts.name,
            created_unix_ns=facts.created_unix_ns,
            size_bytes_max=facts.size_bytes_max,
            used_bytes=used_bytes,
            files=files,
            used_by=tuple(self._users(tenant, facts.name)),
        )

    def _users(self, tenant: TenantId, name: str) -> list[DeploymentName]:
        return users_of(self._world, tenant, lambda revision: _mounts(revision, name))

    async def _still_using(self, tenant: TenantId, name: str) -> list[DeploymentName]:
        """Deployments that name it no more, but have a replica of an older revision that is still draining."""
        found: set[DeploymentName] = set()
        for replica in list(self._world.replicas.values()):
            if replica.key[0] != tenant or replica.key[1] in found:
                continue
            revision = replica.order.revision if replica.order is not None else None
            if revision is None:  # ordered by an earlier life of control
                revision = await self._state.get_revision(*replica.key, replica.revision)
            if revision is not None and _mounts(revision, name):
                found.add(replica.key[1])
        return sorted(found)


def _mounts(revision: Revision, name: str) -> bool:
    return any(volume.name == name for volume in revision.spec.volumes)


def measure(folder: Path) -> tuple[int, int]:
    """Bytes on the disk and files of a tree; no link is followed. At most MEASURED_MAX are looked at. Blocking."""
    used_bytes = files = 0
    for root, _folders, names in os.walk(folder, followlinks=False):
        for name in names:
            if files >= MEASURED_MAX:
                return used_bytes, files
            try:
                used_bytes += Path(root, name).lstat().st_blocks * 512
            except FileNotFoundError:
                continue  # removed by its service meanwhile
            files += 1
    return used_bytes, files


def unknown_volume(name: str) -> NotFoundError:
    return NotFoundError(
        f"there is no volume {name!r}",
        where="volume name",
        next_step=f"`snowdrop volume create {name}` first; `snowdrop volume ls` lists what is there",
    )

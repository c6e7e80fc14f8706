"""Persistent volumes: made, listed with their sizes, removed when nobody names them. And their part of the API."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec
from aiohttp import web

from snowdrop.control.world import World
from snowdrop.domain.errors import ConflictError, InvalidInputError, NotFoundError, StorageFullError
from snowdrop.domain.ids import DEFAULT_TENANT, DeploymentName, TenantId, fresh_id, parse_name
from snowdrop.domain.settings import AgentSettings
from snowdrop.domain.volume import Volume, VolumeFacts, is_shared, not_shared
from snowdrop.wire.api import TENANT_HEADER, CreateVolume, VolumeView

DATA, FACTS, GONE = "data", "volume.json", ".gone-"
MEASURED_MAX = 1_000_000
"""Files that are looked at to say how large a volume is."""
UID_SPAN = 65_536
"""Uids from `agent.uid_base` on are replicas' own; those after them belong to tenants' volumes."""


class Volumes:
    """The volumes below one folder: TENANT/NAME/data, and beside it what is known of it."""

    def __init__(self, folder: Path, agent: AgentSettings, world: World) -> None:
        self._folder = folder
        self._agent = agent
        self._world = world
        self._changing = anyio.Lock()

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
        """Raises ConflictError while a deployment names it, NotFoundError."""
        users = self._users(tenant, name)
        if users:
            raise ConflictError(
                f"volume {name!r} is used by {', '.join(users)}",
                where=f"deployment {users[0]}",
                next_step="delete the deployment, or deploy it without the volume, first",
            )
        async with self._changing:
            await anyio.to_thread.run_sync(self._remove, tenant, name)

    async def check(self, tenant: TenantId, volumes: tuple[Volume, ...]) -> None:
        """Raises NotFoundError or InvalidInputError for what a service cannot be given, StorageFullError for a
        volume that is above its bound.
        """
        named = {view.name: view for view in await self.listed(tenant)} if any(v.name for v in volumes) else {}
        for volume in volumes:
            if not volume.name:
                shared = self._agent.volumes_writable
                shared = f"{shared}:{self._agent.volumes_read_only}" if volume.read_only else shared
                if not is_shared(os.path.normpath(volume.host), shared):
                    raise not_shared(volume)
                continue
            view = named.get(volume.name)
            if view is None:
                raise unknown_volume(volume.name)
            if view.size_bytes_max and view.used_bytes > view.size_bytes_max and not volume.read_only:
                raise StorageFullError(
                    f"volume {volume.name!r} holds {view.used_bytes} bytes",
                    where=f"size_bytes_max={view.size_bytes_max}",
                    next_step="remove files from it with a service that runs, or make a larger one",
                )

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
        return [
            key[1]
            for key, entry in self._world.deployments.items()
            if key[0] == tenant
            and any(
                volume.name == name
                for revision in (entry.revision, entry.rival)
                if revision is not None
                for volume in revision.spec.volumes
            )
        ]


class VolumesApi:
    """Handlers below `/v1/volumes`."""

    def __init__(self, volumes: Volumes) -> None:
        self._volumes = volumes

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/volumes", self._list),
            web.post("/v1/volumes/{name}", self._create),
            web.delete("/v1/volumes/{name}", self._remove),
        ]

    async def _list(self, request: web.Request) -> web.Response:
        return _json(await self._volumes.listed(_tenant(request)))

    async def _create(self, request: web.Request) -> web.Response:
        try:
            body = msgspec.json.decode(await request.read(), type=CreateVolume)
        except msgspec.DecodeError as error:
            raise InvalidInputError(f"bad request body: {error}", where=request.path) from error
        name = request.match_info["name"]
        return _json(await self._volumes.create(_tenant(request), name, body.size_bytes_max), 201)

    async def _remove(self, request: web.Request) -> web.Response:
        await self._volumes.remove(_tenant(request), request.match_info["name"])
        return web.Response(status=204)


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


def _tenant(request: web.Request) -> TenantId:
    return TenantId(request.headers.get(TENANT_HEADER, DEFAULT_TENANT))


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")

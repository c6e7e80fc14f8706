"""The part of control's API that keeps volumes."""

from __future__ import annotations

from aiohttp import web

from snowdrop.control.http import answer, body_of, tenant_of
from snowdrop.control.volumes import Volumes
from snowdrop.wire.api import CreateVolume


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
        return answer(await self._volumes.listed(tenant_of(request)))

    async def _create(self, request: web.Request) -> web.Response:
        body = await body_of(request, CreateVolume)
        view = await self._volumes.create(tenant_of(request), request.match_info["name"], body.size_bytes_max)
        return answer(view, 201)

    async def _remove(self, request: web.Request) -> web.Response:
        await self._volumes.remove(tenant_of(request), request.match_info["name"])
        return web.Response(status=204)

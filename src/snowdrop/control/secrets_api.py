"""The part of control's API that keeps secrets. It takes values and never gives one back."""

from __future__ import annotations

from aiohttp import web

from snowdrop.control.http import answer, body_of, tenant_of
from snowdrop.control.loop import ControlLoop
from snowdrop.control.secrets import Secrets
from snowdrop.wire.api import PutSecret


class SecretsApi:
    """Handlers below `/v1/secrets`; rotating the platform's key is of no single tenant."""

    def __init__(self, loop: ControlLoop, secrets: Secrets) -> None:
        self._loop = loop
        self._secrets = secrets

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/secrets", self._list),
            web.put("/v1/secrets/{name}", self._put),
            web.delete("/v1/secrets/{name}", self._delete),
            web.post("/v1/rotate-secret-key", self._rotate),
        ]

    async def _list(self, request: web.Request) -> web.Response:
        return answer(await self._secrets.listed(tenant_of(request)))

    async def _put(self, request: web.Request) -> web.Response:
        body = await body_of(request, PutSecret, is_secret=True)
        tenant = tenant_of(request)
        view = await self._secrets.set(tenant, request.match_info["name"], body.value)
        for deployment in view.used_by:
            self._loop.poke((tenant, deployment))
        return answer(view, 201)

    async def _delete(self, request: web.Request) -> web.Response:
        await self._secrets.delete(tenant_of(request), request.match_info["name"])
        return web.Response(status=204)

    async def _rotate(self, _request: web.Request) -> web.Response:
        return answer(await self._secrets.rotate())

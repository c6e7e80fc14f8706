"""The part of control's API that keeps secrets. It takes values and never gives one back."""

from __future__ import annotations

import msgspec
from aiohttp import web

from snowdrop.control.loop import ControlLoop
from snowdrop.control.secrets import Secrets
from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.ids import DEFAULT_TENANT, TenantId
from snowdrop.wire.api import TENANT_HEADER, PutSecret


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
        return _json(await self._secrets.listed(_tenant(request)))

    async def _put(self, request: web.Request) -> web.Response:
        try:
            body = msgspec.json.decode(await request.read(), type=PutSecret)
        except msgspec.DecodeError:
            # Without the decoder's words and as no cause: they may quote the body.
            raise InvalidInputError("bad request body", where=request.path) from None
        tenant = _tenant(request)
        view = await self._secrets.set(tenant, request.match_info["name"], body.value)
        for deployment in view.used_by:
            self._loop.poke((tenant, deployment))
        return _json(view, 201)

    async def _delete(self, request: web.Request) -> web.Response:
        await self._secrets.delete(_tenant(request), request.match_info["name"])
        return web.Response(status=204)

    async def _rotate(self, _request: web.Request) -> web.Response:
        return _json(await self._secrets.rotate())


def _tenant(request: web.Request) -> TenantId:
    return TenantId(request.headers.get(TENANT_HEADER, DEFAULT_TENANT))


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")

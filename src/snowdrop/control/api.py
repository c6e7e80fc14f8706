"""Control's HTTP API, on a unix socket in the state folder. Bodies are in `wire.api`."""

from __future__ import annotations

import time
from typing import TypeVar

import msgspec
from aiohttp import web

from snowdrop.control.deploying import Deploying, unknown_deployment, unknown_model
from snowdrop.control.http import answer, body_of, tenant_of, typed_errors
from snowdrop.control.loop import ControlLoop
from snowdrop.control.origin_roots import OriginRoots
from snowdrop.control.peers import Peers
from snowdrop.control.rollout_api import RolloutApi
from snowdrop.control.secrets_api import SecretsApi
from snowdrop.control.store_api import StoreApi, pass_to_agent
from snowdrop.control.views import deployment_view, describe
from snowdrop.control.volumes_api import VolumesApi
from snowdrop.control.why_api import WhyApi
from snowdrop.domain.errors import InvalidInputError, NotFoundError
from snowdrop.domain.ids import DeploymentName, ModelName, ReceiptId, parse_name
from snowdrop.state.port import KeyRecord
from snowdrop.tenancy.keys import make_key
from snowdrop.wire.api import (
    Deploy,
    Deployed,
    Info,
    MakeKey,
    NewKey,
    NextGeneration,
    PutModel,
    SetScale,
)

BODY_BYTES_MAX = 16 << 20
LIST_DEFAULT = 50
RECENT_MAX = 10

T = TypeVar("T")


def _limit(request: web.Request) -> int:
    text = request.query.get("limit", str(LIST_DEFAULT))
    if not text.isdecimal() or not 1 <= int(text) <= 10_000:
        raise InvalidInputError(f"limit {text!r} is not a number from 1 to 10,000", where="query limit")
    return int(text)


class Api:
    """Handlers. `info` is everything about the platform that does not change while it runs."""

    def __init__(self, loop: ControlLoop, peers: Peers, info: Info, roots: OriginRoots) -> None:
        self._loop = loop
        self._state = loop.state
        self._peers = peers
        self._info = info
        self._roots = roots
        self._deploying = Deploying(loop, roots)

    def app(self) -> web.Application:
        app = web.Application(middlewares=[typed_errors], client_max_size=BODY_BYTES_MAX)
        app.add_routes(
            [
                web.get("/v1/info", self._get_info),
                web.get("/v1/models", self._list_models),
                web.get("/v1/models/{name}", self._get_model),
                web.put("/v1/models/{name}", self._put_model),
                web.get("/v1/models/{name}/generation", self._next_generation),
                web.delete("/v1/models/{name}", self._delete_model),
                *StoreApi(self._loop, self._roots).routes(),
                web.get("/v1/deployments", self._list_deployments),
                web.post("/v1/deployments/{name}", self._deploy),
                web.get("/v1/deployments/{name}", self._describe),
                web.patch("/v1/deployments/{name}/scale", self._scale),
                web.delete("/v1/deployments/{name}", self._delete),
                web.get("/v1/deployments/{name}/logs", self._logs),
                *RolloutApi(self._loop, self._deploying).routes(),
                *WhyApi(self._loop, self._peers.questions.ask).routes(),
                *(VolumesApi(self._loop.volumes).routes() if self._loop.volumes is not None else ()),
                *(SecretsApi(self._loop, self._loop.secrets).routes() if self._loop.secrets is not None else ()),
                web.get("/v1/receipts", self._list_receipts),
                web.get("/v1/receipts/{id}", self._get_receipt),
                web.get("/v1/usage", self._usage),
                web.get("/v1/keys", self._list_keys),
                web.post("/v1/keys/{name}", self._make_key),
                web.delete("/v1/keys/{name}", self._delete_key),
            ]
        )
        return app

    async def _get_info(self, _request: web.Request) -> web.Response:
        world = self._loop.world
        nodes = tuple(node.record for node in world.nodes.values())
        sandbox = next((record.sandbox for record in nodes), "")
        return answer(
            msgspec.structs.replace(self._info, nodes=nodes, gateways=tuple(world.gateways), sandbox=sandbox)
        )

    async def _list_models(self, request: web.Request) -> web.Response:
        return answer(await self._state.list_models(tenant_of(request)))

    async def _get_model(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        record = await self._state.get_model(tenant_of(request), ModelName(name))
        if record is None:
            raise unknown_model(name)
        return answer(record)

    async def _put_model(self, request: web.Request) -> web.Response:
        body = await body_of(request, PutModel)
        return answer(await self._deploying.put_model(tenant_of(request), request.match_info["name"], body), 201)

    async def _next_generation(self, request: web.Request) -> web.Response:
        name = ModelName(parse_name(request.match_info["name"], what="model name"))
        kind = request.query.get("kind", "")
        generation = await self._roots.next_generation(tenant_of(request), name, kind)
        return answer(NextGeneration(generation=generation))

    async def _delete_model(self, request: web.Request) -> web.Response:
        await self._deploying.delete_model(tenant_of(request), request.match_info["name"])
        return web.Response(status=204)

    async def _list_deployments(self, request: web.Request) -> web.Response:
        tenant, world = tenant_of(request), self._loop.world
        keys = sorted(key for key in world.deployments if key[0] == tenant)
        return answer([deployment_view(world, key, self._info.gateway_url) for key in keys])

    async def _deploy(self, request: web.Request) -> web.Response:
        body = await body_of(request, Deploy)
        revision, created = await self._deploying.deploy(tenant_of(request), request.match_info["name"], body)
        url = f"{self._info.gateway_url}/{revision.deployment}"
        deployed = Deployed(deployment=revision.deployment, revision=revision.id, created=created, url=url)
        return answer(deployed, 201)

    async def _describe(self, request: web.Request) -> web.Response:
        key = (tenant_of(request), DeploymentName(request.match_info["name"]))
        recent = await self._state.list_replicas(*key, ended=True, limit=RECENT_MAX)
        # Asked after the read: the deployment may go while it waits.
        if key not in self._loop.world.deployments:
            raise unknown_deployment(key[1])
        sandbox = next((node.record.sandbox for node in self._loop.world.nodes.values()), "")
        view = describe(self._loop.world, key, gateway_url=self._info.gateway_url, sandbox=sandbox, recent=recent)
        return answer(view)

    async def _scale(self, request: web.Request) -> web.Response:
        body = await body_of(request, SetScale)
        return answer(await self._deploying.scale(tenant_of(request), request.match_info["name"], body))

    async def _delete(self, request: web.Request) -> web.Response:
        await self._deploying.delete(tenant_of(request), request.match_info["name"])
        return web.Response(status=202)

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        """The agent's answer, passed on as it comes. Logs outlive their deployment, so no check is made."""
        tenant, name = tenant_of(request), request.match_info["name"]
        return await pass_to_agent(self._loop, request, f"logs/{tenant}/{name}")

    async def _list_receipts(self, request: web.Request) -> web.Response:
        name = request.query.get("deployment")
        deployment = DeploymentName(name) if name else None
        found = await self._state.list_receipts(tenant_of(request), deployment, limit=_limit(request))
        return answer(found)

    async def _get_receipt(self, request: web.Request) -> web.Response:
        receipt = await self._state.get_receipt(tenant_of(request), ReceiptId(request.match_info["id"]))
        if receipt is None:
            raise NotFoundError(
                f"there is no receipt {request.match_info['id']!r}",
                where="receipt id",
                next_step="`snowdrop receipts` lists them",
            )
        return answer(receipt)

    async def _usage(self, request: web.Request) -> web.Response:
        return answer(await self._state.usage_totals(tenant_of(request)))

    async def _list_keys(self, request: web.Request) -> web.Response:
        return answer(await self._state.list_keys(tenant_of(request)))

    async def _make_key(self, request: web.Request) -> web.Response:
        secret, digest = make_key()
        name = parse_name(request.match_info["name"], what="key name")
        asked = await body_of(request, MakeKey) if request.can_read_body else MakeKey()
        record = KeyRecord(
            tenant=tenant_of(request),
            name=name,
            key_sha256=digest,
            created_unix_ns=time.time_ns(),
            priority_max=asked.priority_max,
        )
        await self._state.put_key(record)
        await self._peers.load_keys()
        return answer(NewKey(name=name, secret=secret), 201)

    async def _delete_key(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if not await self._state.delete_key(tenant_of(request), name):
            raise NotFoundError(f"there is no key {name!r}", next_step="`snowdrop key ls` lists them")
        await self._peers.load_keys()
        return web.Response(status=204)

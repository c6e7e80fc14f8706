"""Control's part of `snowdrop store`: what is named, and the way to the node's content."""

from __future__ import annotations

import aiohttp
import msgspec
from aiohttp import web

from snowdrop.control.loop import ControlLoop
from snowdrop.control.origin_roots import OriginRoots
from snowdrop.domain.errors import PlatformDownError
from snowdrop.wire.api import StoreModels

CONNECT_S_MAX = 5.0


class StoreApi:
    """`/v1/store/...`. Not for one tenant: whoever can open control's socket runs the platform."""

    def __init__(self, loop: ControlLoop, roots: OriginRoots) -> None:
        self._loop = loop
        self._roots = roots

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/store/roots", self._get_roots),
            web.post("/v1/store/roots", self._publish_roots),
            web.get("/v1/store/models", self._get_models),
            web.route("*", "/v1/store/node/{tail:.+}", self._pass_on),
        ]

    async def _get_roots(self, _request: web.Request) -> web.Response:
        async with self._roots.changing:
            found = await self._roots.gather()
        return web.Response(body=msgspec.json.encode(found), content_type="application/json")

    async def _publish_roots(self, _request: web.Request) -> web.Response:
        async with self._roots.changing:
            found = await self._roots.publish_all()
        return web.Response(body=msgspec.json.encode(found), content_type="application/json")

    async def _get_models(self, _request: web.Request) -> web.Response:
        found = StoreModels(models=tuple(await self._loop.state.list_models(None)))
        return web.Response(body=msgspec.json.encode(found), content_type="application/json")

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        return await pass_to_agent(self._loop, request, f"store/{request.match_info['tail']}")


async def pass_to_agent(loop: ControlLoop, request: web.Request, path: str) -> web.StreamResponse:
    """The agent's answer to the same request at another path, passed on as it comes."""
    node = next(iter(loop.world.nodes.values()), None)
    if node is None:
        raise PlatformDownError("no node is connected", where="agent", next_step="`snowdrop up` starts it")
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S_MAX)
    connector = aiohttp.UnixConnector(path=node.api_socket)
    answer: web.StreamResponse | None = None
    try:
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
            session.request(
                request.method, f"http://agent/{path}", params=request.query, data=await request.read()
            ) as response,
        ):
            answer = web.StreamResponse(status=response.status)
            if "content-type" in response.headers:
                answer.headers["content-type"] = response.headers["content-type"]
            await answer.prepare(request)
            async for chunk in response.content.iter_any():
                await answer.write(chunk)
    except aiohttp.ClientError as error:
        if answer is None or request.transport is None:
            raise PlatformDownError(
                "the node's agent does not answer",
                where=str(error),
                next_step="it is started again; try again",
            ) from error
        request.transport.abort()  # lines that end early must not look like all there are
        return answer
    await answer.write_eof()
    return answer

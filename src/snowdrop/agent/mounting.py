"""Mounts that people ask for, over the agent's HTTP API: `PUT`, `DELETE` and `GET /v1/mounts`, and
`POST /v1/mounts/ready` for what was started in an image.

The socket belongs to the owner of the state folder, who may mount on this machine anyway; control and its API keys
have no part in it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from aiohttp import web

from snowdrop.agent.mounts import ModelMounts
from snowdrop.domain.errors import InvalidInputError, SnowdropError
from snowdrop.wire.mounts import MountReady, PersonalMount, StartSummary, Unmount

BODY_BYTES_MAX = 64 << 10
Body = TypeVar("Body", PersonalMount, Unmount, MountReady)
Handler = Callable[[web.Request], Awaitable[web.Response]]


def add_mount_routes(app: web.Application, mounts: ModelMounts) -> None:
    """Bodies are `wire.mounts`; errors are answered as control answers them."""

    async def put(request: web.Request) -> web.Response:
        await mounts.add(await _body(request, PersonalMount))
        return _json(mounts.personal())

    async def delete(request: web.Request) -> web.Response:
        await mounts.remove((await _body(request, Unmount)).directory)
        return _json(mounts.personal())

    async def get(_request: web.Request) -> web.Response:
        return _json(mounts.personal())

    async def ready(request: web.Request) -> web.Response:
        directory = (await _body(request, MountReady)).directory
        told = await mounts.ready_at(directory)
        if told is None:
            return _json(StartSummary(directory=directory, is_known=False))
        return _json(
            StartSummary(
                directory=directory,
                is_known=True,
                foreseen_bytes=told.foreseen_bytes,
                recorded_bytes=told.recorded_bytes,
                missed_bytes=told.missed_bytes,
                late_bytes=told.late_bytes,
            )
        )

    app.router.add_post("/v1/mounts/ready", _answered(ready))
    app.router.add_put("/v1/mounts", _answered(put))
    app.router.add_delete("/v1/mounts", _answered(delete))
    app.router.add_get("/v1/mounts", _answered(get))


def _answered(handler: Handler) -> Handler:
    async def answer(request: web.Request) -> web.Response:
        try:
            return await handler(request)
        except SnowdropError as error:
            return _json({"error": error.body()}, status=error.http_status)

    return answer


async def _body(request: web.Request, kind: type[Body]) -> Body:
    data = await request.content.read(BODY_BYTES_MAX)
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise InvalidInputError(f"not understood: {error}", where="body") from error


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")

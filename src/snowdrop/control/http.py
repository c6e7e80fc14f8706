"""What the parts of control's API have in common: whose a request is, its body, and the form of an answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from aiohttp import web

from snowdrop.control.world import DeploymentKey
from snowdrop.domain.errors import InvalidInputError, SnowdropError
from snowdrop.domain.ids import DEFAULT_TENANT, DeploymentName, TenantId
from snowdrop.wire.api import TENANT_HEADER

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def tenant_of(request: web.Request) -> TenantId:
    """Whose request it is; everything that it touches has that in its key."""
    return TenantId(request.headers.get(TENANT_HEADER, DEFAULT_TENANT))


def key_of(request: web.Request) -> DeploymentKey:
    """The deployment that a path with `{name}` is about."""
    return tenant_of(request), DeploymentName(request.match_info["name"])


async def body_of(request: web.Request, kind: type[T], *, is_secret: bool = False) -> T:
    """The decoded body. Raises InvalidInputError; for a secret without the decoder's words, which may quote it."""
    try:
        return msgspec.json.decode(await request.read(), type=kind)
    except msgspec.DecodeError as error:
        if is_secret:
            raise InvalidInputError("bad request body", where=request.path) from None
        raise InvalidInputError(f"bad request body: {error}", where=request.path) from error


def answer(value: object, status: int = 200) -> web.Response:
    """The value as JSON."""
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")


@web.middleware
async def typed_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Errors of the domain as bodies with their status."""
    try:
        return await handler(request)
    except SnowdropError as error:
        return answer({"error": error.body()}, status=error.http_status)

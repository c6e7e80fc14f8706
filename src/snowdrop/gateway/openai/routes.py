"""`/v1/models`, `/v1/chat/completions`, `/v1/completions`, `/v1/embeddings`.

`model` names a deployment of the caller's tenant, which is woken if it sleeps. Body and answer pass as they are:
what a client may ask for is the engine's business.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import hdrs, web

from snowdrop.domain.errors import MethodNotAllowedError, NotFoundError, SnowdropError
from snowdrop.domain.ids import DeploymentName
from snowdrop.domain.openai_errors import encoded, headers_of, shape, status_of
from snowdrop.domain.servers import OPENAI_PATHS
from snowdrop.gateway.bodies import IncomingBody
from snowdrop.gateway.call import CallerGoneError, WholeBody
from snowdrop.gateway.openai.asking import read_asked, read_whole
from snowdrop.gateway.openai.sink import OpenAiSink
from snowdrop.gateway.openai.speaking import not_spoken
from snowdrop.gateway.preferences import read_preferences
from snowdrop.gateway.relay import Relay, make_call, request_id_of
from snowdrop.tenancy.keys import KEY_PREFIX, bearer, key_sha256
from snowdrop.wire.slots import Speaker

_encode = msgspec.json.Encoder().encode
_KNOWN = ", ".join(("/v1/models", *OPENAI_PATHS))

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def add_routes(app: web.Application, relay: Relay) -> None:
    """Adds the dialect to a worker's application."""
    api = OpenAiApi(relay)
    app.router.add_get("/v1/models", api.models)
    app.router.add_get("/v1/models/{model}", api.model)
    for path in OPENAI_PATHS:
        app.router.add_post(path, api.complete)
    app.router.add_route("*", "/v1", api.unknown)
    app.router.add_route("*", "/v1/{tail:.*}", api.unknown)


class OpenAiApi:
    """The handlers of one worker."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """Carries one request to the deployment that `model` names."""
        arrived_unix_ns = time.time_ns()
        request_id = request_id_of(request)
        applied: dict[str, str] | None = None
        try:
            body = await read_whole(await IncomingBody.begin(request, self._relay.request_bytes_max))
            asked = read_asked(body)
            preferred = read_preferences(request.headers)
            applied = preferred.applied
            call = make_call(
                request,
                DeploymentName(asked.model),
                request.rel_url.raw_path_qs,
                WholeBody(body),
                request_id=request_id,
                arrived_unix_ns=arrived_unix_ns,
                asked=preferred,
            )
            call.kind = "openai"
            call.caller = msgspec.structs.replace(call.caller, key_sha256=digest_of(request))
            call.dialect = request.path
            if preferred.respond_async and self._relay.respond_async is not None:
                await self._check(request, call.deployment)
                return await self._relay.respond_async(request, call)
            # Comments in the stream keep a client's read timeout from ending the wait for a cold start.
            call.wait = msgspec.structs.replace(call.wait, progress=bool(asked.stream))
            sink = OpenAiSink(request, call, applied)
            await self._relay.carrier.carry(call, sink)
        except SnowdropError as error:
            return refusal(error, request_id, applied)
        except CallerGoneError:
            return sink.abandoned()
        return sink.response

    async def models(self, request: web.Request) -> web.StreamResponse:
        """The deployments of the caller's tenant that speak the dialect. Wakes none."""
        request_id = request_id_of(request)
        try:
            speakers = await self._speakers(request)
        except SnowdropError as error:
            return refusal(error, request_id)
        return _json({"object": "list", "data": [_model(each) for each in speakers]}, request_id)

    async def model(self, request: web.Request) -> web.StreamResponse:
        request_id = request_id_of(request)
        name = request.match_info["model"]
        try:
            for each in await self._speakers(request):
                if each.deployment == name:
                    return _json(_model(each), request_id)
        except SnowdropError as error:
            return refusal(error, request_id)
        return refusal(unknown_model(name), request_id)

    async def unknown(self, request: web.Request) -> web.StreamResponse:
        """Anything else below /v1."""
        request_id = request_id_of(request)
        if request.path in OPENAI_PATHS or request.path == "/v1/models":
            wanted = "GET" if request.path == "/v1/models" else "POST"
            wrong = MethodNotAllowedError(
                f"{request.method} is not allowed", where=request.path, next_step=f"send {wanted}"
            )
            return refusal(wrong, request_id, {"allow": wanted})
        error = NotFoundError(
            f"nothing is served at {request.method} {request.path}",
            where="request path",
            next_step=f"there is: {_KNOWN}",
        )
        return refusal(error, request_id, code="unknown_url")

    async def _check(self, request: web.Request, model: DeploymentName) -> None:
        """Before a task is made, which would fail later and elsewhere. Raises NotFoundError."""
        for each in await self._speakers(request):
            if each.deployment == model:
                if request.path not in each.paths:
                    raise not_spoken(model, request.path, each.paths)
                return
        raise unknown_model(model)

    async def _speakers(self, request: web.Request) -> tuple[Speaker, ...]:
        return await self._relay.carrier.broker.speakers(digest_of(request))


def digest_of(request: web.Request) -> str | None:
    """The SHA-256 of the caller's key. OpenAI's clients insist on a key: what is not of our form is a stand-in.

    Where keys are required, a stand-in is as good as none.
    """
    secret = bearer(request.headers.get(hdrs.AUTHORIZATION))
    return key_sha256(secret) if secret is not None and secret.startswith(KEY_PREFIX) else None


def refusal(
    error: SnowdropError, request_id: str, extra: dict[str, str] | None = None, *, code: str | None = None
) -> web.Response:
    """An error as the whole answer."""
    return web.Response(
        status=status_of(error),
        headers={**headers_of(error, request_id), **(extra or {})},
        body=encoded(shape(error, request_id, code=code)),
    )


def unknown_model(name: str) -> NotFoundError:
    return NotFoundError(
        f"the model {name!r} does not exist",
        where="model",
        next_step="GET /v1/models lists the models that there are",
    )


def _model(speaker: Speaker) -> dict[str, Any]:
    return {
        "id": speaker.deployment,
        "object": "model",
        "created": speaker.created_unix_s,
        "owned_by": speaker.tenant,
    }


def _json(value: object, request_id: str) -> web.Response:
    return web.Response(
        headers={"x-request-id": request_id, "content-type": "application/json"}, body=_encode(value)
    )

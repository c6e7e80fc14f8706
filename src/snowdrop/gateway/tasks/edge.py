"""`/v1/tasks` at the gateway, and `Prefer: respond-async` on any request: both end at control."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import msgspec
from aiohttp import hdrs, web
from multidict import CIMultiDict

from snowdrop.domain.errors import InvalidInputError, SnowdropError
from snowdrop.domain.layout import StateLayout
from snowdrop.domain.openai_errors import encoded, headers_of, ours, shape, status_of
from snowdrop.gateway.call import Call
from snowdrop.gateway.carrier import DROPPED_DOWN, without
from snowdrop.gateway.httpsink import error_response
from snowdrop.gateway.relay import request_id_of
from snowdrop.gateway.tasks.client import READ_BYTES, TaskControl, control_away
from snowdrop.tenancy.keys import bearer, key_sha256
from snowdrop.wire.tasks import KEY_HEADER, TASK_HEADER, WAIT_S_MAX, NewTask

WEBHOOK_HEADER = "snowdrop-webhook"
TOLD = ("idempotency-key", "content-type", "range")
NO_LENGTH = DROPPED_DOWN - {"content-length"}
# Of the request that becomes a task: what is no part of the call itself.
NOT_OF_THE_CALL = frozenset({"prefer", "idempotency-key", WEBHOOK_HEADER, "snowdrop-timeout", "snowdrop-deadline"})


class _Question(msgspec.Struct, frozen=True, kw_only=True):
    """What control is asked; `extra` are headers of the answer. `is_openai` puts errors into that shape."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    data: bytes | AsyncIterator[bytes] | None
    extra: dict[str, str]
    is_openai: bool = False


class TaskEdge:
    """Handlers of one worker."""

    def __init__(self, control: TaskControl) -> None:
        self._control = control

    def add_routes(self, app: web.Application) -> None:
        """To be called before the routes of deployments are added."""
        one = "/v1/tasks/{id}"
        for method, path in (
            ("POST", "/v1/tasks"),
            ("GET", "/v1/tasks"),
            ("GET", "/v1/task-counts"),
            ("GET", "/v1/task-webhook-secret"),
            ("GET", one),
            ("DELETE", one),
            ("GET", one + "/result"),
            ("POST", one + "/retry"),
        ):
            app.router.add_route(method, path, self._pass_on)

    async def respond_async(self, request: web.Request, call: Call) -> web.StreamResponse:
        """Makes a task of a call. With `Prefer: respond-async, wait=N` its answer, if it is there within N s."""
        headers = {name: value for name, value in call.headers.items() if name.lower() not in NOT_OF_THE_CALL}
        kept = (request.headers.get(name, "") for name in (WEBHOOK_HEADER, *TOLD))
        if not all(value.isascii() for value in (*headers.values(), *kept)):
            raise InvalidInputError("headers of a task are plain ASCII", where="headers")
        new = NewTask(
            deployment=call.deployment,
            path=call.target,
            method=call.method,
            headers=headers,
            webhook=request.headers.get(WEBHOOK_HEADER, ""),
            ttl_s=max(0.0, call.deadline_unix_s - time.time()) if call.deadline_unix_s is not None else None,
        )
        wait_s = min(call.wait.wait_s_max or 0.0, WAIT_S_MAX)
        told = {TASK_HEADER: msgspec.json.encode(new).decode(), KEY_HEADER: call.caller.key_sha256 or ""}
        if "idempotency-key" in request.headers:
            told["idempotency-key"] = request.headers["idempotency-key"]
        applied = f"respond-async, wait={wait_s:g}" if wait_s else "respond-async"
        extra = {"x-request-id": call.request_id, "preference-applied": applied}
        query = {"wait": f"{wait_s:g}"} if wait_s else {}
        whole = call.body.whole
        data = call.body.stream() if whole is None else whole
        question = _Question(
            method="POST",
            path="/v1/tasks",
            query=query,
            headers=told,
            data=data,
            extra=extra,
            is_openai=call.kind == "openai",
        )
        return await self._ask(request, question)

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        request_id = request_id_of(request)
        try:
            secret = bearer(request.headers.get(hdrs.AUTHORIZATION))
            told = {KEY_HEADER: key_sha256(secret) if secret is not None else ""}
            for name in TOLD:
                if name in request.headers:
                    told[name] = request.headers[name]
            if not all(value.isascii() for value in told.values()):
                raise InvalidInputError(f"{', '.join(TOLD)} are plain ASCII", where="headers")
            data = request.content.iter_chunked(READ_BYTES) if request.can_read_body else None
            question = _Question(
                method=request.method,
                path=request.rel_url.raw_path,
                query=dict(request.query),
                headers=told,
                data=data,
                extra={"x-request-id": request_id},
            )
            return await self._ask(request, question)
        except SnowdropError as error:
            return error_response(error, request_id)

    async def _ask(self, request: web.Request, asked: _Question) -> web.StreamResponse:
        """Control's answer, as it comes. Raises PlatformDownError if there is none."""
        answer: web.StreamResponse | None = None
        try:
            async with self._control.session.request(
                asked.method,
                f"http://control{asked.path}",
                params=asked.query,
                headers=asked.headers,
                data=asked.data,
                allow_redirects=False,
            ) as response:
                kept = without(response.headers, NO_LENGTH)
                kept.update(asked.extra)
                if asked.is_openai and response.status >= 400:
                    return await _reshaped(response, kept)
                answer = web.StreamResponse(status=response.status, headers=kept)
                await answer.prepare(request)
                async for chunk in response.content.iter_chunked(READ_BYTES):
                    await answer.write(chunk)
                await answer.write_eof()
        except aiohttp.ClientError as error:
            if answer is None or request.transport is None:
                raise control_away(error) from error
            request.transport.abort()  # an answer that ends early must not look complete
        return answer


async def _reshaped(response: aiohttp.ClientResponse, headers: CIMultiDict[str]) -> web.Response:
    """A refusal, or the replayed failure of a task, as OpenAI's clients look for it. Others pass as they are."""
    status, body = response.status, await response.read()
    error = ours(body)
    if error is not None:
        request_id = headers.get("x-request-id", "")
        status, body = status_of(error), encoded(shape(error, request_id))
        headers.update(headers_of(error, request_id))
    headers.popall("content-length", None)
    return web.Response(status=status, headers=headers, body=body)


@asynccontextmanager
async def task_edge(layout: StateLayout) -> AsyncIterator[TaskEdge]:
    """What one worker needs to take tasks in."""
    control = TaskControl(str(layout.control_socket))
    async with control.open():
        yield TaskEdge(control)

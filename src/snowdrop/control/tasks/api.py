"""`/v1/tasks` for people and gateways, `/v1/task-leases` for gateways."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from snowdrop.control.tasks.files import TaskFiles, request_name, result_name
from snowdrop.control.tasks.queue import TaskQueue, fresh_task_id
from snowdrop.control.tasks.webhooks import WebhookKeys, check_url
from snowdrop.domain.errors import ConflictError, InvalidInputError, SnowdropError, error_from_body
from snowdrop.domain.ids import DEFAULT_TENANT, DeploymentName, TaskId, TenantId, parse_name
from snowdrop.domain.task import Task, TaskState
from snowdrop.state.tasks import LIST_MAX, TaskFilter
from snowdrop.wire.api import TENANT_HEADER
from snowdrop.wire.bodies import gathered
from snowdrop.wire.tasks import (
    END_HEADER,
    KEY_HEADER,
    NO_BODY,
    POLL_S_MAX,
    TASK_HEADER,
    WAIT_S_MAX,
    KeepLeases,
    LeaseName,
    LeasesLost,
    LeaseWish,
    NewTask,
    TaskCount,
    TaskEnd,
    TaskPage,
    WebhookSecret,
)

BODY_READ_BYTES = 256 << 10
LIST_DEFAULT = 50
KEY_CHARS_MAX = 255
RETRY_AFTER_S = "1"
NEW_TASK_BYTES_MAX = 32 << 10
"""What a submission may hold besides the request's body."""
# Headers of a call that are the connection's or the caller's own (RFC 9110, section 7.6.1).
NOT_KEPT = frozenset(
    {
        *("authorization", "host", "content-length", "expect", "connection", "keep-alive", "proxy-authenticate"),
        *("proxy-authorization", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"),
    }
)
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e]*")
_PATH = re.compile(r"/[\x21\x22\x24-\x7e]*")
# What an answer's replay must not say, because it is a new answer over another connection.
NOT_REPLAYED = frozenset({"content-length", "connection", "transfer-encoding", "keep-alive", "date", "server"})
T = TypeVar("T")
FindTenant = Callable[[str | None], TenantId]
"""The tenant of a key's hash, None for no key. Raises UnauthorisedError."""


class TasksApi:
    """Handlers, to be added to control's application."""

    def __init__(self, queue: TaskQueue, hooks: WebhookKeys, find_tenant: FindTenant) -> None:
        self._queue = queue
        self._files: TaskFiles = queue.files
        self._hooks = hooks
        self._find_tenant = find_tenant

    def routes(self) -> list[web.RouteDef]:
        one = "/v1/tasks/{id}"
        return [
            web.post("/v1/tasks", self._submit),
            web.get("/v1/tasks", self._list),
            web.get("/v1/task-counts", self._counts),
            web.get("/v1/task-webhook-secret", self._secret),
            web.post("/v1/task-webhook-secret", self._rotate),
            web.get(one, self._get),
            web.delete(one, self._cancel),
            web.get(one + "/result", self._result),
            web.post(one + "/retry", self._retry),
            web.post("/v1/task-leases", self._lease),
            web.put("/v1/task-leases", self._keep),
            web.get("/v1/task-leases/{tenant}/{id}/{generation}", self._request_body),
            web.post("/v1/task-leases/{tenant}/{id}/{generation}", self._finish),
        ]

    # --- people -------------------------------------------------------------------------------------------

    async def _submit(self, request: web.Request) -> web.StreamResponse:
        tenant, settings = self._tenant(request), self._queue.settings
        raw = request.headers.get(TASK_HEADER)
        chunks: AsyncIterator[bytes]
        if raw is not None:
            new, chunks = (
                _decoded(raw.encode(), NewTask, TASK_HEADER),
                request.content.iter_chunked(BODY_READ_BYTES),
            )
        else:
            data = await gathered(
                request.content.iter_chunked(BODY_READ_BYTES),
                settings.body_bytes_max + NEW_TASK_BYTES_MAX,
                what="the submission",
                bound="tasks.body_bytes_max",
                next_step="send less, or raise the setting",
            )
            new = _decoded(data, NewTask, "request body")
            chunks = _once(b"" if new.body == NO_BODY else bytes(new.body))
        new = _checked(new, request, private_allowed=settings.webhook_private_allowed)
        name = fresh_task_id()
        body = await self._files.take(
            request_name(name), chunks, bytes_max=settings.body_bytes_max, bound="tasks.body_bytes_max"
        )
        is_new = False
        try:
            task, is_new = await self._queue.submit(tenant, new, body, name)
        finally:
            if not is_new:
                body.drop()
        wait_s = _number(request, "wait", WAIT_S_MAX)
        if wait_s:
            task = await self._queue.get(tenant, task.id, wait_s=wait_s)
            if task.ended:
                return await self._replay(request, task)
        return _json(task, 202, {"location": f"/v1/tasks/{task.id}", "snowdrop-task": task.id})

    async def _list(self, request: web.Request) -> web.Response:
        limit = int(_number(request, "limit", LIST_MAX, default=LIST_DEFAULT)) or 1
        name, state = request.query.get("deployment"), request.query.get("state")
        if state is not None and state not in set(TaskState):
            raise InvalidInputError(
                f"{state!r} is no state of a task", where="query state", next_step=f"one of {', '.join(TaskState)}"
            )
        which = TaskFilter(
            deployment=DeploymentName(name) if name else None,
            state=TaskState(state) if state else None,
            before=_cursor(request.query.get("before")),
        )
        found = await self._queue.store.listed(self._tenant(request), which, limit=limit + 1)
        last = found[limit - 1] if len(found) > limit else None
        after = f"{last.submitted_unix_ns}.{last.id}" if last is not None else ""
        return _json(TaskPage(tasks=tuple(found[:limit]), next=after))

    async def _counts(self, request: web.Request) -> web.Response:
        counts = await self._queue.store.counts(self._tenant(request))
        return _json([TaskCount(deployment=n, state=s, count=c) for (n, s), c in sorted(counts.items())])

    async def _get(self, request: web.Request) -> web.Response:
        wait_s = _number(request, "wait", WAIT_S_MAX)
        return _json(await self._queue.get(self._tenant(request), _id(request), wait_s=wait_s))

    async def _cancel(self, request: web.Request) -> web.Response:
        return _json(await self._queue.cancel(self._tenant(request), _id(request)))

    async def _retry(self, request: web.Request) -> web.Response:
        return _json(await self._queue.redrive(self._tenant(request), _id(request)), 202)

    async def _result(self, request: web.Request) -> web.StreamResponse:
        wait_s = _number(request, "wait", WAIT_S_MAX)
        task = await self._queue.get(self._tenant(request), _id(request), wait_s=wait_s)
        if not task.ended:
            return _json(task, 202, {"retry-after": RETRY_AFTER_S, "location": f"/v1/tasks/{task.id}"})
        return await self._replay(request, task)

    async def _secret(self, request: web.Request) -> web.Response:
        return _json(WebhookSecret(secret=self._hooks.secret(self._tenant(request))))

    async def _rotate(self, request: web.Request) -> web.Response:
        """The key of all tenants' secrets, so it is for whoever runs the platform: not through a gateway."""
        if KEY_HEADER in request.headers:
            raise ConflictError("only the platform's owner rotates webhook keys", where="control's socket")
        self._hooks.rotate()
        return _json(WebhookSecret(secret=self._hooks.secret(self._tenant(request))))

    async def _replay(self, request: web.Request, task: Task) -> web.StreamResponse:
        """The service's answer as it was, or the error that the task ended with."""
        told = {"snowdrop-task": task.id, "snowdrop-task-state": str(task.state)}
        if task.answer is None:
            return _error(_end_of(task), told)
        headers = [(name, value) for name, value in task.answer.headers if name.lower() not in NOT_REPLAYED]
        inline = await self._queue.store.result(task.tenant, task.id)
        path = self._files.path(result_name(task.id, task.answer.generation))
        if inline is None and task.answer.body_bytes and path.exists():
            answer: web.StreamResponse = web.FileResponse(path, status=task.answer.status)
        else:
            answer = web.Response(status=task.answer.status, body=inline or b"")
        answer.headers.popall("content-type", None)
        answer.headers.extend([*headers, *told.items()])
        return answer

    def _tenant(self, request: web.Request) -> TenantId:
        digest = request.headers.get(KEY_HEADER)
        if digest is not None:  # of a gateway, which does not know whose key it is
            return self._find_tenant(digest or None)
        return TenantId(request.headers.get(TENANT_HEADER, DEFAULT_TENANT))

    # --- gateways -----------------------------------------------------------------------------------------

    async def _lease(self, request: web.Request) -> web.Response:
        wish = await _packed(request, LeaseWish)
        return _pack(await self._queue.lease(wish.holder, wish.room, poll_s=POLL_S_MAX))

    async def _keep(self, request: web.Request) -> web.Response:
        told = await _packed(request, KeepLeases)
        return _pack(LeasesLost(lost=self._queue.leases.keep(told.holder, told.leases)))

    async def _request_body(self, request: web.Request) -> web.StreamResponse:
        name = _lease_name(request)
        self._queue.leases.check(name)
        return web.FileResponse(self._files.path(request_name(name.task)))

    async def _finish(self, request: web.Request) -> web.Response:
        name, settings = _lease_name(request), self._queue.settings
        self._queue.leases.check(name)
        end = _decoded(request.headers.get(END_HEADER, "").encode(), TaskEnd, END_HEADER)
        body = None
        if end.status:
            body = await self._files.take(
                result_name(name.task, name.generation),
                request.content.iter_chunked(BODY_READ_BYTES),
                bytes_max=settings.result_bytes_max,
                bound="tasks.result_bytes_max",
            )
        try:
            task = await self._queue.finish(name, end, body)
        except SnowdropError:
            if body is not None:
                body.drop()
            raise
        return _json(task)


def _checked(new: NewTask, request: web.Request, *, private_allowed: bool) -> NewTask:
    """With the idempotency key of the header; raises InvalidInputError for what can never be carried."""
    parse_name(new.deployment, what="deployment name")
    if not _PATH.fullmatch(new.path):
        raise InvalidInputError(
            f"path {new.path[:80]!r} is not usable", where="path", next_step="begin it with /, percent-encode it"
        )
    if new.webhook:
        check_url(new.webhook, private_allowed=private_allowed)
    headers = {name.lower(): value for name, value in new.headers.items() if name.lower() not in NOT_KEPT}
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
            raise InvalidInputError(
                f"header {name[:40]!r} cannot be sent",
                where="headers",
                next_step="names and values are plain ASCII",
            )
    if TASK_HEADER not in request.headers and new.body != NO_BODY:
        headers.setdefault("content-type", "application/json")
    key = request.headers.get("idempotency-key", new.idempotency_key)
    if len(key) > KEY_CHARS_MAX:
        raise InvalidInputError(
            f"an idempotency key has at most {KEY_CHARS_MAX} characters", where="header idempotency-key"
        )
    return msgspec.structs.replace(new, headers=headers, idempotency_key=key, body=NO_BODY)


def _end_of(task: Task) -> SnowdropError:
    if task.state is TaskState.CANCELLED:
        return ConflictError(
            f"task {task.id} was cancelled", where="task", next_step="`snowdrop task retry` queues it again"
        )
    if task.error is not None:
        return error_from_body(task.error)
    return SnowdropError(f"task {task.id} failed: {task.reason}", where="task")


def _error(error: SnowdropError, headers: dict[str, str]) -> web.Response:
    return _json({"error": error.body()}, error.http_status, headers)


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    data = msgspec.json.encode(value)
    return web.Response(status=status, body=data, headers=headers, content_type="application/json")


def _pack(value: Any) -> web.Response:
    return web.Response(body=msgspec.msgpack.encode(value), content_type="application/msgpack")


async def _packed(request: web.Request, kind: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(await request.read(), type=kind)
    except msgspec.DecodeError as error:
        raise InvalidInputError(f"bad request body: {error}", where=request.path) from error


def _decoded(data: bytes, kind: type[T], where: str) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise InvalidInputError(
            f"this is no task: {error}", where=where, next_step="docs/reference/http.md says what belongs into it"
        ) from error


async def _once(data: bytes) -> AsyncIterator[bytes]:
    if data:
        yield data


def _id(request: web.Request) -> TaskId:
    return TaskId(request.match_info["id"])


def _lease_name(request: web.Request) -> LeaseName:
    info = request.match_info
    if not info["generation"].isdecimal():
        raise InvalidInputError("a generation is a number", where=request.path)
    return LeaseName(tenant=TenantId(info["tenant"]), task=TaskId(info["id"]), generation=int(info["generation"]))


def _number(request: web.Request, name: str, most: float, *, default: float = 0.0) -> float:
    text = request.query.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= most * 1_000:
        raise InvalidInputError(f"{name} {text[:20]!r} is not a number from 0 to {most:g}", where=f"query {name}")
    return min(value, most)


def _cursor(text: str | None) -> tuple[int, str] | None:
    if not text:
        return None
    number, _, name = text.partition(".")
    if not number.isdecimal() or len(number) > 19 or not name:
        raise InvalidInputError(f"{text[:60]!r} is no place in the list", where="query before")
    return int(number), name

"""OpenAI's dialect at the gateway, asked by the official client where it can be."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import openai
import pytest
from aiohttp import web

from platform_helpers import replica_route, route
from snowdrop.domain.errors import (
    ErrorBody,
    InvalidInputError,
    QueueFullError,
    RevisionFailedError,
    SnowdropError,
    TimedOutError,
    UnavailableError,
    error_kinds,
)
from snowdrop.domain.ids import DEFAULT_TENANT, TenantId, parse_name
from snowdrop.domain.openai_errors import headers_of, ours, shape, status_of
from snowdrop.domain.servers import OPENAI_PATHS
from snowdrop.domain.service import QueueSpec
from snowdrop.gateway.app import build_app
from snowdrop.gateway.broker import LocalBroker
from snowdrop.gateway.carrier import Carrier
from snowdrop.gateway.edge.server import serving
from snowdrop.gateway.effects import Now
from snowdrop.gateway.owner import Owner
from snowdrop.gateway.queue import QueueCore
from snowdrop.gateway.relay import Relay
from snowdrop.gateway.upstream.pool import Upstreams
from snowdrop.tenancy.keys import key_sha256
from snowdrop.wire.control import KeyGrant, RouteChanged, Routes
from snowdrop.wire.http import serving_unix

pytestmark = pytest.mark.anyio
WAIT_S_MAX = 10
BODY_BYTES_MAX = 1 << 19
CHUNK = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "chat", "choices": []}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Bench:
    """A gateway with its real queues, and replicas as each test wants them."""

    def __init__(self, folder: Path, owner: Owner, core: QueueCore, url: str) -> None:
        self.folder = folder
        self.owner = owner
        self.core = core
        self.url = url
        self.client = openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="sd_mine", timeout=WAIT_S_MAX, max_retries=0
        )
        self.seen: list[tuple[web.Request, bytes]] = []

    @asynccontextmanager
    async def replica(self, handler: Handler, name: str = "chat") -> AsyncIterator[None]:
        async def noted(request: web.Request) -> web.StreamResponse:
            self.seen.append((request, await request.read()))
            return await handler(request)

        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{tail:.*}", noted)
        path = self.folder / "r.sock"
        async with serving_unix(app, path):
            there = route(
                replica_route(socket_path=str(path)),
                name=name,
                openai=OPENAI_PATHS,
                created_unix_s=77,
            )
            self.owner.from_control(
                RouteChanged(generation=2, tenant=DEFAULT_TENANT, deployment=there.deployment, route=there)
            )
            yield


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    core = QueueCore(keys_required=True)
    owner = Owner(core, "gw")
    routes = (
        route(name="chat", openai=OPENAI_PATHS, created_unix_s=77),
        route(name="plain"),
        route(name="patient", openai=OPENAI_PATHS, queue=QueueSpec(progress_first_s=0.0)),
        route(name="embed", openai=("/v1/embeddings",), created_unix_s=78),
        route(name="theirs", tenant=TenantId("other"), openai=OPENAI_PATHS),
        route(name="broken", openai=OPENAI_PATHS, refusal=RevisionFailedError("it does not start").body()),
    )
    keys = (
        KeyGrant(key_sha256=key_sha256("sd_mine"), tenant=DEFAULT_TENANT),
        KeyGrant(key_sha256=key_sha256("sd_theirs"), tenant=TenantId("other")),
    )
    owner.from_control(Routes(generation=1, deployments=routes, keys=keys))
    core.connected = True
    upstreams = Upstreams()
    relay = Relay(Carrier(LocalBroker(owner, "w"), upstreams), request_bytes_max=BODY_BYTES_MAX)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with serving(build_app(relay, ready=lambda: True), listener, shutdown_s_max=WAIT_S_MAX):
            made = Bench(tmp_path, owner, core, f"http://127.0.0.1:{listener.getsockname()[1]}")
            async with made.client:
                yield made
    upstreams.close()
    await anyio.sleep(0)


def say(**more: Any) -> dict[str, Any]:
    return {"model": "chat", "messages": [{"role": "user", "content": "hi"}], **more}


async def test_the_list_has_the_tenants_own_that_speak_the_dialect_and_wakes_none(bench: Bench) -> None:
    listed = await bench.client.models.list()
    assert [(each.id, each.created, each.owned_by) for each in listed.data] == [
        ("broken", 0, "default"),
        ("chat", 77, "default"),
        ("embed", 78, "default"),
        ("patient", 0, "default"),
    ]
    assert (await bench.client.models.retrieve("chat")).id == "chat"
    for unseen in ("theirs", "plain", "nowhere"):
        with pytest.raises(openai.NotFoundError) as missing:
            await bench.client.models.retrieve(unseen)
        assert missing.value.code == "model_not_found"
    others = await bench.client.with_options(api_key="sd_theirs").models.list()
    assert [each.id for each in others.data] == ["theirs"]
    assert all(load.arrived == 0 for load in bench.owner.load_report().loads)


async def test_body_and_answer_pass_byte_for_byte(bench: Bench) -> None:
    body = b'{ "odd": [1e3],"model" :"chat", "messages":[] }'
    answer_body = b'{"spaced":   "as it is"}'

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(body=answer_body, content_type="application/json", headers={"x-own": "1"})

    headers = {"authorization": "Bearer sd_mine", "x-request-id": "req-1"}
    async with bench.replica(answer), aiohttp.ClientSession() as session:
        for path in OPENAI_PATHS:
            async with session.post(bench.url + path + "?a=b", data=body, headers=headers) as response:
                assert (response.status, await response.read()) == (200, answer_body)
                assert (response.headers["x-own"], response.headers["x-request-id"]) == ("1", "req-1")
        large = json.dumps({"model": "chat", "pad": "x" * 300_000}).encode()
        async with session.post(bench.url + OPENAI_PATHS[0], data=large, headers=headers) as response:
            assert response.status == 200
    assert [request.raw_path for request, _ in bench.seen[:3]] == [path + "?a=b" for path in OPENAI_PATHS]
    assert [sent for _, sent in bench.seen] == [body, body, body, large]
    assert all("authorization" not in request.headers for request, _ in bench.seen)


async def test_a_request_waits_for_a_deployment_that_sleeps(bench: Bench) -> None:
    async def answer(_request: web.Request) -> web.Response:
        return web.json_response(
            {"object": "chat.completion", "choices": [], "id": "1", "created": 1, "model": "c"}
        )

    done: list[str] = []

    async def ask() -> None:
        done.append((await bench.client.chat.completions.create(**say())).id)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        with anyio.fail_after(WAIT_S_MAX):
            while not any(load.queued for load in bench.owner.load_report().loads):
                await anyio.sleep(0.005)
        async with bench.replica(answer):
            with anyio.fail_after(WAIT_S_MAX):
                while not done:
                    await anyio.sleep(0.005)


async def test_a_stream_comes_piece_by_piece(bench: Bench) -> None:
    seen: list[str] = []
    heard = anyio.Event()

    async def stream(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        choice = {"index": 0, "delta": {"content": "one"}, "finish_reason": None}
        await answer.write(f"data: {json.dumps({**CHUNK, 'choices': [choice]})}\n\n".encode())
        await heard.wait()  # the first piece must have come through
        await answer.write(b"data: [DONE]\n\n")
        return answer

    async with bench.replica(stream):
        async for chunk in await bench.client.chat.completions.create(**say(stream=True)):
            seen.append(chunk.choices[0].delta.content or "")
            heard.set()
    assert seen == ["one"]


@pytest.mark.parametrize("model", ["nowhere", "theirs", "no/such name", "plain"])
async def test_an_unknown_model_is_404_in_their_shape_and_nothing_is_woken(bench: Bench, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await bench.client.chat.completions.create(**say(model=model))
    assert (missing.value.status_code, missing.value.code) == (404, "model_not_found")
    assert (missing.value.type, missing.value.param) == ("invalid_request_error", "model")
    assert repr(model) in missing.value.message
    assert missing.value.response.headers["x-should-retry"] == "false"
    assert not any(load.queued or load.arrived for load in bench.owner.load_report().loads)


async def test_a_stand_in_for_a_key_is_as_good_as_none(bench: Bench) -> None:
    stranger = bench.client.with_options(api_key="none")
    with pytest.raises(openai.AuthenticationError, match="API key is required"):
        await stranger.models.list()
    with pytest.raises(openai.AuthenticationError, match="API key is required"):
        await stranger.chat.completions.create(**say())
    bench.core._keys_required = False
    assert (await stranger.models.list()).data
    with pytest.raises(openai.AuthenticationError, match="unknown API key"):
        await bench.client.with_options(api_key="sd_wrong").models.list()


async def test_a_deadline_that_comes_in_the_queue_is_504_in_their_shape(bench: Bench) -> None:
    async with anyio.create_task_group() as tasks:

        async def ask() -> None:
            with pytest.raises(openai.InternalServerError, match="deadline came before a slot was free") as late:
                await bench.client.chat.completions.create(**say(), extra_headers={"snowdrop-timeout": "7"})
            assert (late.value.status_code, late.value.code) == (504, "timed_out")

        tasks.start_soon(ask)
        with anyio.fail_after(WAIT_S_MAX):
            while not bench.core.busy:
                await anyio.sleep(0.001)
        now_s = anyio.current_time() + 8.0
        bench.owner._carry_out(bench.core.tick(Now(now_s, int(now_s * 1e9))))


async def test_an_embedder_is_not_woken_by_a_chat(bench: Bench) -> None:
    with pytest.raises(openai.NotFoundError, match=r"does not serve /v1/chat/completions"):
        await bench.client.chat.completions.create(**say(model="embed"))


async def test_keys_and_other_errors_in_their_shape(bench: Bench) -> None:
    with pytest.raises(openai.AuthenticationError) as refused:
        await bench.client.with_options(api_key="sd_wrong").chat.completions.create(**say())
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        await bench.client.with_options(api_key="sd_wrong").models.list()
    with pytest.raises(openai.InternalServerError, match="it does not start") as failed:
        await bench.client.chat.completions.create(**say(model="broken"))
    assert (failed.value.status_code, failed.value.code) == (503, "revision_failed")
    assert failed.value.response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/v1/chat/completions", b"{", 400, None),
        ("POST", "/v1/chat/completions", b"[]", 400, None),
        ("POST", "/v1/chat/completions", b'{"messages": []}', 400, None),
        ("POST", "/v1/chat/completions", b'{"model": 5}', 400, None),
        ("POST", "/v1/chat/completions", b"x" * (BODY_BYTES_MAX + 1), 413, "too_large"),
        ("GET", "/v1/chat/completions", b"", 405, "method_not_allowed"),
        ("POST", "/v1/models", b"", 405, "method_not_allowed"),
        ("GET", "/v1/files", b"", 404, "unknown_url"),
        ("GET", "/v1", b"", 404, "unknown_url"),
    ],
)
async def test_what_cannot_be_is_said_in_their_shape(
    bench: Bench, method: str, path: str, body: bytes, status: int, code: str | None
) -> None:
    headers = {"authorization": "Bearer sd_mine"}
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, bench.url + path, data=body, headers=headers) as response,
    ):
        error = (await response.json())["error"]
        assert (response.status, error["code"], error["type"]) == (status, code, "invalid_request_error")
        assert error["message"]


async def test_a_services_own_error_is_put_into_their_shape_and_an_engines_passes(bench: Bench) -> None:
    theirs = {"error": {"message": "as is", "type": "x", "code": 9}}
    error = InvalidInputError("it does not fit", fields=[{"field": "top_p", "problem": "is odd"}])

    async def answer(request: web.Request) -> web.Response:
        if request.path == "/v1/embeddings":
            return web.json_response(theirs, status=418)
        return web.json_response(
            {"error": {"kind": "invalid_input", "message": error.message, "fields": error.fields}}, status=422
        )

    async with bench.replica(answer):
        with pytest.raises(openai.BadRequestError, match="it does not fit") as refused:
            await bench.client.chat.completions.create(**say())
        assert refused.value.param == "top_p"
        with pytest.raises(openai.APIStatusError) as odd:
            await bench.client.embeddings.create(model="chat", input="x")
        assert odd.value.status_code == 418
        assert odd.value.body == theirs["error"]


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (500, b"<html>no</html>", "answered 500: <html>no</html>"),
        (422, b'{"detail": "bad"}', 'answered 422: {"detail": "bad"}'),
        (503, b"", "answered 503"),
        (400, b'{"error": {"message": "as it is"}}', "^as it is$"),
    ],
)
async def test_any_failure_is_one_for_a_stream_that_has_begun_while_it_waited(
    bench: Bench, status: int, body: bytes, said: str
) -> None:
    begun, failed = anyio.Event(), anyio.Event()

    async def ask() -> None:
        stream = await bench.client.chat.completions.create(**say(model="patient", stream=True))
        begun.set()
        with pytest.raises(openai.APIError, match=said):
            await anext(aiter(stream))
        failed.set()

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(status=status, body=body)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        with anyio.fail_after(WAIT_S_MAX):
            await begun.wait()
            async with bench.replica(answer, "patient"):
                await failed.wait()


async def test_a_replica_that_dies_in_a_stream_ends_it_with_their_error(bench: Bench) -> None:
    async def die(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        await answer.write(b"data: " + json.dumps(CHUNK).encode() + b"\n\n")
        assert request.transport is not None
        request.transport.abort()
        return answer

    async with bench.replica(die):
        with pytest.raises(openai.APIError, match="replica died") as died:
            async for _ in await bench.client.chat.completions.create(**say(stream=True)):
                pass
    assert died.value.code == "replica_died"


def test_every_kind_of_error_has_a_shape() -> None:
    for kind, cls in error_kinds().items():
        made = shape(cls("what", next_step="do this"), "req-1")
        status = status_of(cls("what"))
        assert made.message == "what; do this"
        assert made.kind == kind
        assert made.type == (
            "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
        )
        assert headers_of(cls("what"), "r")["x-should-retry"] == ("true" if cls.retryable else "false")


@pytest.mark.parametrize(
    ("error", "after"),
    [
        (QueueFullError("x", retry_after_s=2.2), "3"),
        (UnavailableError("x"), "1"),
        (TimedOutError("x"), None),
        (RevisionFailedError("x"), None),
    ],
)
def test_when_to_come_back(error: SnowdropError, after: str | None) -> None:
    assert headers_of(error, "r").get("retry-after") == after


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"error": 5}', b'{"error": {"kind": 7}}', b"\xff"])
def test_what_is_no_error_of_ours_is_left_alone(body: bytes) -> None:
    assert ours(body) is None
    assert isinstance(ErrorBody(kind="x", message=""), ErrorBody)


@pytest.mark.parametrize("name", ["v1", "healthz", "readyz", "metrics"])
def test_no_deployment_takes_the_gateways_own_paths(name: str) -> None:
    with pytest.raises(InvalidInputError, match="reserved"):
        parse_name(name, what="deployment name")

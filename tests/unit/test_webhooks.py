"""Webhooks: signed so that others can check it, tried again, told once it is taken, and to no private address."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.test_utils import TestServer

from snowdrop.control.tasks import webhooks as module
from snowdrop.control.tasks.webhooks import PublicResolver, WebhookKeys, Webhooks, check_url, is_public
from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.ids import DEFAULT_TENANT, TenantId
from snowdrop.domain.task import Webhook
from snowdrop.policy.tasks import Event, step
from task_helpers import answer, happening, leased, task
from task_world import TaskWorld

pytestmark = pytest.mark.anyio


def checked(headers: Any, body: bytes, secret: str) -> bool:
    """As a receiver does it (https://github.com/standard-webhooks/standard-webhooks/blob/main/spec)."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    return f"v1,{expected}" in headers["webhook-signature"].split(" ")


class TestKeys:
    def test_each_tenant_has_a_secret_of_its_own_that_stays(self, tmp_path: Path) -> None:
        keys = WebhookKeys(tmp_path / "keys" / "webhooks")
        again = WebhookKeys(tmp_path / "keys" / "webhooks")
        assert keys.secret(DEFAULT_TENANT) == again.secret(DEFAULT_TENANT) != keys.secret(TenantId("other"))
        assert (tmp_path / "keys" / "webhooks").stat().st_mode & 0o777 == 0o600

    def test_after_a_rotation_the_secret_before_still_checks_and_the_one_before_that_does_not(
        self, tmp_path: Path
    ) -> None:
        keys = WebhookKeys(tmp_path / "webhooks")
        secrets = [keys.secret(DEFAULT_TENANT)]
        for _ in range(2):
            keys.rotate()
            secrets.append(keys.secret(DEFAULT_TENANT))
        headers = keys.headers(DEFAULT_TENANT, "msg_1", b"{}", now_unix_s=5)
        assert [checked(headers, b"{}", secret) for secret in secrets] == [False, True, True]
        assert not checked(headers, b"{ }", secrets[-1])


class TestAddresses:
    @pytest.mark.parametrize(
        "address",
        [
            *("127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "0.0.0.0", "224.0.0.1"),
            *(
                "::1",
                "fe80::1%eth0",
                "fd00::1",
                "::ffff:127.0.0.1",
                "::ffff:10.0.0.1",
                "100.64.0.1",
                "::",
                "ff02::1",
            ),
            *("2002:7f00:1::", "ff02::1"),
        ],
    )
    def test_private_ones_are_refused(self, address: str) -> None:
        assert not is_public(address)
        host = f"[{address.partition('%')[0]}]" if ":" in address else address
        with pytest.raises(InvalidInputError, match="not a public address"):
            check_url(f"https://{host}/x", private_allowed=False)
        check_url(f"https://{host}/x", private_allowed=True)

    @pytest.mark.parametrize("address", ["1.1.1.1", "93.184.216.34", "2606:4700::1111"])
    def test_public_ones_are_taken(self, address: str) -> None:
        assert is_public(address)

    @pytest.mark.parametrize(
        "url", ["", "x", "ftp://a/", "http://", "http://u:p@a/", "file:///etc/passwd", "http://a:99999/"]
    )
    def test_what_is_no_url_of_a_webhook_is_refused(self, url: str) -> None:
        with pytest.raises(InvalidInputError):
            check_url(url, private_allowed=True)

    async def test_a_name_that_leads_to_a_private_address_is_not_connected_to(self) -> None:
        class Names(AbstractResolver):
            async def resolve(
                self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
            ) -> list[ResolveResult]:
                hosts = {"mixed": ["10.0.0.1", "1.1.1.1"], "inside": ["127.0.0.1"]}[host]
                return [
                    ResolveResult(hostname=host, host=each, port=port, family=family, proto=0, flags=0)
                    for each in hosts
                ]

            async def close(self) -> None: ...

        resolver = PublicResolver(Names())
        assert [found["host"] for found in await resolver.resolve("mixed", 443)] == ["1.1.1.1"]
        with pytest.raises(OSError, match="no public address"):
            await resolver.resolve("inside", 443)


class Receiver:
    """Answers with the statuses that it is given, then with 204."""

    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses)
        self.heard: list[tuple[dict[str, str], bytes]] = []

    async def hear(self, request: web.Request) -> web.Response:
        self.heard.append(({k.lower(): v for k, v in request.headers.items()}, await request.read()))
        status = self.statuses.pop(0) if self.statuses else 204
        return web.Response(status=status, headers={"location": "/elsewhere"} if status == 302 else {})


@contextlib.asynccontextmanager
async def delivering(
    tmp_path: Path, receiver: Receiver, *, private_allowed: bool = True
) -> AsyncIterator[tuple[TaskWorld, WebhookKeys]]:
    """One task of `default` has ended; its webhook goes to `receiver`."""
    app = web.Application()
    app.router.add_post("/{tail:.*}", receiver.hear)
    server = TestServer(app)
    await server.start_server()
    world = TaskWorld(tmp_path, webhook_private_allowed=private_allowed)
    keys = WebhookKeys(tmp_path / "webhooks")
    given = leased(task(webhook=Webhook(url=str(server.make_url("/hook")))))
    done = step(given, happening(Event.SUCCEEDED, answer=answer(200, body_bytes=3)))
    await world.queue.store.submit(done, None, waiting_max=9)
    hooks = Webhooks(world.queue, keys)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(hooks.run)
        yield world, keys
        tasks.cancel_scope.cancel()
    await server.close()


async def hook_is(world: TaskWorld, state: str, attempts: int) -> Webhook:
    with anyio.fail_after(10):
        while True:
            stored = await world.queue.store.get(DEFAULT_TENANT, task().id)
            assert stored is not None
            assert stored.webhook is not None
            if (stored.webhook.state, stored.webhook.attempts) == (state, attempts):
                return stored.webhook
            await anyio.sleep(0.01)


async def test_an_end_is_told_signed_and_once(tmp_path: Path) -> None:
    receiver = Receiver()
    async with delivering(tmp_path, receiver) as (world, keys):
        await hook_is(world, "delivered", 1)
        ((headers, body),) = receiver.heard
        assert checked(headers, body, keys.secret(DEFAULT_TENANT))
        told = json.loads(body)
        assert told["type"] == "task.succeeded"
        assert (told["data"]["id"], told["data"]["status"], told["data"]["result_bytes"]) == ("task-1", 200, 3)
        assert await world.queue.store.hooks_due(10**30 // 10**12, limit=9) == []


async def test_a_tenant_whose_receivers_hang_does_not_hold_up_another(tmp_path: Path) -> None:
    class Hanging(Receiver):
        async def hear(self, request: web.Request) -> web.Response:
            if request.path == "/hang":
                hanging.append(request)
                await let_go.wait()
            return await super().hear(request)

    hanging: list[web.Request] = []
    let_go = anyio.Event()
    receiver = Hanging()
    async with delivering(tmp_path, receiver) as (world, _keys):
        first = await hook_is(world, "delivered", 1)
        for number in range(module.AT_ONCE_MAX + 1):
            await put_ended(world, f"task-h{number}", "slow", first.url.replace("/hook", "/hang"), due=number + 1)
        world.queue.ring_hooks()
        with anyio.fail_after(10):
            while len(hanging) < module.TENANT_AT_ONCE_MAX:
                await anyio.sleep(0.01)
            await put_ended(world, "task-quick", "quick", first.url, due=10**9)
            world.queue.ring_hooks()
            while len(receiver.heard) < 2:
                await anyio.sleep(0.01)
        assert len(hanging) == module.TENANT_AT_ONCE_MAX
        let_go.set()


async def put_ended(world: TaskWorld, name: str, tenant: str, url: str, *, due: int) -> None:
    """A task that has ended, whose webhook is due."""
    made = leased(task(name, tenant=TenantId(tenant), webhook=Webhook(url=url)))
    ended = step(made, happening(Event.SUCCEEDED, now=due, answer=answer(200)))
    await world.queue.store.submit(ended, None, waiting_max=999)


@pytest.mark.parametrize("status", [302, 400, 500])
async def test_a_delivery_that_is_not_taken_is_tried_again_later_with_its_reason(
    tmp_path: Path, status: int
) -> None:
    """A redirect too: where it leads has not been checked."""
    receiver = Receiver(status)
    async with delivering(tmp_path, receiver) as (world, _keys):
        hook = await hook_is(world, "due", 1)
        assert str(status) in hook.last_error
        assert hook.due_unix_ns > 0
        assert len(receiver.heard) == 1
        stored = await world.queue.store.get(DEFAULT_TENANT, task().id)
        assert stored is not None

        def due_now(given: Any) -> Any:
            return module.msgspec.structs.replace(
                given, webhook=module.msgspec.structs.replace(given.webhook, due_unix_ns=1)
            )

        await world.queue.store.change(DEFAULT_TENANT, task().id, due_now)
        await hook_is(world, "delivered", 2)
        first, second = receiver.heard
        assert first[0]["webhook-id"] == second[0]["webhook-id"], "the receiver can tell a repeat"


async def test_a_receiver_that_is_gone_for_good_is_given_up(tmp_path: Path) -> None:
    async with delivering(tmp_path, Receiver(410)) as (world, _keys):
        await hook_is(world, "given up", 1)


async def test_a_private_receiver_is_never_called_unless_it_is_allowed(tmp_path: Path) -> None:
    receiver = Receiver()
    async with delivering(tmp_path, receiver, private_allowed=False) as (world, _keys):
        hook = await hook_is(world, "given up", 1)
        assert "public" in hook.last_error
        assert receiver.heard == []

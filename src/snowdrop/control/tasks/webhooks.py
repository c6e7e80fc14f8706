"""Tells others of a task's end: signed as Standard Webhooks has it, tried again, to public addresses only.

https://www.standardwebhooks.com: the headers are `webhook-id`, `webhook-timestamp` and `webhook-signature`, the
last being `v1,` and the base64 of HMAC-SHA256 over `id.timestamp.body`; after a rotation there are two of those.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import logging
import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import anyio
import msgspec
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from yarl import URL

from snowdrop.control.tasks.queue import TaskQueue
from snowdrop.domain.errors import InvalidInputError, SnowdropError
from snowdrop.domain.ids import TaskId, TenantId
from snowdrop.domain.task import Task, Webhook
from snowdrop.policy.tasks import webhook_after

AT_ONCE_MAX = 64
TENANT_AT_ONCE_MAX = 16
"""Of one tenant, whose receivers may all be slow: the others' webhooks do not wait for them."""
DELIVERY_S_MAX = 15.0
LOOK_S = 1.0
KEYS_MAX = 2
"""Keys that sign: the newest, and the one before it until those who check have changed."""

log = logging.getLogger("snowdrop.control")
_spread = Random()  # noqa: S311 -- spreads pauses


class WebhookKeys:
    """The keys in `path`, newest first; a tenant's secret follows from them and is stored nowhere."""

    def __init__(self, path: Path) -> None:
        self._path = path
        if not path.exists():
            self._write([secrets.token_hex(32)])

    def secret(self, tenant: TenantId) -> str:
        """The tenant's secret as receivers configure it."""
        return "whsec_" + base64.b64encode(self._secrets(tenant)[0]).decode()

    def rotate(self) -> None:
        """A new key for all tenants; what it replaces goes on signing too, what that replaced does not."""
        self._write([secrets.token_hex(32), *self._lines()][:KEYS_MAX])

    def headers(self, tenant: TenantId, event: str, body: bytes, *, now_unix_s: int) -> dict[str, str]:
        """The three headers of a delivery."""
        signed = f"{event}.{now_unix_s}.".encode() + body
        marks = [hmac.new(secret, signed, hashlib.sha256).digest() for secret in self._secrets(tenant)]
        return {
            "webhook-id": event,
            "webhook-timestamp": str(now_unix_s),
            "webhook-signature": " ".join(f"v1,{base64.b64encode(mark).decode()}" for mark in marks),
        }

    def _secrets(self, tenant: TenantId) -> list[bytes]:
        message = b"snowdrop webhook " + tenant.encode()
        return [hmac.new(bytes.fromhex(line), message, hashlib.sha256).digest() for line in self._lines()]

    def _lines(self) -> list[str]:
        return self._path.read_text().split()

    def _write(self, lines: list[str]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = self._path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w") as file:
            file.write("\n".join(lines) + "\n")
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._path)


def check_url(text: str, *, private_allowed: bool) -> URL:
    """The URL of a webhook; InvalidInputError for one that is never called."""
    try:
        url = URL(text)
        host, port = url.host, url.port
    except ValueError:
        host, port, url = None, None, URL()
    if url.scheme not in {"http", "https"} or not host or port is None or url.user or url.password:
        raise InvalidInputError(
            f"{text[:80]!r} is no URL of a webhook", where="webhook", next_step="give http(s)://HOST/PATH"
        )
    if _is_address(host) and not private_allowed and not is_public(host):
        raise _private(host)
    return url


def is_public(address: str) -> bool:
    """Whether an address lies on the internet: not of this machine, this network, or a special range."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None) or getattr(parsed, "sixtofour", None)
    return (parsed.is_global and not parsed.is_multicast) and (mapped is None or mapped.is_global)


class PublicResolver(AbstractResolver):
    """Names to addresses, without those that are not public: the connection goes to what was checked."""

    def __init__(self, inner: AbstractResolver) -> None:
        self._inner = inner

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = [each for each in await self._inner.resolve(host, port, family) if is_public(each["host"])]
        if not found:
            raise OSError(None, f"{host} has no public address; tasks.webhook_private_allowed is not set")
        return found

    async def close(self) -> None:
        await self._inner.close()


class Webhooks:
    """Sends what is due. How far each is stands in its task, so a restart goes on where it was."""

    def __init__(
        self, queue: TaskQueue, keys: WebhookKeys, *, delivered: Callable[[Webhook], None] = lambda _hook: None
    ) -> None:
        self._queue = queue
        self._keys = keys
        self._delivered = delivered
        self._under_way: dict[TaskId, TenantId] = {}

    async def run(self) -> None:
        """For ever."""
        private_allowed = self._queue.settings.webhook_private_allowed
        resolver: AbstractResolver = ThreadedResolver()
        if not private_allowed:
            resolver = PublicResolver(resolver)
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(resolver=resolver, use_dns_cache=False, limit=AT_ONCE_MAX),
                timeout=aiohttp.ClientTimeout(total=DELIVERY_S_MAX),
                cookie_jar=aiohttp.DummyCookieJar(),
            ) as session,
            anyio.create_task_group() as tasks,
        ):
            while True:
                try:
                    busy = frozenset(t for t, n in self._counts().items() if n >= TENANT_AT_ONCE_MAX)
                    due = await self._queue.store.hooks_due(time.time_ns(), limit=AT_ONCE_MAX, without=busy)
                except SnowdropError as error:
                    log.warning("webhooks are looked at again later: %s", error)
                    due = []
                for task in due:
                    if task.id not in self._under_way and self._has_room(task.tenant):
                        self._under_way[task.id] = task.tenant
                        tasks.start_soon(self._deliver, session, task)
                await self._queue.wait_hooks(LOOK_S)

    def _counts(self) -> Counter[TenantId]:
        return Counter(self._under_way.values())

    def _has_room(self, tenant: TenantId) -> bool:
        return len(self._under_way) < AT_ONCE_MAX and self._counts()[tenant] < TENANT_AT_ONCE_MAX

    async def _deliver(self, session: aiohttp.ClientSession, task: Task) -> None:
        try:
            problem, final = await self._send(session, task)
            await self._note(task, problem, final=final)
        except SnowdropError as error:
            log.warning("the webhook of %s is sent again: %s", task.id, error)
        finally:
            del self._under_way[task.id]
            self._queue.ring_hooks()

    async def _send(self, session: aiohttp.ClientSession, task: Task) -> tuple[str, bool]:
        """What went wrong, empty if nothing, and whether that is final."""
        hook = task.webhook
        if hook is None:
            return "it has none any more", True
        body = payload(task)
        headers = self._keys.headers(task.tenant, hook.event, body, now_unix_s=int(time.time()))
        headers |= {"content-type": "application/json", "user-agent": "snowdrop-webhook"}
        try:
            url = check_url(hook.url, private_allowed=self._queue.settings.webhook_private_allowed)
            async with session.post(url, data=body, headers=headers, allow_redirects=False) as answer:
                if 200 <= answer.status < 300:
                    return "", False
                # 410: the receiver wants no more of these (Standard Webhooks).
                return f"it answered {answer.status}", answer.status == 410
        except InvalidInputError as error:
            return str(error), True
        except TimeoutError:
            return f"no answer within {DELIVERY_S_MAX:g} s", False
        except (aiohttp.ClientError, OSError) as error:
            return str(error) or type(error).__name__, False

    async def _note(self, task: Task, problem: str, *, final: bool) -> None:
        sent = task.webhook

        def noted(stored: Task) -> Task:
            hook = stored.webhook
            if hook is None or sent is None or hook.event != sent.event:
                return stored  # it was tried again meanwhile, and will end anew
            now = time.time_ns()
            after = webhook_after(hook, problem=problem, final=final, now_unix_ns=now, draw=_spread.random())
            return msgspec.structs.replace(stored, webhook=after)

        stored = await self._queue.store.change(task.tenant, task.id, noted)
        if stored.webhook is not None:
            self._delivered(stored.webhook)


def payload(task: Task) -> bytes:
    """The event: its type, when it happened, and the task without its bodies and headers."""
    data: dict[str, Any] = {
        "id": task.id,
        "deployment": task.deployment,
        "state": task.state,
        "reason": task.reason,
        "attempts": task.attempts,
        "status": task.answer.status if task.answer is not None else None,
        "result_bytes": task.answer.body_bytes if task.answer is not None else 0,
        "error": task.error,
        "submitted_unix_ns": task.submitted_unix_ns,
        "ended_unix_ns": task.ended_unix_ns,
        "result_path": f"/v1/tasks/{task.id}/result",
    }
    ended = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(task.ended_unix_ns / 1e9))
    return msgspec.json.encode({"type": f"task.{task.state}", "timestamp": ended, "data": data})


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _private(host: str) -> InvalidInputError:
    return InvalidInputError(
        f"webhooks do not go to {host}, which is not a public address",
        where="webhook",
        next_step="set tasks.webhook_private_allowed if receivers stand in your own network",
    )

"""`GET` and `HEAD /{deployment}/readyz`: is it ready, and if asked, wake it. Looking wakes nothing."""

from __future__ import annotations

import time
from typing import Any

import anyio
import msgspec
from aiohttp import hdrs, web

from snowdrop.domain.errors import InvalidInputError, SnowdropError
from snowdrop.domain.ids import DeploymentName
from snowdrop.gateway.httpsink import error_response
from snowdrop.gateway.preferences import read_preferences
from snowdrop.gateway.relay import Relay, request_id_of
from snowdrop.policy.waiting import retry_after_s
from snowdrop.tenancy.keys import bearer, key_sha256
from snowdrop.wire.slots import Looked

POLL_S = 0.1
WAIT_S_MAX = 600.0
_TRUE, _FALSE = frozenset({"true", "1", "yes"}), frozenset({"false", "0", "no"})
_encode = msgspec.json.Encoder().encode


class Readiness:
    """The handler of one worker."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """200 if a replica takes requests, else 503. `?activate=true` wakes it, `Prefer: wait=N` waits for it."""
        request_id = request_id_of(request)
        deployment = DeploymentName(request.match_info["deployment"])
        broker = self._relay.carrier.broker
        extra: dict[str, str] | None = None
        try:
            secret = bearer(request.headers.get(hdrs.AUTHORIZATION))
            digest = key_sha256(secret) if secret is not None else None
            activate = _flag(request.query.get("activate", "false"))
            asked = read_preferences(request.headers)
            # A look first: a service that answers at this path itself is not woken by it.
            looked = await broker.look(digest, deployment, activate=False)
            if looked.own_readyz:
                return await self._relay.handle(request)
            if activate:
                looked = await broker.look(digest, deployment, activate=True)
            if asked.wait.wait_s_max is not None:
                extra = asked.applied
                until_s = time.monotonic() + min(asked.wait.wait_s_max, WAIT_S_MAX)
                while not looked.ready and looked.error is None and time.monotonic() < until_s:
                    await anyio.sleep(min(POLL_S, max(0.0, until_s - time.monotonic())))
                    looked = await broker.look(digest, deployment, activate=False)
        except SnowdropError as error:
            return error_response(error, request_id, extra)
        return _answer(deployment, looked, {"x-request-id": request_id, **(extra or {})})


def _answer(deployment: DeploymentName, looked: Looked, headers: dict[str, str]) -> web.Response:
    headers["cache-control"] = "no-store"
    body: dict[str, Any] = {
        "deployment": deployment,
        "revision": looked.revision,
        "ready": looked.ready > 0,
        "replicas": {"ready": looked.ready, "starting": looked.starting, "max": looked.replicas_max},
        "slots": looked.slots,
        "in_flight": looked.in_flight,
        "queued": looked.queued,
        "phase": looked.phase,
        "percent": looked.percent,
        "expected_s": None if looked.expected_s is None else round(looked.expected_s, 3),
    }
    if looked.error is not None:
        body["error"] = looked.error
    elif not looked.ready:
        if looked.starting or looked.queued or looked.woken:
            headers["retry-after"] = f"{retry_after_s(looked.expected_s):.0f}"
        else:
            # Nothing is under way, so no time at which to ask again would be true.
            body["phase"] = "asleep"
            body["next_step"] = f"send a request, or ask /{deployment}/readyz?activate=true"
    return web.Response(
        status=200 if looked.ready else 503, headers=headers, body=_encode(body), content_type="application/json"
    )


def _flag(given: str) -> bool:
    if given.lower() in _TRUE:
        return True
    if given.lower() in _FALSE:
        return False
    raise InvalidInputError(
        f"activate={given[:32]!r} is neither true nor false", where="query activate", next_step="?activate=true"
    )

"""The part of control's API that says why: `/v1/deployments/{name}/why`."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from aiohttp import web

from snowdrop.control import scaling
from snowdrop.control.deploying import unknown_deployment
from snowdrop.control.http import answer, key_of
from snowdrop.control.loop import ControlLoop
from snowdrop.control.world import DeploymentKey
from snowdrop.domain.errors import InvalidInputError, NotFoundError
from snowdrop.policy.autoscale.explain import alternatives
from snowdrop.wire.waits import WaitRecord
from snowdrop.wire.why import ReplicaWhy, Why, WhyRequest

HISTORY_MAX = 1_000
HISTORY_DEFAULT = 10
WAITS_SHOWN = 5
SINCE_S_MAX = 366 * 86_400.0
AskGateways = Callable[[DeploymentKey, str], Awaitable[list[WaitRecord]]]


class WhyApi:
    """Handlers. Nothing is computed anew but the alternatives: what is shown is what was decided."""

    def __init__(self, loop: ControlLoop, ask_gateways: AskGateways) -> None:
        self._loop = loop
        self._ask_gateways = ask_gateways
        self._store = loop.state.scaling

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/deployments/{name}/why", self._why),
            web.get("/v1/deployments/{name}/why/{request}", self._why_request),
        ]

    async def _why(self, request: web.Request) -> web.Response:
        key, now_unix_ns = key_of(request), time.time_ns()
        since_s = _since_s(request)
        since_unix_ns = now_unix_ns - int(since_s * 1e9) if since_s is not None else 0
        limit = HISTORY_DEFAULT if since_s is None else HISTORY_MAX
        history = await self._store.list_decisions(*key, since_unix_ns=since_unix_ns, limit=limit)
        waits = await self._store.get_waits(*key, request_id=None, limit=WAITS_SHOWN)
        entry = self._loop.world.deployments.get(key)  # asked after the reads: it may go meanwhile
        if entry is None:
            raise unknown_deployment(key[1])
        now = scaling.latest(entry, now_unix_ns=now_unix_ns)
        learned = entry.scaling.learned
        view = Why(
            deployment=key[1],
            scale=entry.scale,
            now=now,
            alternatives=alternatives(now.signals) if now is not None else (),
            short=scaling.short(entry),
            replicas=self._replicas(key),
            start_high_s=learned.start_high_s,
            starts_seen=len(learned.starts_s),
            idle=entry.scaling.idle,
            history=tuple(history),
            waits=tuple(waits),
        )
        return answer(view)

    async def _why_request(self, request: web.Request) -> web.Response:
        key, request_id = key_of(request), request.match_info["request"]
        kept = await self._store.get_waits(*key, request_id=request_id, limit=WAITS_SHOWN)
        waits = [*await self._ask_gateways(key, request_id), *kept]
        if not waits:
            if key not in self._loop.world.deployments:
                raise unknown_deployment(key[1])
            raise NotFoundError(
                f"nothing is kept of a request {request_id!r}",
                where=f"deployment {key[1]}",
                next_step="a request that hardly waited leaves no record;"
                f" `snowdrop why {key[1]}` shows the latest that did",
            )
        state = self._loop.state
        found = [await state.get_receipt(key[0], wait.receipt) for wait in waits if wait.receipt is not None]
        first_unix_ns = min(wait.arrived_unix_ns for wait in waits)
        last_unix_ns = max(wait.ended_unix_ns for wait in waits)
        decided = await self._store.list_decisions(*key, since_unix_ns=first_unix_ns, limit=HISTORY_MAX)
        view = WhyRequest(
            waits=tuple(waits),
            receipts=tuple(receipt for receipt in found if receipt is not None),
            decisions=tuple(record for record in decided if record.unix_ns <= last_unix_ns),
        )
        return answer(view)

    def _replicas(self, key: DeploymentKey) -> tuple[ReplicaWhy, ...]:
        world = self._loop.world
        return tuple(
            ReplicaWhy(
                id=name,
                revision=replica.revision,
                state=replica.state,
                reason=replica.report.reason if replica.report is not None else "ordered",
                in_flight=world.in_flight_at(key, name),
                draining=replica.draining,
            )
            for name, replica in world.replicas_of(key)
        )


def _since_s(request: web.Request) -> float | None:
    text = request.query.get("since_s")
    if text is None:
        return None
    try:
        since_s = float(text)
    except ValueError:
        since_s = -1.0
    if not 0 <= since_s <= SINCE_S_MAX:
        raise InvalidInputError(
            f"since_s {text!r} is no number of seconds", where="query since_s", next_step="0 to 31,622,400"
        )
    return since_s

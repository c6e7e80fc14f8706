"""Questions to all gateways whose answers are waited for, within a bound: does this request wait somewhere?"""

from __future__ import annotations

from collections.abc import Callable

import anyio
import msgspec

from snowdrop.control.world import DeploymentKey
from snowdrop.wire.codec import Message
from snowdrop.wire.control import AskWaits, WaitsTold
from snowdrop.wire.waits import WaitRecord

ANSWER_S_MAX = 1.0
"""A gateway that does not answer in time is not waited for."""


class _Asked(msgspec.Struct):
    """One question, and what was answered so far."""

    left: set[str]
    done: anyio.Event
    found: list[WaitRecord] = msgspec.field(default_factory=list)


class WaitQuestions:
    """`gateways` names those that are connected; `send` reaches all of them."""

    def __init__(self, gateways: Callable[[], set[str]], send: Callable[[Message], None]) -> None:
        self._gateways = gateways
        self._send = send
        self._asked: dict[int, _Asked] = {}
        self._next = 1

    async def ask(self, key: DeploymentKey, request_id: str) -> list[WaitRecord]:
        """How that request waits now, at whichever gateway it is; empty if it does not wait."""
        asked = _Asked(left=self._gateways(), done=anyio.Event())
        if not asked.left:
            return []
        ticket, self._next = self._next, self._next + 1
        self._asked[ticket] = asked
        try:
            self._send(AskWaits(ticket=ticket, tenant=key[0], deployment=key[1], request_id=request_id))
            with anyio.move_on_after(ANSWER_S_MAX):
                await asked.done.wait()
        finally:
            del self._asked[ticket]
        return asked.found

    def heard(self, gateway: str, told: WaitsTold) -> None:
        """An answer. One that comes late, or twice, changes nothing."""
        asked = self._asked.get(told.ticket)
        if asked is None or gateway not in asked.left:
            return
        asked.left.discard(gateway)
        asked.found += told.waits
        if not asked.left:
            asked.done.set()

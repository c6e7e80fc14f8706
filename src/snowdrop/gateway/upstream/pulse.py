"""Small pieces of an answer that come close behind each other go on together, once in PULSE_S.

Events and tokens are small, and each piece by itself costs a turn of the loop and a write, here and at the client.
The first piece after a pause goes on at once. Only what comes within PULSE_S of the one before is held, until the
next beat; then it is the better part of a millisecond late, and a stream that is slower than that never is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

PULSE_S = 0.001
HELD_BYTES_MAX = 8 << 10
"""With so much at hand a write is worth its cost, and nothing is held any more."""


class Pulse:
    """Lets go what is held by the connections of one event loop: one timer for all of them."""

    def __init__(self) -> None:
        self._holding: list[Callable[[], None]] = []

    def hold(self, let_go: Callable[[], None]) -> None:
        """Calls `let_go` at the next beat."""
        if not self._holding:
            asyncio.get_running_loop().call_later(PULSE_S, self._beat)
        self._holding.append(let_go)

    def _beat(self) -> None:
        holding, self._holding = self._holding, []
        for let_go in holding:
            let_go()

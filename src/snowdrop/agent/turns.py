"""Turns at the processors: of many replicas that start at once, a few begin at a time.

Making a sandbox and importing Python is work for a processor. Eight at once on two processors are all ready when
the last is; two at a time, the first serve while the others begin, and the last is no later. A turn ends with the
imports. It also ends by itself, since imports may as well wait for a disk.
"""

from __future__ import annotations

import math
import os
import time

import anyio

from snowdrop.domain.errors import InvalidInputError

TURN_S_MAX = 2.0
"""Longest time for which one that begins holds up the others."""
WAIT_S_MAX = 5.0
"""Who has waited for so long begins all the same: turns make starts sooner, they must not prevent one."""


class Turns:
    """`take` one, `give_back` the number that it returned; giving back twice is harmless."""

    def __init__(self, count: int = 0) -> None:
        """`count` turns at once; 0 means one for each processor that this process may use."""
        if count < 0:
            raise InvalidInputError("a number of turns cannot be negative", where=f"agent.launches_max={count}")
        self._count = count or len(os.sched_getaffinity(0))
        self._begun_s: dict[int, float] = {}
        self._numbers = 0
        self._door = anyio.Lock()
        self._given_back = anyio.Event()

    @property
    def held(self) -> int:
        """Turns that hold up others now."""
        now_s = time.monotonic()
        return sum(now_s < begun_s + TURN_S_MAX for begun_s in self._begun_s.values())

    async def take(self) -> int:
        """Waits, first come first served, until one is free, for at most WAIT_S_MAX."""
        with anyio.move_on_after(WAIT_S_MAX):
            async with self._door:
                while self.held >= self._count:
                    self._given_back = anyio.Event()
                    with anyio.move_on_after(self._next_end_s()):
                        await self._given_back.wait()
        self._numbers += 1
        self._begun_s[self._numbers] = time.monotonic()
        return self._numbers

    def give_back(self, number: int) -> None:
        """Lets the next one begin."""
        if self._begun_s.pop(number, None) is not None:
            self._given_back.set()

    def _next_end_s(self) -> float:
        now_s = time.monotonic()
        left_s = (begun_s + TURN_S_MAX - now_s for begun_s in self._begun_s.values())
        return min((s for s in left_s if s > 0), default=math.inf) if self._begun_s else 0.0

"""Writes what happened to the state store, in order, behind the loop: a slow disk does not slow a cold start.

A full disk keeps the record here and tries again. Beyond RECORDS_MAX the oldest are given up with a line in the
log: serving goes on.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable

import anyio

from snowdrop.domain.errors import SnowdropError
from snowdrop.domain.settings import ControlSettings
from snowdrop.state.port import StateStore

RECORDS_MAX = 50_000
RETRY_S = 1.0
TRIM_S = 600.0

Write = Callable[[], Awaitable[None]]
log = logging.getLogger("snowdrop.control")


class Recorder:
    """A bounded queue of writes and the task that does them."""

    def __init__(self) -> None:
        self._writes: deque[tuple[str, Write]] = deque()
        self._wake = anyio.Event()
        self._idle = anyio.Event()

    def add(self, what: str, write: Write) -> None:
        """Queues a write; `what` names it in the log if it fails."""
        if len(self._writes) >= RECORDS_MAX:
            lost, _ = self._writes.popleft()
            log.error("given up after too many waiting writes: %s", lost)
        self._writes.append((what, write))
        self._wake.set()

    async def run(self) -> None:
        while True:
            while self._writes:
                what, write = self._writes[0]
                try:
                    await write()
                except SnowdropError as error:
                    log.warning("cannot store %s: %s", what, error)
                    if error.retryable:
                        await anyio.sleep(RETRY_S)
                        continue
                if self._writes and self._writes[0][1] is write:
                    self._writes.popleft()
            self._idle.set()
            await self._wake.wait()
            self._wake = anyio.Event()

    async def keep_trimmed(self, state: StateStore, settings: ControlSettings) -> None:
        """Has old receipts and replicas dropped every TRIM_S, so that the state does not grow for ever."""

        async def trim() -> None:
            await state.trim(receipts_max=settings.receipts_kept_max, replicas_max=settings.replicas_kept_max)
            await state.scaling.trim(decisions_max=settings.decisions_kept_max, waits_max=settings.waits_kept_max)

        while True:
            self.add("trimming", trim)
            await anyio.sleep(TRIM_S)

    async def flush(self, flush_s_max: float) -> None:
        """Waits until everything is written, or the bound."""
        with anyio.move_on_after(flush_s_max):
            while self._writes:
                self._idle = anyio.Event()
                await self._idle.wait()

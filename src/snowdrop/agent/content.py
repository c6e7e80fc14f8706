"""Keeps the node's data plane running: starts it again when it dies, and renews the pins of living replicas.

Areas that replicas have mapped stay valid without the data plane; its pins do not, so they are asked for again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import anyio.abc

from snowdrop.agent.dataplane.client import DataPlane, start_process
from snowdrop.content.settings import DataPlaneSettings
from snowdrop.domain.errors import PlatformDownError

WAIT_S_MAX = 10.0
RESTART_S = 0.2
EXIT_S_MAX = 5.0

log = logging.getLogger("snowdrop.agent")


class DataPlaneKeeper:
    """`current` gives a living data plane; `run` keeps one alive for ever."""

    def __init__(
        self, settings: DataPlaneSettings, renew: Callable[[DataPlane], Coroutine[Any, Any, None]]
    ) -> None:
        self._settings = settings
        self._renew = renew
        self._plane: DataPlane | None = None
        self._there = anyio.Event()
        self.restarts = 0

    async def current(self) -> DataPlane:
        """Raises PlatformDownError if none is there within the bound."""
        with anyio.move_on_after(WAIT_S_MAX):
            while self._plane is None:
                await self._there.wait()
        if self._plane is None:
            raise PlatformDownError(
                "the node's data plane does not start",
                where="data plane",
                next_step="see the agent's log in the state folder",
            )
        return self._plane

    async def run(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        first = True
        while True:
            try:
                process, plane = await start_process(self._settings)
            except OSError as error:
                if first:
                    raise
                log.error("the data plane cannot be started: %s; trying again", error)
                await anyio.sleep(RESTART_S)
                continue
            async with process:
                try:
                    async with anyio.create_task_group() as tasks:
                        if not first:
                            self.restarts += 1
                            tasks.start_soon(self._renew, plane)
                        self._plane = plane
                        self._there.set()
                        if first:
                            task_status.started()
                        first = False
                        await plane.run()
                        tasks.cancel_scope.cancel()
                finally:
                    self._plane, self._there = None, anyio.Event()
                    await _end(process)
            await anyio.sleep(RESTART_S)


async def _end(process: anyio.abc.Process) -> None:
    with anyio.move_on_after(EXIT_S_MAX, shield=True):
        await process.wait()
        return
    process.kill()
    with anyio.move_on_after(EXIT_S_MAX, shield=True):
        await process.wait()

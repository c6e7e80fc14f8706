"""Control's tasks in this process: a loop with one deployment, the queue, its API on a unix socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from prometheus_client import CollectorRegistry

from platform_helpers import deployment, report, revision
from snowdrop.control.http import typed_errors
from snowdrop.control.loop import ControlLoop
from snowdrop.control.peers import Peers
from snowdrop.control.recorder import Recorder
from snowdrop.control.tasks.assembly import ControlTasks
from snowdrop.domain.ids import DEFAULT_TENANT
from snowdrop.domain.replica import ReplicaState
from snowdrop.domain.settings import GatewaySettings, Settings, TaskSettings
from snowdrop.state.memory import MemoryState
from snowdrop.state.port import StateStore
from snowdrop.wire.http import serving_unix

KEY = (DEFAULT_TENANT, deployment().name)


class Clock:
    """Both clocks of the queue, moved by hand."""

    def __init__(self) -> None:
        self.s = 1_000.0

    def __call__(self) -> float:
        return self.s

    def wall_ns(self) -> int:
        return int(self.s * 1e9)


class TaskWorld:
    """`clock` moves leases and due times; nothing runs by itself."""

    def __init__(self, folder: Path, state: StateStore | None = None, **settings: Any) -> None:
        self.folder = folder
        self.clock = Clock()
        self.state = state or MemoryState()
        keys_required = settings.pop("keys_required", False)
        made = Settings(tasks=TaskSettings(**settings), gateway=GatewaySettings(keys_required=keys_required))
        self.loop = ControlLoop(self.state, Recorder(), tick_s=1.0)
        self.peers = Peers(self.loop, settle_s_max=0.0)
        self.registry = CollectorRegistry()
        self.tasks = ControlTasks(
            self.loop,
            self.peers,
            made,
            self.registry,
            files=folder / "tasks",
            webhook_keys=folder / "webhooks",
        )
        self.queue = self.tasks.queue
        self.queue._clock = self.queue.leases._clock = self.clock
        self.queue._wall_ns = self.clock.wall_ns
        self.socket = folder / "control.sock"

    async def deployed(self, *, slots: int = 4) -> None:
        """A deployment `embed` with one ready replica of so many slots, or none."""
        if await self.state.get_revision(*KEY, revision().id) is None:
            await self.state.put_revision(revision())
            await self.state.put_deployment(deployment(), expected_generation=0)
        await self.loop.set_deployment(deployment())
        if slots:
            self.loop.heard_replica(report(state=ReplicaState.READY, concurrency=slots))

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[aiohttp.ClientSession]:
        """The API on `socket`, and a session to it."""
        await self.tasks.load()
        app = web.Application(middlewares=[typed_errors], client_max_size=16 << 20)
        app.add_routes(self.tasks.routes())
        async with (
            serving_unix(app, self.socket),
            aiohttp.ClientSession(
                "http://control", connector=aiohttp.UnixConnector(path=str(self.socket))
            ) as session,
        ):
            yield session

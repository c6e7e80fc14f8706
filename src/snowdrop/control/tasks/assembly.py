"""Puts the parts of control's tasks together."""

from __future__ import annotations

from pathlib import Path

import anyio
from aiohttp import web
from prometheus_client import CollectorRegistry

from snowdrop.control.loop import ControlLoop
from snowdrop.control.peers import Peers
from snowdrop.control.tasks.api import TasksApi
from snowdrop.control.tasks.files import TaskFiles
from snowdrop.control.tasks.metrics import TaskMetrics
from snowdrop.control.tasks.queue import TaskQueue
from snowdrop.control.tasks.webhooks import WebhookKeys, Webhooks
from snowdrop.domain.settings import Settings


class ControlTasks:
    """The queue with its API, webhooks and metrics. `load` before the API is served, `run` beside the loop."""

    def __init__(
        self,
        loop: ControlLoop,
        peers: Peers,
        settings: Settings,
        registry: CollectorRegistry,
        *,
        files: Path,
        webhook_keys: Path,
    ) -> None:
        self.queue = TaskQueue(loop, TaskFiles(files), settings.tasks)
        metrics = TaskMetrics(registry, self.queue, loop.world)
        self.queue.changed = metrics.changed
        keys = WebhookKeys(webhook_keys)
        self._webhooks = Webhooks(self.queue, keys, delivered=metrics.delivered)
        required = settings.gateway.keys_required
        self._api = TasksApi(self.queue, keys, lambda digest: peers.tenant_of(digest, required=required))
        loop.gateway_left = self.queue.leases.gateway_gone

    def routes(self) -> list[web.RouteDef]:
        return self._api.routes()

    async def load(self) -> None:
        await self.queue.load()

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.queue.run)
            tasks.start_soon(self._webhooks.run)

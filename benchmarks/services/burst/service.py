"""A service whose work and start are sleeps: what is measured is queue, scaling and starts, not processors."""

from __future__ import annotations

import asyncio
import time

import snowdrop as sd

START_S = 2.0
SERVICE_S = 0.2


@sd.service(
    concurrency=4,
    scale=sd.Scale(min=0, max=8, idle_s=1.0),
    queue=sd.QueueSpec(length_max=10_000, wait_s_max=120.0),
    resources=sd.ResourceSpec(memory_bytes_max=128 << 20, tmp_bytes_max=16 << 20),
)
class Burst:
    @sd.startup
    def load(self) -> None:
        time.sleep(START_S)

    @sd.endpoint("/work")
    async def work(self, number: int) -> dict[str, int]:
        await asyncio.sleep(SERVICE_S)
        return {"number": number}

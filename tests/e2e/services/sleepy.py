"""A service that takes seconds to start, and one request at a time."""

import asyncio
import time
from collections.abc import AsyncIterator

import snowdrop as sd

START_S = 3.0


@sd.service(
    concurrency=1,
    scale=sd.Scale(max=1, idle_s=1),
    queue=sd.QueueSpec(
        length_max=2, priority_max=1, order="fair", fair_by="caller", progress_first_s=0.2, progress_every_s=0.4
    ),
)
class Sleepy:
    @sd.startup
    def load(self) -> None:
        time.sleep(START_S)

    @sd.endpoint("/count")
    async def count(self, to: int) -> AsyncIterator[int]:
        for number in range(to):
            yield number

    @sd.endpoint("/work")
    async def work(self, seconds: float) -> dict[str, float]:
        await asyncio.sleep(seconds)
        return {"seconds": seconds}

"""A service that takes half a minute to start, with the platform's own times for telling who waits."""

import time
from collections.abc import AsyncIterator

import snowdrop as sd

START_S = 30.0


@sd.service(concurrency=1, scale=sd.Scale(max=1, idle_s=1))
class SlowStart:
    @sd.startup
    def load(self) -> None:
        time.sleep(START_S)

    @sd.endpoint("/count")
    async def count(self, to: int) -> AsyncIterator[int]:
        for number in range(to):
            yield number

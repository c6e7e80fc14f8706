"""Two revisions of one service: the second takes more at once, and longer to start."""

import asyncio
import time

import snowdrop as sd


@sd.service(concurrency=1, scale=sd.Scale(max=1, idle_s=30))
class Narrow:
    @sd.endpoint("/echo")
    async def echo(self, text: str) -> dict[str, str]:
        await asyncio.sleep(0.1)
        return {"text": text}


@sd.service(concurrency=8, scale=sd.Scale(max=1, idle_s=30))
class Wide:
    @sd.startup
    def load(self) -> None:
        time.sleep(1.5)

    @sd.endpoint("/echo")
    async def echo(self, text: str) -> dict[str, str]:
        await asyncio.sleep(0.1)
        return {"text": text}

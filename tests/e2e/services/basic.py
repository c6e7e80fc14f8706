"""Services without a model, quick to start."""

import asyncio
import os
import sys
import threading
import time
from collections.abc import AsyncIterator

import snowdrop as sd

REPLICA = f"{os.getpid()}-{time.time_ns()}"


@sd.service(
    concurrency=4, scale=sd.Scale(min=0, max=3, idle_s=2), resources=sd.ResourceSpec(memory_bytes_max=256 << 20)
)
class Echo:
    @sd.endpoint("/echo")
    async def echo(self, text: str) -> dict[str, str]:
        return {"text": text, "replica": REPLICA}

    @sd.endpoint("/work")
    async def work(self, number: int, work_s: float) -> dict[str, int | str]:
        """Counts how many run at once, so that the bound is asserted where it must hold."""
        state.enter()
        try:
            await asyncio.sleep(work_s)
        finally:
            state.leave()
        return {"number": number, "replica": REPLICA, "peak": state.peak}

    @sd.endpoint("/count")
    async def count(self, to: int, every_s: float) -> AsyncIterator[int]:
        for number in range(to):
            yield number
            await asyncio.sleep(every_s)

    @sd.endpoint("/until-cancelled")
    async def until_cancelled(self) -> AsyncIterator[str]:
        try:
            while True:
                yield "working"
                await asyncio.sleep(0.05)
        finally:
            print("work was cancelled", flush=True)

    @sd.endpoint("/fail")
    async def fail(self, message: str) -> None:
        raise ValueError(message)

    @sd.endpoint("/die")
    async def die(self) -> None:
        os._exit(7)

    @sd.endpoint("/die-midway")
    async def die_midway(self) -> AsyncIterator[int]:
        yield 1
        await asyncio.sleep(0.2)
        os._exit(7)

    @sd.endpoint("/die-midway-bytes")
    async def die_midway_bytes(self) -> AsyncIterator[bytes]:
        yield b"first"
        await asyncio.sleep(0.2)
        os._exit(7)

    @sd.endpoint("/eat")
    def eat(self, mebibytes: int) -> int:
        kept = [bytearray(1 << 20) for _ in range(mebibytes)]
        return len(kept)

    @sd.shutdown
    def close(self) -> None:
        print("shutdown ran", flush=True)


class _State:
    def __init__(self) -> None:
        self.running = 0
        self.peak = 0
        self._lock = threading.Lock()

    def enter(self) -> None:
        with self._lock:
            self.running += 1
            self.peak = max(self.peak, self.running)
            if self.running > 4:
                print(f"{self.running} at once", file=sys.stderr, flush=True)
                os._exit(3)

    def leave(self) -> None:
        with self._lock:
            self.running -= 1


state = _State()

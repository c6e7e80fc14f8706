"""Small work for tasks."""

import asyncio
import os

import snowdrop as sd

SMALL = sd.ResourceSpec(memory_bytes_max=256 << 20)
failures: dict[str, int] = {}


@sd.service(concurrency=16, scale=sd.Scale(max=2, idle_s=5), resources=SMALL)
class Tasked:
    @sd.endpoint("/square")
    async def square(self, number: int) -> int:
        await asyncio.sleep(0.3)
        return number * number

    @sd.endpoint("/slow")
    async def slow(self, seconds: float) -> str:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            print("slow was cancelled", flush=True)
            raise
        return "slept"

    @sd.endpoint("/fails-first")
    async def fails_first(self, name: str, times: int) -> int:
        """Fails so many times, then says how often it was asked."""
        failures[name] = failures.get(name, 0) + 1
        if failures[name] <= times:
            raise RuntimeError(f"failure {failures[name]}")
        return failures[name]

    @sd.endpoint("/die")
    async def die(self) -> None:
        os._exit(7)

    @sd.endpoint("/large")
    async def large(self, kibibytes: int, text: str = "") -> str:
        return "x" * (kibibytes << 10) + text

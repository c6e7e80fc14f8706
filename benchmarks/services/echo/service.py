"""The least that a service can do: what is measured with it is the platform in front."""

from __future__ import annotations

from collections.abc import AsyncIterator

import snowdrop as sd

EVENTS_MAX = 10_000


@sd.service(concurrency=256, scale=sd.Scale(min=1, max=1), queue=sd.QueueSpec(length_max=1_000))
class Echo:
    @sd.endpoint("/echo")
    async def echo(self, text: str) -> dict[str, str]:
        return {"text": text}

    @sd.endpoint("/events")
    async def events(self, count: int) -> AsyncIterator[dict[str, int]]:
        for number in range(min(count, EVENTS_MAX)):
            yield {"number": number}

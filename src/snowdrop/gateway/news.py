"""What a waiting call is told: the owner's latest word, said to the sink soon and then again and again."""

from __future__ import annotations

import time

import anyio
import msgspec

from snowdrop.gateway.call import CallerGoneError, Sink
from snowdrop.wire.slots import WaitNews


class NewsBox:
    """Between a broker, which puts news in, and one call's sink, which hears of them at the deployment's pace."""

    def __init__(self) -> None:
        self._latest: WaitNews | None = None
        self._came_s = 0.0
        self._first = anyio.Event()

    def put(self, news: WaitNews) -> None:
        self._latest = news
        self._came_s = time.monotonic()
        self._first.set()

    def now(self) -> WaitNews | None:
        """The latest word; what it expects has come nearer since."""
        if self._latest is None or self._latest.expected_s is None:
            return self._latest
        expected_s = max(0.0, self._latest.expected_s - (time.monotonic() - self._came_s))
        return msgspec.structs.replace(self._latest, expected_s=expected_s)

    async def tell(self, sink: Sink) -> None:
        """Tells the sink until cancelled, or until nobody listens (the call's own task learns that, too)."""
        await self._first.wait()
        news = self.now()
        if news is None or news.first_s is None:
            return
        await anyio.sleep(news.first_s)
        while (latest := self.now()) is not None:
            try:
                await sink.progress(latest)
            except CallerGoneError:
                return
            await anyio.sleep(latest.every_s)

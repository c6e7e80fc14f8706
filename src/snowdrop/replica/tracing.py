"""What a replica adds to a trace: one span for each sampled request, told to the agent, which sends it on."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

from snowdrop.domain.errors import SnowdropError
from snowdrop.domain.trace import CURRENT_TRACE, TraceContext, TraceSpan, begin_trace
from snowdrop.replica.servable import AsgiMessage, Receive, Scope, Send, Servable
from snowdrop.wire.codec import Message
from snowdrop.wire.replica import SPANS_MAX, SpansDone

if TYPE_CHECKING:
    from snowdrop.weights.loaded import LoadedModel

TELL_S = 0.5
"""How long spans are gathered before they are told."""
KEPT_MAX = 1_024
SERVER_ERROR = 500

_labels = Random()  # noqa: S311 -- seeded from the system's randomness; makes labels, not secrets


class SpanTeller:
    """Gathers spans and tells them from a thread of its own: an agent that is slow holds up no request."""

    def __init__(self, send: Callable[[Message], None], *, tell_s: float = TELL_S) -> None:
        self._send = send
        self._tell_s = tell_s
        self._spans: deque[TraceSpan] = deque()
        self._dropped = 0
        self._there_are = threading.Event()

    def start(self) -> None:
        # A daemon: the end of the process must not wait for spans.
        threading.Thread(target=self._run, name="span teller", daemon=True).start()

    def add(self, span: TraceSpan) -> None:
        if len(self._spans) >= KEPT_MAX:
            self._dropped += 1
            return
        self._spans.append(span)
        self._there_are.set()

    def tell(self) -> None:
        """Sends what has been gathered, a packet at a time."""
        while self._spans:
            count = min(SPANS_MAX, len(self._spans))
            dropped, self._dropped = self._dropped, 0
            self._send(SpansDone(spans=tuple(self._spans.popleft() for _ in range(count)), dropped=dropped))

    def _run(self) -> None:
        while True:  # no bound: it lives as long as the replica
            self._there_are.wait()
            time.sleep(self._tell_s)
            self._there_are.clear()
            self.tell()


class Traced:
    """A Servable whose requests continue their caller's trace. `sink` gets the span of each sampled one."""

    def __init__(self, inner: Servable, sink: Callable[[TraceSpan], None]) -> None:
        self._inner = inner
        self._sink = sink

    @property
    def has_websockets(self) -> bool:
        return self._inner.has_websockets

    async def live(self) -> int:
        return await self._inner.live()

    async def start(self, models: dict[str, LoadedModel]) -> None:
        await self._inner.start(models)

    def cut(self, error: SnowdropError) -> None:
        self._inner.cut(error)

    async def shutdown(self) -> None:
        await self._inner.shutdown()

    async def asgi(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = _context_of(scope)
        if context is None:
            await self._inner.asgi(scope, receive, send)
            return
        mark = CURRENT_TRACE.set(context)
        try:
            if context.sampled:
                await self._asgi_sampled(context, scope, receive, send)
            else:
                await self._inner.asgi(scope, receive, send)
        finally:
            CURRENT_TRACE.reset(mark)

    async def _asgi_sampled(self, context: TraceContext, scope: Scope, receive: Receive, send: Send) -> None:
        start_unix_ns, first_byte_unix_ns, status = time.time_ns(), 0, 0

        async def noting(message: AsgiMessage) -> None:
            nonlocal first_byte_unix_ns, status
            if message["type"] == "http.response.start":
                first_byte_unix_ns, status = time.time_ns(), message["status"]
            await send(message)

        try:
            await self._inner.asgi(scope, receive, noting)
        finally:
            attributes: dict[str, str | int | float | bool] = {"url.path": scope["path"]}
            if status:
                attributes["http.response.status_code"] = status
                attributes["snowdrop.first_byte_s"] = (first_byte_unix_ns - start_unix_ns) / 1e9
            self._sink(
                TraceSpan(
                    context=context,
                    name=f"{scope.get('method', scope['type'].upper())} {scope['path']}",
                    start_unix_ns=start_unix_ns,
                    end_unix_ns=time.time_ns(),
                    kind="server",
                    error=f"status {status}" if status >= SERVER_ERROR else "" if status else "no answer",
                    attributes=attributes,
                )
            )


def _context_of(scope: Scope) -> TraceContext | None:
    """The trace that a request continues; None for what is no request, or comes without one."""
    if scope["type"] not in {"http", "websocket"}:
        return None
    parent = state = None
    for name, value in scope["headers"]:
        if name == b"traceparent":
            parent = value.decode("latin-1")
        elif name == b"tracestate":
            state = value.decode("latin-1")
    return begin_trace(parent, state, sample_ratio=0.0, rng=_labels) if parent is not None else None

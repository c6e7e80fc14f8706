"""One record of each finished request, from which request lines, traces and metrics are made.

Whoever carries a request reports it once, at its end; listeners do the rest. They run in the path of requests, so
they only count and queue, and do no I/O of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from snowdrop.domain.receipt import Span
from snowdrop.domain.trace import TraceContext


class RequestDone(msgspec.Struct, frozen=True, kw_only=True):
    """A request from its arrival to its last byte. Times are unix nanoseconds; 0 is: never came so far.

    `kind` is the way it came in: http, openai, task, call, websocket. `status` is what the caller got, 499 if it
    went away first. `spans` are the phases of the cold start it waited for (`receipt`), on its own time line.
    """

    request_id: str
    trace: TraceContext
    deployment: str
    status: int
    arrived_unix_ns: int
    ended_unix_ns: int
    kind: str = "http"
    method: str = ""
    path: str = ""
    tenant: str = ""
    revision: str = ""
    replica: str = ""
    error_kind: str = ""
    granted_unix_ns: int = 0
    first_byte_unix_ns: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0
    receipt: str = ""
    spans: tuple[Span, ...] = ()

    @property
    def queued_s(self) -> float:
        """How long it waited for a slot; all its time if it never got one."""
        return ((self.granted_unix_ns or self.ended_unix_ns) - self.arrived_unix_ns) / 1e9

    @property
    def total_s(self) -> float:
        return (self.ended_unix_ns - self.arrived_unix_ns) / 1e9


Listener = Callable[[RequestDone], None]


class Observer:
    """Hands each record to its listeners, in the order in which they were added."""

    def __init__(self, *listeners: Listener) -> None:
        self.listeners = listeners

    def request_done(self, done: RequestDone) -> None:
        for listener in self.listeners:
            listener(done)

"""A replica's part of a trace: what it tells, at which rate, and what its own calls continue."""

from __future__ import annotations

from typing import Any

import pytest

from snowdrop.agent.traces import SPANS_BURST_MAX, SPANS_PER_S_MAX, ReplicaTraces
from snowdrop.domain.errors import SnowdropError
from snowdrop.domain.ids import DEFAULT_TENANT, DeploymentName, ReplicaId, RevisionId
from snowdrop.domain.replica import ReplicaKey
from snowdrop.domain.trace import CURRENT_TRACE, TraceContext, TraceSpan
from snowdrop.replica.servable import AsgiMessage, Receive, Scope, Send
from snowdrop.replica.tracing import KEPT_MAX, SpanTeller, Traced
from snowdrop.weights.loaded import LoadedModel
from snowdrop.wire.codec import Message
from snowdrop.wire.replica import SPANS_MAX, SpansDone

pytestmark = pytest.mark.anyio

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
KEY = ReplicaKey(
    tenant=DEFAULT_TENANT,
    deployment=DeploymentName("embed"),
    revision=RevisionId("rev-1"),
    replica=ReplicaId("rep-1"),
)


class _Service:
    """Answers with `status`, or raises if it has none; keeps the trace that its own calls would continue."""

    def __init__(self, status: int | None) -> None:
        self.status = status
        self.seen: TraceContext | None = None

    async def start(self, models: dict[str, LoadedModel]) -> None: ...
    def cut(self, error: SnowdropError) -> None: ...
    async def shutdown(self) -> None: ...
    async def asgi(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen = CURRENT_TRACE.get()
        if self.status is None:
            raise ConnectionError("gone")
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _call(service: _Service, traceparent: str | None) -> list[TraceSpan]:
    spans: list[TraceSpan] = []
    headers = [] if traceparent is None else [(b"traceparent", traceparent.encode())]
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/embed", "headers": headers}

    async def receive() -> AsgiMessage:
        return {"type": "http.disconnect"}

    async def send(_message: AsgiMessage) -> None:
        return

    await Traced(service, spans.append).asgi(scope, receive, send)
    return spans


async def test_a_sampled_request_leaves_a_span_below_its_callers() -> None:
    service = _Service(200)
    (span,) = await _call(service, f"00-{TRACE}-{PARENT}-01")
    assert (span.context.trace_id, span.context.parent_id, span.kind) == (TRACE, PARENT, "server")
    assert (span.name, span.attributes["http.response.status_code"], span.error) == ("POST /embed", 200, "")
    assert service.seen == span.context, "calls that the service makes lie below its own span"


async def test_a_request_that_is_not_sampled_leaves_none_but_its_trace_goes_on() -> None:
    service = _Service(200)
    assert await _call(service, f"00-{TRACE}-{PARENT}-00") == []
    assert service.seen is not None
    assert (service.seen.trace_id, service.seen.sampled) == (TRACE, False)


async def test_a_request_without_a_trace_has_none() -> None:
    service = _Service(200)
    assert await _call(service, None) == []
    assert service.seen is None
    assert CURRENT_TRACE.get() is None


async def test_a_failed_answer_is_a_failed_span() -> None:
    (span,) = await _call(_Service(503), f"00-{TRACE}-{PARENT}-01")
    assert span.error == "status 503"
    spans: list[TraceSpan] = []
    with pytest.raises(ConnectionError):
        spans += await _call(_Service(None), f"00-{TRACE}-{PARENT}-01")


def _span(number: int) -> TraceSpan:
    context = TraceContext(trace_id=TRACE, span_id=f"{number + 1:016x}", sampled=True)
    return TraceSpan(context=context, name="x" * 500, start_unix_ns=1, end_unix_ns=2)


def test_spans_are_told_in_packets_and_those_beyond_the_bound_are_counted() -> None:
    told: list[Message] = []
    teller = SpanTeller(told.append)
    for number in range(KEPT_MAX + 5):
        teller.add(_span(number))
    teller.tell()
    packets = [message for message in told if isinstance(message, SpansDone)]
    assert sum(len(packet.spans) for packet in packets) == KEPT_MAX
    assert max(len(packet.spans) for packet in packets) == SPANS_MAX
    assert sum(packet.dropped for packet in packets) == 5


class _Sent:
    def __init__(self) -> None:
        self.spans: list[tuple[str, TraceSpan]] = []

    def finished(self, spans: Any, *, service: str) -> None:
        self.spans += [(service, span) for span in spans]

    def close(self) -> None: ...


def test_the_agent_says_whose_spans_they_are_and_bounds_their_rate() -> None:
    now_s = 0.0
    sent = _Sent()
    traces = ReplicaTraces(sent, KEY, clock=lambda: now_s)
    packet = SpansDone(spans=tuple(_span(number) for number in range(SPANS_MAX)))
    for _ in range(100):
        traces.finished(packet)
    assert len(sent.spans) == SPANS_BURST_MAX
    service, span = sent.spans[0]
    assert (service, len(span.name)) == ("embed", 200)
    assert span.attributes["snowdrop.replica"] == "rep-1"
    now_s = 1.0
    for _ in range(100):
        traces.finished(packet)
    assert len(sent.spans) == SPANS_BURST_MAX + SPANS_PER_S_MAX

"""Traces: the spans of a request, and what a collector gets of them over the wire."""

from __future__ import annotations

from random import Random

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan

from collector import collecting
from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.receipt import Span
from snowdrop.domain.settings import TracingSettings
from snowdrop.domain.trace import begin_trace
from snowdrop.telemetry.observing import RequestDone
from snowdrop.telemetry.otlp import QUEUE_SPANS_MAX, SentTraces, http_exporter
from snowdrop.telemetry.tracing import NoTracing, open_tracing, request_traces, spans_of

SECOND = 1_000_000_000
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def _done(traceparent: str | None = PARENT, **fields: object) -> RequestDone:
    values: dict[str, object] = {
        "request_id": "req-1",
        "trace": begin_trace(traceparent, "vendor=1", sample_ratio=0.0, rng=Random(1)),
        "deployment": "embed",
        "path": "/embed",
        "method": "POST",
        "status": 200,
        "arrived_unix_ns": 10 * SECOND,
        "granted_unix_ns": 14 * SECOND,
        "first_byte_unix_ns": 15 * SECOND,
        "ended_unix_ns": 16 * SECOND,
        "replica": "rep-1",
        "receipt": "rcp-1",
        "spans": (
            Span(name="activate", start_unix_ns=10 * SECOND, end_unix_ns=11 * SECOND),
            Span(name="startup", start_unix_ns=11 * SECOND, end_unix_ns=14 * SECOND),
            Span(name="answer", start_unix_ns=14 * SECOND, end_unix_ns=15 * SECOND),
        ),
    }
    return RequestDone(**{**values, **fields})  # type: ignore[arg-type]


def test_a_collector_gets_the_request_its_wait_and_its_cold_start() -> None:
    with collecting() as collector:
        tracing = open_tracing(TracingSettings(otlp_endpoint=collector.endpoint))
        request_traces(tracing)(_done())
        tracing.close()
    assert len(collector.requests) == 1
    assert {service for service, _ in collector.spans()} == {"snowdrop-gateway"}
    spans: dict[str, ProtoSpan] = {span.name: span for _, span in collector.spans()}
    assert set(spans) == {"POST /embed", "queue", "cold start: activate", "cold start: startup", "replica"}
    server = spans["POST /embed"]
    assert server.trace_id.hex() == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert server.parent_span_id.hex() == "00f067aa0ba902b7"
    assert (server.kind, server.trace_state) == (ProtoSpan.SPAN_KIND_SERVER, "vendor=1")
    assert (server.start_time_unix_nano, server.end_time_unix_nano) == (10 * SECOND, 16 * SECOND)
    assert spans["queue"].parent_span_id == server.span_id
    assert spans["cold start: startup"].parent_span_id == spans["queue"].span_id
    assert spans["replica"].kind == ProtoSpan.SPAN_KIND_CLIENT


def test_what_is_not_sampled_is_not_sent() -> None:
    with collecting() as collector:
        tracing = open_tracing(TracingSettings(otlp_endpoint=collector.endpoint))
        request_traces(tracing)(_done(PARENT.removesuffix("01") + "00"))
        tracing.close()
    assert collector.requests == []


def test_a_refused_request_failed_in_the_queue() -> None:
    spans = {span.name: span for span in spans_of(_done(status=503, error_kind="queue_full", granted_unix_ns=0))}
    assert spans["POST /embed"].error == "queue_full"
    assert spans["queue"].error == "queue_full"
    assert "replica" not in spans


def test_a_collector_that_is_away_neither_fails_nor_holds_up_requests() -> None:
    with collecting() as collector:
        pass
    tracing = SentTraces(http_exporter(collector.endpoint, export_s_max=0.05))
    for _ in range(QUEUE_SPANS_MAX):
        request_traces(tracing)(_done())
    tracing.close()


def test_without_an_endpoint_nothing_is_loaded() -> None:
    assert isinstance(open_tracing(TracingSettings()), NoTracing)


def test_an_unusable_endpoint_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="no address of a collector"):
        open_tracing(TracingSettings(otlp_endpoint="collector:4317"))

"""Spans to a collector through OpenTelemetry's exporter and batching. Imported only where traces are on."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags, TraceState
from opentelemetry.trace.status import Status, StatusCode

from snowdrop.domain.trace import TraceContext, TraceSpan

QUEUE_SPANS_MAX = 8_192
BATCH_SPANS_MAX = 512
EXPORT_S = 2.0
EXPORT_S_MAX = 3.0
"""One batch with its retries; also what a collector that is away adds to stopping a process."""
SERVICES_MAX = 10_000
"""Resources kept, one a service; beyond it they are made anew each time."""
KINDS = {"server": SpanKind.SERVER, "client": SpanKind.CLIENT, "internal": SpanKind.INTERNAL}
SCOPE = InstrumentationScope("snowdrop")


def http_exporter(endpoint: str, *, export_s_max: float = EXPORT_S_MAX) -> SpanExporter:
    """OTLP over HTTP to the collector at `endpoint`, its base address; OTEL_EXPORTER_OTLP_* say the rest."""
    return OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces", timeout=export_s_max)


class SentTraces:
    """Implements `tracing.Tracing`: a bounded queue and a thread, both OpenTelemetry's own."""

    def __init__(self, exporter: SpanExporter) -> None:
        # A collector that is away is told of once a batch, as an error; its single attempts are not.
        logging.getLogger("opentelemetry").setLevel(logging.ERROR)
        self._batches = BatchSpanProcessor(
            exporter,
            max_queue_size=QUEUE_SPANS_MAX,
            max_export_batch_size=BATCH_SPANS_MAX,
            schedule_delay_millis=EXPORT_S * 1000,
        )
        self._resources: dict[str, Resource] = {}

    def finished(self, spans: Iterable[TraceSpan], *, service: str) -> None:
        for span in spans:
            if span.context.sampled:
                self._batches.on_end(self._convert(span, service))

    def close(self) -> None:
        self._batches.shutdown()  # type: ignore[no-untyped-call]

    def _convert(self, span: TraceSpan, service: str) -> ReadableSpan:
        context = span.context
        return ReadableSpan(
            span.name,
            context=_context(context, context.span_id, is_remote=False),
            parent=_context(context, context.parent_id, is_remote=True) if context.parent_id else None,
            resource=self._resource(service),
            attributes={name: value for name, value in span.attributes.items() if value != ""},
            kind=KINDS[span.kind],
            status=Status(StatusCode.ERROR, span.error) if span.error else Status(StatusCode.UNSET),
            start_time=span.start_unix_ns,
            end_time=max(span.start_unix_ns, span.end_unix_ns),
            instrumentation_scope=SCOPE,
        )

    def _resource(self, service: str) -> Resource:
        """A span belongs to whoever the time was spent in, so each service has a resource of its own."""
        resource = self._resources.get(service)
        if resource is None:
            resource = Resource.create({"service.name": service, "service.namespace": "snowdrop"})
            if len(self._resources) < SERVICES_MAX:
                self._resources[service] = resource
        return resource


def _context(context: TraceContext, span_id: str, *, is_remote: bool) -> SpanContext:
    return SpanContext(
        trace_id=int(context.trace_id, 16),
        span_id=int(span_id, 16),
        is_remote=is_remote,
        trace_flags=TraceFlags(TraceFlags.SAMPLED if context.sampled else TraceFlags.DEFAULT),
        trace_state=TraceState.from_header([context.state]) if context.state else TraceState(),
    )

"""Finished spans to a collector, by OTLP over HTTP; nothing at all where no collector is named.

Spans are made when their end is known, from times that were taken anyway, so a request that is not sampled costs
nothing. Sending is OpenTelemetry's own: a bounded queue and a thread; what the queue can't take is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import Protocol

from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.settings import TracingSettings
from snowdrop.domain.trace import TraceSpan, spans_within
from snowdrop.telemetry.observing import Listener, RequestDone

SERVER_ERROR = 500

_labels = Random()  # noqa: S311 -- seeded from the system's randomness; makes labels, not secrets


class Tracing(Protocol):
    """Where finished spans go. Calls return at once."""

    def finished(self, spans: Iterable[TraceSpan], *, service: str) -> None: ...
    def close(self) -> None:
        """Sends what is queued, within a bound."""
        ...


class NoTracing:
    """No collector is named."""

    def finished(self, spans: Iterable[TraceSpan], *, service: str) -> None:
        return

    def close(self) -> None:
        return


def open_tracing(settings: TracingSettings) -> Tracing:
    """What `settings` ask for. Raises InvalidInputError if it is not installed or the address is unusable.

    Headers for the collector (a token, for example) come from OTEL_EXPORTER_OTLP_HEADERS: they are secrets.
    """
    if not settings.otlp_endpoint:
        return NoTracing()
    if not settings.otlp_endpoint.startswith(("http://", "https://")):
        raise InvalidInputError(
            f"{settings.otlp_endpoint!r} is no address of a collector",
            where="tracing.otlp_endpoint",
            next_step="give its base address, for example http://localhost:4318",
        )
    try:
        # Heavy, and most platforms run without.
        from snowdrop.telemetry.otlp import SentTraces, http_exporter  # noqa: PLC0415
    except ImportError as error:
        raise InvalidInputError(
            f"traces can't be sent: {error}",
            where="tracing.otlp_endpoint",
            next_step="pip install 'snowdrop[tracing]'",
        ) from error
    return SentTraces(http_exporter(settings.otlp_endpoint))


def request_traces(tracing: Tracing) -> Listener:
    """A listener that makes the spans of each sampled request.

    The request is the server's span; below it lie `queue`, the phases of the cold start that it waited for, and
    `replica`, which is the parent of what the replica says of itself.
    """

    def listen(done: RequestDone) -> None:
        if done.trace.sampled:
            tracing.finished(spans_of(done), service="snowdrop-gateway")

    return listen


def spans_of(done: RequestDone) -> list[TraceSpan]:
    """The spans of one request. The one sent to the replica as its parent is the request's own."""
    error = done.error_kind or (f"status {done.status}" if done.status >= SERVER_ERROR else "")
    request = TraceSpan(
        context=done.trace,
        name=f"{done.method or done.kind} /{done.deployment}",
        start_unix_ns=done.arrived_unix_ns,
        end_unix_ns=done.ended_unix_ns,
        kind="server",
        error=error,
        attributes={
            "http.request.method": done.method,
            "http.response.status_code": done.status,
            "url.path": done.path,
            "snowdrop.request_id": done.request_id,
            "snowdrop.kind": done.kind,
            "snowdrop.tenant": done.tenant,
            "snowdrop.deployment": done.deployment,
            "snowdrop.revision": done.revision,
            "snowdrop.replica": done.replica,
            "snowdrop.receipt": done.receipt,
        },
    )
    queue = TraceSpan(
        context=done.trace.child(_labels),
        name="queue",
        start_unix_ns=done.arrived_unix_ns,
        end_unix_ns=done.granted_unix_ns or done.ended_unix_ns,
        error=error if not done.granted_unix_ns else "",
    )
    spans = [request, queue]
    phases = tuple(span for span in done.spans if span.name != "answer")
    spans += spans_within(queue.context, phases, "cold start: ", _labels)
    if done.granted_unix_ns:
        spans.append(
            TraceSpan(
                context=done.trace.child(_labels),
                name="replica",
                start_unix_ns=done.granted_unix_ns,
                end_unix_ns=done.ended_unix_ns,
                kind="client",
                error=error,
                attributes={"snowdrop.first_byte_s": _first_byte_s(done)},
            )
        )
    return spans


def _first_byte_s(done: RequestDone) -> float:
    return (done.first_byte_unix_ns - done.granted_unix_ns) / 1e9 if done.first_byte_unix_ns else -1.0

"""From a call that has ended to the one record of it: a pure translation, in the path of every request."""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random

from snowdrop.domain.errors import SnowdropError
from snowdrop.domain.receipt import CallerTimes, Span, join_caller
from snowdrop.domain.settings import Settings
from snowdrop.domain.trace import TraceContext, begin_trace
from snowdrop.gateway.call import Call
from snowdrop.telemetry.logs import request_lines
from snowdrop.telemetry.observing import Listener, Observer, RequestDone
from snowdrop.telemetry.tracing import Tracing, request_traces
from snowdrop.wire.slots import Granted

CALLER_GONE = 499
"""What a caller would have got that did not wait for it; the status is nginx's, and nobody sees it."""

_labels = Random()  # noqa: S311 -- seeded from the system's randomness; makes labels, not secrets


def begin_call_trace(call: Call, *, sample_ratio: float) -> TraceContext:
    """Continues the caller's trace, or begins one; the replica gets it in its headers. Once a call."""
    if call.trace is None:
        headers = call.headers
        call.trace = begin_trace(
            headers.get("traceparent"), headers.get("tracestate"), sample_ratio=sample_ratio, rng=_labels
        )
        headers["traceparent"] = call.trace.traceparent
        if call.trace.state:
            headers["tracestate"] = call.trace.state
        elif "tracestate" in headers:
            del headers["tracestate"]
    return call.trace


def observer_of(settings: Settings, tracing: Tracing, *more: Listener) -> Observer:
    """The listeners that `settings` ask for, and `more`."""
    listeners = list(more)
    if settings.logs.requests != "none":
        listeners.append(request_lines(settings.logs.requests))
    if settings.tracing.otlp_endpoint:
        listeners.append(request_traces(tracing))
    return Observer(*listeners)


def reported_to(observer: Observer, *, sample_ratio: float) -> Callable[[Call, SnowdropError | None], None]:
    """What a carrier calls at the end of each call."""

    def finished(call: Call, error: SnowdropError | None) -> None:
        observer.request_done(record_of(call, error, time.time_ns(), sample_ratio=sample_ratio))

    return finished


def record_of(call: Call, error: SnowdropError | None, ended_unix_ns: int, *, sample_ratio: float) -> RequestDone:
    """The record of a call that ended with `error`, or well, or without its caller."""
    granted = call.granted
    status = call.status
    if not status:
        status = error.http_status if error is not None else CALLER_GONE
    return RequestDone(
        request_id=call.request_id,
        trace=begin_call_trace(call, sample_ratio=sample_ratio),
        deployment=call.deployment,
        status=status,
        arrived_unix_ns=call.arrived_unix_ns,
        ended_unix_ns=ended_unix_ns,
        kind=call.kind,
        method=call.method,
        path=call.target.partition("?")[0],
        error_kind=error.kind if error is not None else "",
        first_byte_unix_ns=call.first_byte_unix_ns,
        received_bytes=call.body.received_bytes,
        sent_bytes=call.sent_bytes,
        tenant=(granted.tenant if granted is not None else call.caller.tenant) or "",
        revision=granted.revision if granted is not None else "",
        replica=granted.replica if granted is not None else "",
        granted_unix_ns=granted.granted_unix_ns if granted is not None else 0,
        receipt=(granted.receipt if granted is not None else None) or "",
        spans=_phases(call, granted) if granted is not None and granted.receipt is not None else (),
    )


def _phases(call: Call, granted: Granted) -> tuple[Span, ...]:
    """The phases of the start that a call waited for."""
    caller = CallerTimes(
        request_id=call.request_id,
        arrived_unix_ns=call.arrived_unix_ns,
        admitted_unix_ns=granted.granted_unix_ns,
        first_byte_unix_ns=call.first_byte_unix_ns or granted.granted_unix_ns,
    )
    return join_caller(
        granted.spans, caller, ordered_unix_ns=granted.ordered_unix_ns, ready_unix_ns=granted.ready_unix_ns
    )

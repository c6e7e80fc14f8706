"""What is recorded of a call: how it ended, where its time went, and under which trace."""

from __future__ import annotations

from typing import Any

import pytest
from multidict import CIMultiDict

from snowdrop.domain.errors import QueueFullError, ReplicaDiedError, SnowdropError
from snowdrop.domain.ids import DeploymentName, ReceiptId, ReplicaId, RevisionId, TenantId
from snowdrop.domain.receipt import Span
from snowdrop.domain.settings import LogSettings, Settings, TracingSettings
from snowdrop.gateway.call import Call, Caller, WholeBody
from snowdrop.gateway.finished import CALLER_GONE, begin_call_trace, observer_of, record_of, reported_to
from snowdrop.telemetry.observing import Observer, RequestDone
from snowdrop.telemetry.tracing import NoTracing
from snowdrop.wire.slots import Granted

SECOND = 1_000_000_000
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def call_of(headers: dict[str, str] | None = None, **fields: Any) -> Call:
    base: dict[str, Any] = {
        "deployment": DeploymentName("embed"),
        "method": "POST",
        "target": "/embed?secret=1",
        "headers": CIMultiDict(headers or {}),
        "body": WholeBody(b"abc"),
        "caller": Caller(),
        "request_id": "req-1",
        "arrived_unix_ns": 10 * SECOND,
    }
    return Call(**base | fields)


def granted(**fields: Any) -> Granted:
    base: dict[str, Any] = {
        "ticket": 1,
        "lease": 1,
        "replica": ReplicaId("rep-1"),
        "revision": RevisionId("rev-1"),
        "tenant": TenantId("acme"),
        "socket_path": "/r.sock",
        "request_s_max": 30.0,
        "granted_unix_ns": 14 * SECOND,
    }
    return Granted(**base | fields)


def record(call: Call, error: SnowdropError | None = None) -> RequestDone:
    return record_of(call, error, 20 * SECOND, sample_ratio=0.0)


def test_an_answered_call_is_recorded_with_who_answered_and_without_its_query() -> None:
    call = call_of(granted=granted(), status=201, first_byte_unix_ns=15 * SECOND, sent_bytes=7)
    done = record(call)
    assert (done.status, done.path, done.tenant, done.revision, done.replica) == (
        *(201, "/embed", "acme"),
        *("rev-1", "rep-1"),
    )
    assert (done.queued_s, done.total_s, done.received_bytes, done.sent_bytes) == (4.0, 10.0, 3, 7)
    assert (done.receipt, done.spans, done.error_kind) == ("", (), "")


@pytest.mark.parametrize(
    ("status", "error", "expected"),
    [
        (0, QueueFullError("full"), (429, "queue_full")),
        (0, None, (CALLER_GONE, "")),
        (200, ReplicaDiedError("died"), (200, "replica_died")),  # told inside an answer that had begun
    ],
)
def test_a_call_that_got_no_good_answer(
    status: int, error: SnowdropError | None, expected: tuple[int, str]
) -> None:
    done = record(call_of(status=status, caller=Caller(tenant=TenantId("acme"))), error)
    assert (done.status, done.error_kind) == expected
    assert done.tenant == "acme", "callers from inside are known without a grant"
    assert done.queued_s == done.total_s


def test_a_call_that_waited_for_a_start_has_its_phases() -> None:
    spans = (Span(name="startup", start_unix_ns=11 * SECOND, end_unix_ns=13 * SECOND),)
    call = call_of(
        granted=granted(
            receipt=ReceiptId("rcp-1"), spans=spans, ordered_unix_ns=11 * SECOND, ready_unix_ns=13 * SECOND
        ),
        status=200,
        first_byte_unix_ns=15 * SECOND,
    )
    done = record(call)
    assert done.receipt == "rcp-1"
    assert [span.name for span in done.spans] == ["activate", "startup", "route", "answer"]


def test_the_replica_gets_the_callers_trace_with_the_gateways_span_as_parent() -> None:
    call = call_of({"traceparent": PARENT, "tracestate": "a=1"})
    trace = begin_call_trace(call, sample_ratio=0.0)
    assert trace.trace_id == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert call.headers["traceparent"] == trace.traceparent != PARENT
    assert call.headers["tracestate"] == "a=1"
    assert begin_call_trace(call, sample_ratio=0.0) is trace, "a second attempt is the same call"
    assert record(call).trace is trace


def test_a_tracestate_without_a_trace_goes_no_further() -> None:
    call = call_of({"tracestate": "a=1"})
    begin_call_trace(call, sample_ratio=0.0)
    assert "tracestate" not in call.headers
    assert call.headers["traceparent"].endswith("-00")


def test_each_call_is_reported_once() -> None:
    seen: list[RequestDone] = []
    finished = reported_to(Observer(seen.append), sample_ratio=1.0)
    finished(call_of(granted=granted(), status=200), None)
    (done,) = seen
    assert done.trace.sampled
    assert done.ended_unix_ns > 20 * SECOND


@pytest.mark.parametrize(
    ("logs", "endpoint", "count"), [("none", "", 1), ("errors", "", 2), ("all", "http://collector:4318", 3)]
)
def test_only_what_is_asked_for_listens(logs: str, endpoint: str, count: int) -> None:
    settings = Settings(
        logs=LogSettings(requests=logs),  # type: ignore[arg-type]
        tracing=TracingSettings(otlp_endpoint=endpoint),
    )
    seen: list[RequestDone] = []
    observer = observer_of(settings, NoTracing(), seen.append)
    assert len(observer.listeners) == count

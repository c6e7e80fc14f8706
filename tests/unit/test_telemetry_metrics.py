"""Counts of requests and their exposition; sums over workers and processes."""

from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families

from snowdrop.domain.trace import TraceContext
from snowdrop.telemetry import requests as telemetry_requests
from snowdrop.telemetry.metrics import Part, exposition, merged, process_registry
from snowdrop.telemetry.observing import RequestDone
from snowdrop.telemetry.requests import RequestCounts
from snowdrop.wire.counts import RequestSeries

TRACE = TraceContext(trace_id="1" * 32, span_id="2" * 16)
SECOND = 1_000_000_000


def done(**fields: Any) -> RequestDone:
    base: dict[str, Any] = {
        "request_id": "req-1",
        "trace": TRACE,
        "tenant": "default",
        "deployment": "embed",
        "replica": "rep-1",
        "status": 200,
        "arrived_unix_ns": 10 * SECOND,
        "granted_unix_ns": 12 * SECOND,
        "first_byte_unix_ns": 13 * SECOND,
        "ended_unix_ns": 14 * SECOND,
        "received_bytes": 5,
        "sent_bytes": 7,
    }
    return RequestDone(**base | fields)


def samples(text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def shown(counts: RequestCounts) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(counts)
    return samples(exposition(registry))


def labels(**named: str) -> frozenset[tuple[str, str]]:
    return frozenset(named.items())


def test_a_request_is_counted_with_its_times_and_bytes() -> None:
    counts = RequestCounts()
    counts.request_done(done())
    counts.request_done(done(status=503, receipt="rcp-1"))
    found = shown(counts)
    ok = labels(tenant="default", deployment="embed", kind="http", status="2xx")
    failed = labels(tenant="default", deployment="embed", kind="http", status="5xx")
    owner = {"tenant": "default", "deployment": "embed"}
    assert found["snowdrop_requests_total", ok] == found["snowdrop_requests_total", failed] == 1
    assert found["snowdrop_cold_requests_total", failed] == 1
    assert found["snowdrop_request_received_bytes_total", ok] == 5
    assert found["snowdrop_request_sent_bytes_total", ok] == 7
    for name, seconds in (("queue", 2.0), ("first_byte", 3.0), ("duration", 4.0)):
        assert found[f"snowdrop_request_{name}_seconds_sum", labels(**owner)] == 2 * seconds
        assert found[f"snowdrop_request_{name}_seconds_count", labels(**owner)] == 2
    assert found["snowdrop_request_queue_seconds_bucket", labels(**owner, le="1.0")] == 0
    assert found["snowdrop_request_queue_seconds_bucket", labels(**owner, le="2.5")] == 2
    assert found["snowdrop_request_queue_seconds_bucket", labels(**owner, le="+Inf")] == 2


def test_what_workers_hand_over_is_the_sum_of_what_they_counted() -> None:
    owner, direct = RequestCounts(), RequestCounts()
    for _worker in range(3):
        worker = RequestCounts()
        for status in (200, 200, 404):
            worker.request_done(done(status=status))
            direct.request_done(done(status=status))
        owner.add(msgspec.msgpack.decode(msgspec.msgpack.encode(worker.taken()), type=tuple[RequestSeries, ...]))
        owner.add(worker.taken())  # nothing new
    assert shown(owner) == shown(direct)


def test_names_that_callers_invent_become_no_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry_requests, "SERIES_MAX", 5)
    counts = RequestCounts()
    for number in range(20):
        counts.request_done(done(deployment=f"x{number}", replica="", error_kind="not_found", status=404))
    assert len(counts.taken()) == 1
    for number in range(20):
        counts.request_done(done(deployment=f"y{number}"))
    assert len(counts.taken()) == 6


def test_a_clock_that_was_set_back_takes_nothing_from_a_sum() -> None:
    counts = RequestCounts()
    counts.request_done(done(ended_unix_ns=SECOND, granted_unix_ns=SECOND, first_byte_unix_ns=SECOND))
    found = shown(counts)
    assert found["snowdrop_request_duration_seconds_sum", labels(tenant="default", deployment="embed")] == 0


def test_processes_are_merged_with_a_label_each() -> None:
    texts = []
    for number in range(2):
        registry = process_registry()
        counter = Counter("snowdrop_things", "Things.", ["deployment"], registry=registry)
        counter.labels(deployment="a").inc(number + 1)
        texts.append(exposition(registry).decode())
    whole = merged([Part(labels={"process": f"p{number}"}, text=text) for number, text in enumerate(texts)])
    found = samples(whole)
    assert found["snowdrop_things_total", labels(process="p0", deployment="a")] == 1
    assert found["snowdrop_things_total", labels(process="p1", deployment="a")] == 2
    assert found["process_resident_memory_bytes", labels(process="p0")] > 0
    assert whole.decode().count("# TYPE snowdrop_things_total counter") == 1


def test_text_that_is_no_exposition_is_refused() -> None:
    with pytest.raises(ValueError, match=r".+"):
        merged([Part(labels={}, text="snowdrop_things{ 1")])

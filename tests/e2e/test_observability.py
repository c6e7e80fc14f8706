"""One request seen from outside: its trace at a collector, its line in the log."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from collector import Collector, collecting
from e2e_platform import Platform, session, short_folder, wait_until

pytestmark = pytest.mark.anyio

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SETTINGS = """
[logs]
format = "json"
requests = "all"
[tracing]
otlp_endpoint = "{endpoint}"
sample_ratio = 0.0
"""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as made:
        yield made


@pytest.fixture
def traced_platform(collector: Collector) -> Iterator[Platform]:
    with short_folder() as state:
        (state / "config.toml").write_text(SETTINGS.format(endpoint=collector.endpoint))
        with Platform(state) as platform:
            yield platform


async def test_a_cold_request_is_one_trace_from_its_caller_into_the_replica(
    traced_platform: Platform, collector: Collector
) -> None:
    platform = traced_platform
    platform.deploy("basic.py:Echo", "traced")
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "req-mine"}
    async with (
        session() as http,
        http.post(f"{platform.url}/traced/echo?q=private", json={"text": "x"}, headers=headers) as answer,
    ):
        assert answer.status == 200, await answer.text()
        receipt = answer.headers["snowdrop-receipt"]
    async with session() as http, http.post(f"{platform.url}/traced/echo", json={"text": "x"}) as answer:
        assert answer.status == 200

    def both_sides() -> bool:
        return {"snowdrop-gateway", "traced"} <= {service for service, _ in collector.spans()}

    wait_until(both_sides, "the gateway's and the replica's spans have come")
    spans = {(service, span.name): span for service, span in collector.spans()}
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}, "the second request is not sampled"
    request = spans["snowdrop-gateway", "POST /traced"]
    assert request.parent_span_id.hex() == PARENT
    assert spans["traced", "POST /echo"].parent_span_id == request.span_id
    phases = {name for _, name in spans if name.startswith("cold start: ")}
    assert {"cold start: mount", "cold start: start", "cold start: import", "cold start: startup"} <= phases

    lines = [json.loads(line) for line in (platform.state / "platform" / "gateway.log").read_text().splitlines()]
    line = next(line for line in lines if line.get("request_id") == "req-mine")
    assert (line["trace_id"], line["status"], line["deployment"], line["receipt"]) == (
        *(TRACE, 200, "traced", receipt),
    )
    assert line["queued_s"] > 0
    assert "private" not in json.dumps(line)
    control = (platform.state / "platform" / "control.log").read_text().splitlines()
    assert {json.loads(line)["process"] for line in control} == {"control"}

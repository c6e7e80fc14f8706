"""Process logs and request lines: what people read, and what machines do."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from random import Random

import pytest

from snowdrop.domain.settings import LogSettings
from snowdrop.domain.trace import begin_trace
from snowdrop.telemetry.logs import REQUESTS, configure_logs, request_lines
from snowdrop.telemetry.observing import Observer, RequestDone

SECOND = 1_000_000_000


@pytest.fixture(autouse=True)
def _root_logger_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def _done(status: int = 200, **fields: object) -> RequestDone:
    values: dict[str, object] = {
        "request_id": "req-1",
        "trace": begin_trace(None, None, sample_ratio=0.0, rng=Random(1)),
        "deployment": "embed",
        "path": "/embed",
        "method": "POST",
        "status": status,
        "arrived_unix_ns": 10 * SECOND,
        "granted_unix_ns": 12 * SECOND,
        "ended_unix_ns": 15 * SECOND,
    }
    return RequestDone(**{**values, **fields})  # type: ignore[arg-type]


def test_json_lines_are_one_object_with_time_level_and_process(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(LogSettings(format="json"), "control")
    logging.getLogger("snowdrop.control").warning("node %s is lost", "node-0", extra={"node": "node-0"})
    line = json.loads(capsys.readouterr().err)
    time = line.pop("time")
    assert time.endswith("+00:00")
    assert line == {
        "level": "WARNING",
        "logger": "snowdrop.control",
        "message": "node node-0 is lost",
        "process": "control",
        "node": "node-0",
    }


def test_a_traceback_stays_in_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(LogSettings(format="json"), "agent")
    try:
        raise ValueError("torn")
    except ValueError:
        logging.getLogger("snowdrop.agent").exception("failed")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "ValueError: torn" in json.loads(lines[0])["traceback"]


def test_the_level_holds(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(LogSettings(level="error"), "agent")
    logging.getLogger("snowdrop.agent").warning("not so bad")
    logging.getLogger("snowdrop.agent").error("bad")
    assert [line.split(" ERROR ")[1] for line in capsys.readouterr().err.splitlines()] == ["snowdrop.agent: bad"]


@pytest.mark.parametrize(
    ("which", "done", "is_logged"),
    [
        ("all", _done(), True),
        ("errors", _done(), False),
        ("errors", _done(502), True),
        ("errors", _done(404), False),  # the service's own answer
        ("errors", _done(429, error_kind="queue_full"), True),
    ],
)
def test_which_requests_get_a_line(
    which: str, done: RequestDone, is_logged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, REQUESTS)
    Observer(request_lines(which)).request_done(done)
    assert bool(caplog.records) == is_logged


def test_a_request_line_says_where_its_time_went(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, REQUESTS)
    Observer(request_lines("all")).request_done(_done(503, error_kind="queue_full", granted_unix_ns=0))
    (record,) = caplog.records
    assert record.getMessage() == (
        "POST embed/embed 503 in 5.000 s (5.000 s queued) request_id=req-1 error=queue_full"
    )
    assert record.__dict__["queued_s"] == 5.0
    assert len(record.__dict__["trace_id"]) == 32

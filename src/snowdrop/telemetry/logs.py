"""Logs of the platform's processes: lines for people, or one JSON object a line; and a line for a request."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime

from pythonjsonlogger.json import JsonFormatter

from snowdrop.domain.settings import LogSettings
from snowdrop.telemetry.observing import Listener, RequestDone

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
REQUESTS = "snowdrop.request"
ERROR_STATUS = 500

log = logging.getLogger(REQUESTS)


class JsonLines(JsonFormatter):
    """One object a line: time (RFC 3339, UTC), level, logger, process, message, and what a record has besides."""

    def __init__(self, process: str) -> None:
        super().__init__(
            "%(levelname)s %(name)s %(message)s",
            rename_fields={"levelname": "level", "name": "logger", "exc_info": "traceback"},
            static_fields={"process": process},
            json_ensure_ascii=False,
            timestamp=False,
        )

    def add_fields(
        self, log_data: dict[str, object], record: logging.LogRecord, message_dict: dict[str, object]
    ) -> None:
        log_data["time"] = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        super().add_fields(log_data, record, message_dict)


def configure_logs(settings: LogSettings, process: str) -> None:
    """Sets up the root logger of this process; it writes to standard error, which the supervisor keeps."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(process) if settings.format == "json" else logging.Formatter(TEXT_FORMAT))
    logging.basicConfig(level=LEVELS[settings.level], handlers=[handler], force=True)


def request_lines(which: str) -> Listener:
    """A listener that logs requests: `all`, or only `errors` (5xx, and 4xx of the platform's own making)."""

    def listen(done: RequestDone) -> None:
        failed = done.status >= ERROR_STATUS or bool(done.error_kind)
        if which == "all" or failed:
            log.log(logging.WARNING if failed else logging.INFO, *_line(done), extra=_fields(done))

    return listen


def _line(done: RequestDone) -> tuple[str, str, str, str, int, float, float, str, str]:
    return (
        "%s %s/%s %d in %.3f s (%.3f s queued) request_id=%s%s",
        done.method or done.kind,
        # A name that nobody serves is whatever its caller wrote: it must not make lines of its own.
        done.deployment if done.deployment.isprintable() else repr(done.deployment),
        done.path.lstrip("/"),
        done.status,
        done.total_s,
        done.queued_s,
        done.request_id,
        f" error={done.error_kind}" if done.error_kind else "",
    )


def _fields(done: RequestDone) -> dict[str, object]:
    """For those who read logs by machine; the path is without its query, which may hold what is private."""
    return {
        "request_id": done.request_id,
        "trace_id": done.trace.trace_id,
        "kind": done.kind,
        "tenant": done.tenant,
        "deployment": done.deployment,
        "revision": done.revision,
        "replica": done.replica,
        "status": done.status,
        "error_kind": done.error_kind,
        "queued_s": round(done.queued_s, 6),
        "total_s": round(done.total_s, 6),
        "received_bytes": done.received_bytes,
        "sent_bytes": done.sent_bytes,
        "receipt": done.receipt,
    }

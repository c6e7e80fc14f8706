"""What a request's headers say for the calls that are made for it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from snowdrop.domain.calling import DEADLINE_HEADER, LEASE_HEADER, CallContext
from snowdrop.domain.trace import CURRENT_TRACE


def context_of(headers: Mapping[str, str], request_id: str) -> CallContext:
    """By lower-case names. The trace goes on from this replica's part of it, where it has one."""
    trace = CURRENT_TRACE.get()
    return CallContext(
        request_id=request_id,
        traceparent=headers.get("traceparent", "") if trace is None else trace.traceparent,
        tracestate=headers.get("tracestate", ""),
        deadline_unix_s=_deadline(headers.get(DEADLINE_HEADER)),
        lease=headers.get(LEASE_HEADER, ""),
    )


def _deadline(header: str | None) -> float | None:
    """None for no deadline, or one that is no time: the gateway has checked what clients send."""
    if header is None:
        return None
    try:
        unix_s = float(header)
    except ValueError:
        return None
    return unix_s if math.isfinite(unix_s) else None

"""From what became of a call to what is reported of the attempt. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping

from snowdrop.domain.errors import SnowdropError
from snowdrop.gateway.call import Call
from snowdrop.policy.tasks import may_help
from snowdrop.wire.tasks import TaskEnd

# Of the service's answer: what a later replay can still mean.
KEPT_CHARS_MAX = 8_000
"""Headers of an answer that are kept, in all; those past it are dropped."""
NOT_KEPT = frozenset({"server-timing", "date", "set-cookie", "x-request-id"})
RETRIED_KINDS = frozenset({"replica_died", "timed_out", "unavailable", "platform_down"})
LASTING_KINDS = frozenset({"not_found", "unauthorised", "invalid_input", "too_large", "method_not_allowed"})
"""Before a replica has seen the call: these do not go away by waiting."""


def answered(call: Call, status: int, headers: Mapping[str, str]) -> TaskEnd:
    """The service answered, whatever it was."""
    return TaskEnd(
        started=True,
        status=status,
        headers=_kept(headers),
        retryable=may_help(status),
        retry_after_s=_retry_after(headers.get("retry-after")),
    )


def failed(call: Call, error: SnowdropError) -> TaskEnd:
    """No answer, or a broken one. A call that never got a slot did not reach the service."""
    started = call.granted is not None or error.kind in LASTING_KINDS
    return TaskEnd(
        started=started,
        error=error.body(),
        retryable=error.kind in RETRIED_KINDS,
        retry_after_s=error.retry_after_s,
    )


def _kept(headers: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    kept: list[tuple[str, str]] = []
    chars = 0
    for name, value in headers.items():
        chars += len(name) + len(value)
        if name.lower() not in NOT_KEPT and chars <= KEPT_CHARS_MAX:
            kept.append((name.lower(), value))
    return tuple(kept)


def _retry_after(text: str | None) -> float | None:
    """Seconds; the form with a date is passed over."""
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None

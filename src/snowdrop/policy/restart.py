"""Whether starting another replica of a revision is worth trying after the last ones failed.

After FAILURES_MAX failures in a row the revision is crash-looping: it starts nothing, so it costs nothing, but for
one try after each of a row of growing pauses. That one tells whether what was wrong (a host that was away, a
full disk) is over, without anybody having to act.
"""

from __future__ import annotations

import msgspec

BACKOFF_S_FIRST = 0.5
BACKOFF_S_MAX = 60.0
FAILURES_MAX = 4
"""So many starts in a row may fail; then the revision is crash-looping."""
PROBE_S_FIRST = 30.0
PROBE_S_MAX = 3_600.0
PROVEN_S = 30.0
"""A replica that was ready for so long and then dies does not count as a failed start."""


class StartHistory(msgspec.Struct, frozen=True, kw_only=True):
    """Failures of one revision since its last success. Times are monotonic seconds."""

    failures: int = 0
    failed_s: float = 0.0
    reason: str = ""


class MayStart(msgspec.Struct, frozen=True):
    """Go ahead."""


class BackOff(msgspec.Struct, frozen=True):
    """Not before `until_s`."""

    until_s: float


class CrashLooping(msgspec.Struct, frozen=True):
    """Nothing before `until_s`, then one single start; at once if somebody deploys or scales."""

    failures: int
    reason: str
    until_s: float


def verdict(history: StartHistory, now_s: float) -> MayStart | BackOff | CrashLooping:
    """Exponential back-off from 0.5 s; after FAILURES_MAX failures in a row, pauses from 30 s to an hour."""
    if history.failures == 0:
        return MayStart()
    if history.failures >= FAILURES_MAX:
        # Bounded before it is raised: a float has no room for 2**1024.
        doublings = min(history.failures - FAILURES_MAX, 16)
        pause_s = min(PROBE_S_FIRST * 2.0**doublings, PROBE_S_MAX)
        return CrashLooping(history.failures, history.reason, history.failed_s + pause_s)
    until_s = history.failed_s + min(BACKOFF_S_FIRST * 2.0 ** (history.failures - 1), BACKOFF_S_MAX)
    return MayStart() if now_s >= until_s else BackOff(until_s)


def starts_max(judged: MayStart | BackOff | CrashLooping, *, starting: int, now_s: float) -> int | None:
    """How many may be started now, None for any number. `starting` are on their way already."""
    if isinstance(judged, MayStart):
        return None
    if isinstance(judged, BackOff) or now_s < judged.until_s:
        return 0
    return 0 if starting else 1


def after_failure(history: StartHistory, *, reason: str, ready_s: float | None, now_s: float) -> StartHistory:
    """The history after one more replica failed; `ready_s` is how long it had been ready, if ever."""
    if ready_s is not None and ready_s >= PROVEN_S:
        return StartHistory()
    return StartHistory(failures=history.failures + 1, failed_s=now_s, reason=reason)


def after_proof(history: StartHistory) -> StartHistory:
    """The history after a replica has been ready for PROVEN_S: as if nothing had failed."""
    return StartHistory() if history.failures else history

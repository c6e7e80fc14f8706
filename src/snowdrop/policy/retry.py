"""Whether a failed read of the origin is worth another attempt, and after which pause."""

from __future__ import annotations

from typing import Literal

import msgspec

FailureKind = Literal["connect", "reset", "truncated", "stalled", "server", "throttled", "expired", "garbled"]
"""What went wrong, if trying again can help: no connection; closed in the middle; fewer bytes than announced; no
byte for too long; a 5xx; a request to slow down; a signature not taken any more; an answer that is not HTTP."""


class RetryLimits(msgspec.Struct, frozen=True, kw_only=True):
    """`attempts_max` counts failures in a row that brought no byte, `failures_max` all of one read."""

    attempts_max: int = 7
    failures_max: int = 100
    elapsed_s_max: float = 600.0
    pause_s_first: float = 0.1
    pause_s_max: float = 10.0
    retry_after_s_max: float = 30.0


class ReadHistory(msgspec.Struct, frozen=True, kw_only=True):
    """One read so far. `fruitless` are the failures since the last byte came. Times are monotonic seconds."""

    started_s: float
    failures: int = 0
    fruitless: int = 0


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """`retry_after_s` is what the server asked for, if it did."""

    kind: FailureKind
    moved_bytes: int = 0
    retry_after_s: float | None = None


class RetryAfter(msgspec.Struct, frozen=True, kw_only=True):
    """Try again after `pause_s`; `history` is that of the read from then on."""

    pause_s: float
    history: ReadHistory


class GiveUp(msgspec.Struct, frozen=True, kw_only=True):
    """`bound` is the limit that ran out, with its value; `reason` is for people."""

    bound: str
    reason: str


def after_failure(
    limits: RetryLimits, history: ReadHistory, failure: Failure, *, now_s: float, draw: float
) -> RetryAfter | GiveUp:
    """Exponential back-off with full jitter (`draw` from [0, 1)), from zero again whenever bytes had come.

    A server's Retry-After is the least pause, up to `retry_after_s_max`; above that nothing waits here.
    """
    fruitless = 1 if failure.moved_bytes > 0 else history.fruitless + 1
    failures = history.failures + 1
    if fruitless > limits.attempts_max:
        return GiveUp(bound=f"attempts_max={limits.attempts_max}", reason=f"{fruitless} attempts in a row failed")
    if failures > limits.failures_max:
        return GiveUp(bound=f"failures_max={limits.failures_max}", reason=f"failed {failures} times")
    pause_s = draw * min(limits.pause_s_first * 2.0 ** (fruitless - 1), limits.pause_s_max)
    if failure.retry_after_s is not None:
        if failure.retry_after_s > limits.retry_after_s_max:
            return GiveUp(
                bound=f"retry_after_s_max={limits.retry_after_s_max:g}",
                reason=f"it asks to come back after {failure.retry_after_s:g} s",
            )
        pause_s += max(failure.retry_after_s, 0.0)
    elapsed_s = now_s + pause_s - history.started_s
    if elapsed_s > limits.elapsed_s_max:
        return GiveUp(bound=f"elapsed_s_max={limits.elapsed_s_max:g}", reason="it took too long in all")
    return RetryAfter(
        pause_s=pause_s, history=msgspec.structs.replace(history, failures=failures, fruitless=fruitless)
    )

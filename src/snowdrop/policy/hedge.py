"""Whether a range that is slow is asked for a second time, on another connection."""

from __future__ import annotations

import msgspec

MIB = 1 << 20


class HedgeLimits(msgspec.Struct, frozen=True, kw_only=True):
    """A read is late when it takes `factor` times as long as nearly all recent ones, but not before `late_s_min`.

    While fewer than `samples_min` are known only a read without a byte for `unknown_s` is late. At most
    `share_max` of all requests are hedges, after the first `burst`.
    """

    factor: float = 3.0
    late_s_min: float = 0.15
    late_s_max: float = 10.0
    unknown_s: float = 2.0
    samples_min: int = 8
    share_max: float = 0.05
    burst: int = 4


class Recent(msgspec.Struct, frozen=True, kw_only=True):
    """The recent reads that no hedge helped: seconds for the first byte and per MiB after it, 95th percentiles."""

    samples: int = 0
    first_byte_s: float = 0.0
    per_mib_s: float = 0.0


class Spent(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that were made, hedges among them."""

    requests: int = 0
    hedges: int = 0


class ReadProgress(msgspec.Struct, frozen=True, kw_only=True):
    """One read. `moved_s` is when its last byte came (its start, if none has). Times are monotonic seconds."""

    started_s: float
    moved_s: float
    done_bytes: int
    total_bytes: int


class Hedge(msgspec.Struct, frozen=True):
    """Ask for the rest on a second connection now."""

    reason: str


class Wait(msgspec.Struct, frozen=True):
    """Look again at `until_s`."""

    until_s: float
    reason: str


def verdict(
    limits: HedgeLimits, recent: Recent, spent: Spent, read: ReadProgress, *, now_s: float
) -> Hedge | Wait:
    """A read is late in two ways: no byte for long, or far slower than its peers as a whole."""
    silent_s, whole_s = _bounds(limits, recent, read.total_bytes)
    due_s = min(read.moved_s + silent_s, read.started_s + whole_s)
    if now_s < due_s:
        return Wait(due_s, "in time")
    if spent.hedges >= limits.burst + limits.share_max * spent.requests:
        return Wait(now_s + limits.late_s_max, f"late, but hedges are {spent.hedges} of {spent.requests} requests")
    if now_s - read.moved_s >= silent_s:
        return Hedge(f"no byte for {now_s - read.moved_s:.2f} s (bound {silent_s:.2f} s)")
    return Hedge(f"{read.done_bytes} of {read.total_bytes} bytes after {now_s - read.started_s:.2f} s")


def _bounds(limits: HedgeLimits, recent: Recent, total_bytes: int) -> tuple[float, float]:
    """Seconds without a byte, and for all of a read, after which it is late."""
    if recent.samples < limits.samples_min:
        return limits.unknown_s, float("inf")
    silent_s = limits.factor * (recent.first_byte_s + recent.per_mib_s)
    whole_s = limits.factor * (recent.first_byte_s + recent.per_mib_s * total_bytes / MIB)
    return _within(limits, silent_s), max(_within(limits, silent_s), whole_s)


def _within(limits: HedgeLimits, seconds: float) -> float:
    return min(max(seconds, limits.late_s_min), limits.late_s_max)

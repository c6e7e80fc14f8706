"""Which landing directory is read again next, and how fast: bit rot is found before a reader finds it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

PASS_INTERVAL_S = 7 * 86_400.0
"""An artefact that was read through is left alone for so long."""

CLOSE_S = 1e-3
IDLE_WAIT_S_MAX = 600.0
BUSY_WAIT_S = 1.0
"""While a load is under way the scrubber reads nothing; it looks again after this time."""

BUSY_S_MAX = 300.0
"""A node that loads without end is scrubbed all the same: after so long one read is allowed."""


class ScrubCandidate(msgspec.Struct, frozen=True, kw_only=True):
    """`scrubbed_unix_s` is when its last pass ended, 0 if there was none."""

    name: str
    scrubbed_unix_s: float


class NextPass(msgspec.Struct, frozen=True, kw_only=True):
    """The artefact to read, or none for the next `wait_s`."""

    name: str | None
    wait_s: float
    reason: str


def next_pass(candidates: Sequence[ScrubCandidate], now_unix_s: float) -> NextPass:
    """The one whose last pass is longest ago, if that is PASS_INTERVAL_S."""
    if not candidates:
        return NextPass(name=None, wait_s=IDLE_WAIT_S_MAX, reason="nothing is on disk")
    oldest = min(candidates, key=lambda candidate: (candidate.scrubbed_unix_s, candidate.name))
    # A pass in the future is one before the clock was set back: its age is not known.
    age_s = now_unix_s - oldest.scrubbed_unix_s
    # Less than CLOSE_S before its time it is due: times this large are not exact to the microsecond.
    if 0 <= age_s < PASS_INTERVAL_S - CLOSE_S:
        wait_s = min(PASS_INTERVAL_S - age_s, IDLE_WAIT_S_MAX)
        return NextPass(name=None, wait_s=wait_s, reason=f"{oldest.name} was read {age_s:.0f} s ago")
    return NextPass(name=oldest.name, wait_s=0.0, reason="longest not read")


def pause_s(read_bytes: int, took_s: float, bytes_per_s: int, *, is_busy: bool, busy_s: float) -> float:
    """How long to wait after a read of `read_bytes` that took `took_s`.

    Over any stretch of reads the rate stays at or below `bytes_per_s`. `busy_s` is how long the node has been busy
    without a read.
    """
    spacing = max(0.0, read_bytes / bytes_per_s - took_s)
    return max(spacing, BUSY_WAIT_S) if is_busy and busy_s < BUSY_S_MAX else spacing

"""Which bounds hold now, by a scale's schedules. Pure: the time is given.

A schedule begins early by a start-up time, so that what it asks for is ready when its hour comes.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

import msgspec
from cronsim import CronSim

from snowdrop.domain.scale import Scale, ScaleBounds, Schedule
from snowdrop.policy.autoscale import Bounds

LOOK_S_MAX = 3_600.0
"""Bounds are worked out anew at least so often."""


class Bounded(msgspec.Struct, frozen=True, kw_only=True):
    """The bounds, and until when nothing changes them (unix seconds; None: for ever)."""

    bounds: Bounds
    until_unix_s: float | None


def bounds_at(
    scale: Scale, now_unix_s: float, *, lead_s: float = 0.0, revision: ScaleBounds | None = None
) -> Bounded:
    """The bounds of `scale` at a time. `lead_s` is how much earlier a schedule begins; `revision` narrows them."""
    active: list[Schedule] = []
    changes = [now_unix_s + LOOK_S_MAX]
    for schedule in scale.schedules:
        is_active, until_s = _window(schedule, now_unix_s, max(0.0, lead_s))
        if is_active:
            active.append(schedule)
        if until_s is not None:
            changes.append(until_s)
    low = max((s.min for s in active if s.min is not None), default=scale.min)
    high = max((s.max for s in active if s.max is not None), default=max(scale.max, low))
    buffer = max((s.buffer for s in active if s.buffer is not None), default=scale.buffer)
    source = ", ".join(f"schedule {s.cron!r} {s.timezone}" for s in active)
    if revision is not None:
        high = high if revision.max is None else min(high, revision.max)
        low = low if revision.min is None else max(low, revision.min)
        source = ", ".join(part for part in (source, "bounds of the revision") if part)
    bounds = Bounds(min=min(low, high), max=high, buffer=buffer, source=source)
    return Bounded(bounds=bounds, until_unix_s=min(changes) if scale.schedules else None)


def _window(schedule: Schedule, now_unix_s: float, lead_s: float) -> tuple[bool, float | None]:
    """Whether a schedule holds (from `lead_s` before a moment of it), and when that changes next."""
    latest_s = _moment(schedule.cron, schedule.timezone, int((now_unix_s + lead_s) // 60), reverse=True)
    if latest_s is not None and now_unix_s < latest_s + schedule.duration_s:
        return True, latest_s + schedule.duration_s
    next_s = _moment(schedule.cron, schedule.timezone, int((now_unix_s + lead_s) // 60), reverse=False)
    return False, None if next_s is None else next_s - lead_s


@lru_cache(maxsize=256)
def _moment(cron: str, timezone: str, minute: int, *, reverse: bool) -> float | None:
    """The last moment up to the end of a minute since the epoch, or the first one after it.

    Moments are whole minutes, so that a minute has one answer; the same question is asked at every look.
    """
    start = datetime.fromtimestamp(minute * 60, UTC)
    if reverse:
        start += timedelta(minutes=1)
    try:
        return next(CronSim(cron, start.astimezone(ZoneInfo(timezone)), reverse=reverse)).timestamp()
    except StopIteration:
        return None

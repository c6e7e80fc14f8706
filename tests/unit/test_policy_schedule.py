"""Bounds by schedules: days, time zones, changes of the clock, leads, several at once."""

from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.scale import Scale, ScaleBounds, Schedule
from snowdrop.policy.schedule import bounds_at

BERLIN = ZoneInfo("Europe/Berlin")
WORK = Schedule(cron="0 8 * * mon-fri", duration_s=10 * 3600, timezone="Europe/Berlin", min=2, buffer=1)
SCALE = Scale(max=4, schedules=(WORK,))


def unix_s(year: int, month: int, day: int, hour: int, minute: int = 0) -> float:
    return datetime(year, month, day, hour, minute, tzinfo=BERLIN).timestamp()


def low(scale: Scale, now_s: float, **more: float) -> int:
    return bounds_at(scale, now_s, **more).bounds.min


def test_it_holds_from_its_moment_for_its_time_in_its_zone() -> None:
    assert low(SCALE, unix_s(2026, 11, 24, 7, 59)) == 0
    assert low(SCALE, unix_s(2026, 11, 24, 8)) == 2
    assert low(SCALE, unix_s(2026, 11, 24, 17, 59)) == 2
    assert low(SCALE, unix_s(2026, 11, 24, 18)) == 0
    assert low(SCALE, unix_s(2026, 11, 28, 12)) == 0, "a Saturday"
    bounds = bounds_at(SCALE, unix_s(2026, 11, 24, 12)).bounds
    assert (bounds.min, bounds.max, bounds.buffer) == (2, 4, 1)
    assert "0 8 * * mon-fri" in bounds.source


def test_it_says_when_it_changes_next() -> None:
    in_the_middle = bounds_at(SCALE, unix_s(2026, 11, 24, 17, 30))
    assert in_the_middle.until_unix_s == unix_s(2026, 11, 24, 18)
    before = bounds_at(SCALE, unix_s(2026, 11, 24, 7, 30))
    assert before.until_unix_s == unix_s(2026, 11, 24, 8)
    assert bounds_at(Scale(), 0.0).until_unix_s is None


def test_it_begins_early_by_the_start_up_time_and_ends_in_its_own() -> None:
    assert low(SCALE, unix_s(2026, 11, 24, 7, 58), lead_s=60.0) == 0
    assert low(SCALE, unix_s(2026, 11, 24, 7, 59), lead_s=60.0) == 2
    assert low(SCALE, unix_s(2026, 11, 24, 17, 59) + 30, lead_s=60.0) == 2
    assert low(SCALE, unix_s(2026, 11, 24, 18), lead_s=60.0) == 0


def test_the_clock_may_go_forward_and_back() -> None:
    nightly = Scale(
        max=4, schedules=(Schedule(cron="30 2 * * *", duration_s=1800, timezone="Europe/Berlin", min=1),)
    )
    # 2026-03-29: there is no half past two. 2026-10-25: there are two.
    spring = [low(nightly, unix_s(2026, 3, 29, 0) + 600 * n) for n in range(36)]
    autumn = [low(nightly, unix_s(2026, 10, 25, 0) + 600 * n) for n in range(36)]
    assert sum(spring) == 3, "half an hour, once"
    assert sum(autumn) == 3


def test_of_several_the_largest_bounds_count() -> None:
    more = Schedule(cron="0 12 * * *", duration_s=3600, timezone="Europe/Berlin", min=1, max=9)
    both = Scale(max=4, schedules=(WORK, more))
    bounds = bounds_at(both, unix_s(2026, 11, 24, 12, 30)).bounds
    assert (bounds.min, bounds.max) == (2, 9)
    assert bounds_at(both, unix_s(2026, 11, 28, 12, 30)).bounds.min == 1


def test_windows_that_overlap_themselves_are_one() -> None:
    always = Scale(max=4, schedules=(Schedule(cron="* * * * *", duration_s=86_400, min=3),))
    assert low(always, 1_000_000.0) == 3


def test_a_minimum_above_the_maximum_lifts_it() -> None:
    lifted = Scale(max=1, schedules=(Schedule(cron="* * * * *", duration_s=60, min=3),))
    bounds = bounds_at(lifted, 1_000_000.0).bounds
    assert (bounds.min, bounds.max) == (3, 3)


def test_a_revision_narrows_the_bounds() -> None:
    bounds = bounds_at(Scale(min=2, max=8), 0.0, revision=ScaleBounds(max=1)).bounds
    assert (bounds.min, bounds.max) == (1, 1)
    assert "revision" in bounds.source
    assert bounds_at(Scale(max=8), 0.0, revision=ScaleBounds(min=2)).bounds.min == 2


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"cron": "0 8 * *", "min": 1}, "five fields"),
        ({"cron": "0 25 * * *", "min": 1}, "five fields"),
        ({"cron": "0 0 30 2 *", "min": 1}, "five fields"),
        ({"cron": "0 8 * * *", "min": 1, "timezone": "Mars/Base"}, "Europe/Berlin"),
        ({"cron": "0 8 * * *"}, "must be given"),
        ({"cron": "0 8 * * *", "min": 3, "max": 2}, "min <= max"),
        ({"cron": "0 8 * * *", "min": 1, "duration_s": 0}, "duration_s"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_what_is_allowed(fields: dict, names: str) -> None:
    with pytest.raises(InvalidInputError) as refused:
        Schedule(**{"duration_s": 60, **fields})
    assert names in f"{refused.value.next_step} {refused.value.where}"

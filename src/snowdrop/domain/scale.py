"""How far and how fast a deployment scales, as users say it."""

from datetime import UTC, datetime
from typing import Literal

import msgspec

from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.require import require

REPLICAS_MAX = 1_000
SCHEDULES_MAX = 32
SCHEDULE_S_MAX = 7 * 86_400.0
IDLE_S_MAX = 31_536_000.0


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """Other bounds for `duration_s` after each moment that `cron` names, in the time zone `timezone`.

    `cron` has five fields (minute, hour, day of month, month, day of week), read as Debian's cron reads them.
    What is None stays as the Scale has it. Where several schedules hold at once, the largest of each bound counts.
    """

    cron: str
    duration_s: float
    timezone: str = "UTC"
    min: int | None = None
    max: int | None = None
    buffer: int | None = None

    def __post_init__(self) -> None:
        where = f"scale.schedules ({self.cron!r})"
        require(0 < self.duration_s <= SCHEDULE_S_MAX, where, "duration_s more than 0, at most 604,800 s (a week)")
        for name, value in (("min", self.min), ("max", self.max), ("buffer", self.buffer)):
            require(value is None or 0 <= value <= REPLICAS_MAX, f"{where}.{name}", f"0 to {REPLICAS_MAX}")
        require(self.max is None or self.max >= 1, f"{where}.max", "at least 1")
        require((self.min, self.max, self.buffer) != (None, None, None), where, "min, max or buffer must be given")
        if self.min is not None and self.max is not None:
            require(self.min <= self.max, f"{where}.min", f"min <= max, got min={self.min} max={self.max}")
        _check_cron(self.cron, self.timezone, where)


class ScaleBounds(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one revision of a deployment, within those of the deployment. None: no bound of its own."""

    min: int | None = None
    max: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("min", self.min), ("max", self.max)):
            require(value is None or 0 <= value <= REPLICAS_MAX, f"revision {name}", f"0 to {REPLICAS_MAX}")
        if self.min is not None and self.max is not None:
            require(self.min <= self.max, "revision min", f"min <= max, got min={self.min} max={self.max}")


class Scale(msgspec.Struct, frozen=True, kw_only=True):
    """How far and how fast a deployment scales. Times in seconds, counts in replicas.

    `target` is the concurrency that scaling aims at per replica, as a fraction of the service's `concurrency`
    (the hard limit). `buffer` replicas stand by beyond what the load needs, for as long as the deployment is in
    use. `idle_s` is how long without any request before the last replica goes; with `idle="auto"` the time is
    chosen from the gaps between requests, and `wait_price` says what waiting is worth: so many seconds of a
    running replica for one second less of a caller's wait.
    """

    min: int = 0
    max: int = 1
    buffer: int = 0
    idle_s: float = 60.0
    idle: Literal["fixed", "auto"] = "fixed"
    wait_price: float = 10.0
    target: float = 0.7
    stable_window_s: float = 60.0
    panic_window_s: float = 6.0
    schedules: tuple[Schedule, ...] = ()

    def __post_init__(self) -> None:
        require(0 <= self.min <= self.max, "scale.min", f"0 <= min <= max, got min={self.min} max={self.max}")
        require(1 <= self.max <= REPLICAS_MAX, "scale.max", f"1 <= max <= {REPLICAS_MAX}, got {self.max}")
        require(0 <= self.buffer <= REPLICAS_MAX, "scale.buffer", f"0 to {REPLICAS_MAX}, got {self.buffer}")
        require(0 <= self.idle_s <= IDLE_S_MAX, "scale.idle_s", f"0 to {IDLE_S_MAX:,.0f}, got {self.idle_s}")
        require(self.idle in {"fixed", "auto"}, "scale.idle", f'"fixed" or "auto", got {self.idle!r}')
        require(0 < self.wait_price <= 1e6, "scale.wait_price", f"more than 0, at most 1e6, got {self.wait_price}")
        require(0 < self.target <= 1, "scale.target", f"0 < target <= 1, got {self.target}")
        require(
            0 < self.panic_window_s <= self.stable_window_s <= 3600,
            "scale.panic_window_s",
            "0 < panic_window_s <= stable_window_s <= 3600",
        )
        require(len(self.schedules) <= SCHEDULES_MAX, "scale.schedules", f"at most {SCHEDULES_MAX}")


def _check_cron(cron: str, timezone: str, where: str) -> None:
    # Imported here: user code imports this module, and few services have a schedule.
    from zoneinfo import ZoneInfo, ZoneInfoNotFoundError  # noqa: PLC0415

    from cronsim import CronSim, CronSimError  # noqa: PLC0415

    try:
        next(CronSim(cron, datetime(2025, 1, 1, tzinfo=UTC)))
    except CronSimError as error:
        raise InvalidInputError(
            f"{cron!r} is no cron expression: {error}",
            where=where,
            next_step='five fields, as in cron="0 8 * * mon-fri" (minute, hour, day, month, day of week)',
        ) from error
    except StopIteration:
        raise InvalidInputError(
            f"{cron!r} names no moment in the next 50 years", where=where, next_step="check day and month"
        ) from None
    try:
        ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise InvalidInputError(
            f"there is no time zone {timezone!r}", where=where, next_step='use a name as "Europe/Berlin" or "UTC"'
        ) from error

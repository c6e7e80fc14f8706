"""Averages of load over a long and a short window, in a bounded number of buckets. Pure.

What is averaged is concurrency: requests that hold a slot. Before the first look there was no load, except where
replicas are found without a history (control was restarted): then only what has been seen is averaged.
"""

from __future__ import annotations

import math

import msgspec

from snowdrop.domain.scale import Scale

BUCKETS_MAX = 4_000


class Bucket(msgspec.Struct, frozen=True, array_like=True):
    """A short stretch: its load (request-seconds), how many seconds it covers, how many requests arrived in it."""

    index: int
    integral: float
    covered_s: float
    arrived: int = 0


class Windows(msgspec.Struct, frozen=True, kw_only=True):
    """`found` is set if what was before the first look is not known. Buckets are `width_s` wide."""

    buckets: tuple[Bucket, ...] = ()
    width_s: float = 0.0
    sampled_s: float | None = None
    level: float = 0.0
    found: bool = False


def sample(windows: Windows, *, level: float, peak: float, arrived: int, now_s: float, scale: Scale) -> Windows:
    """Adds the stretch since the last look, at the load that held through it, or its `peak` if that was higher."""
    width = bucket_s(scale)
    if windows.sampled_s is None:
        made = Windows(width_s=width, sampled_s=now_s, level=level, found=windows.found)
        return made if arrived == 0 else _note_arrivals(made, arrived, now_s, scale)
    if windows.width_s != width:
        # A new revision has other windows: buckets of another width cannot be counted with these.
        windows = Windows(width_s=width, sampled_s=windows.sampled_s, level=windows.level, found=True)
    buckets = list(windows.buckets)
    sampled_s = windows.sampled_s if windows.sampled_s is not None else now_s
    start = max(sampled_s, now_s - scale.stable_window_s)
    # The load during the stretch lies between its start and its peak; a burst inside it must not be averaged away.
    held = max(windows.level, peak)
    while start < now_s:
        index = math.floor(start / width)
        end = min(now_s, (index + 1) * width)
        if end <= start:  # a float step too small to move on: the rest belongs to the next bucket
            index, end = index + 1, min(now_s, (index + 2) * width)
        _add(buckets, index, held * (end - start), end - start)
        start = end
    oldest = math.floor((now_s - scale.stable_window_s) / width)
    kept = tuple(bucket for bucket in buckets if bucket.index >= oldest)[-BUCKETS_MAX:]
    made = msgspec.structs.replace(windows, buckets=kept, sampled_s=now_s, level=level)
    return made if arrived == 0 else _note_arrivals(made, arrived, now_s, scale)


def average(windows: Windows, now_s: float, window_s: float, scale: Scale) -> float:
    """Mean concurrency over the window."""
    oldest = math.floor((now_s - window_s) / bucket_s(scale))
    taken = [bucket for bucket in windows.buckets if bucket.index >= oldest]
    covered_s = sum(bucket.covered_s for bucket in taken)
    if covered_s <= 0:
        return windows.level if windows.found else 0.0
    return sum(bucket.integral for bucket in taken) / (covered_s if windows.found else max(covered_s, window_s))


def arriving_per_s(windows: Windows, now_s: float, scale: Scale) -> float:
    """Requests a second over the short window."""
    oldest = math.floor((now_s - scale.panic_window_s) / bucket_s(scale))
    return sum(bucket.arrived for bucket in windows.buckets if bucket.index >= oldest) / scale.panic_window_s


def bucket_s(scale: Scale) -> float:
    """The width of a bucket: the more, the longer the windows."""
    return max(scale.panic_window_s / 10.0, scale.stable_window_s / (BUCKETS_MAX - 2))


def _note_arrivals(windows: Windows, arrived: int, now_s: float, scale: Scale) -> Windows:
    buckets = list(windows.buckets)
    index = math.floor(now_s / bucket_s(scale))
    if buckets and buckets[-1].index >= index:
        buckets[-1] = msgspec.structs.replace(buckets[-1], arrived=buckets[-1].arrived + arrived)
    else:
        buckets.append(Bucket(index, 0.0, 0.0, arrived))
    return msgspec.structs.replace(windows, buckets=tuple(buckets[-BUCKETS_MAX:]))


def _add(buckets: list[Bucket], index: int, integral: float, covered_s: float) -> None:
    if buckets and buckets[-1].index >= index:
        last = buckets[-1]
        buckets[-1] = Bucket(last.index, last.integral + integral, last.covered_s + covered_s, last.arrived)
    else:
        buckets.append(Bucket(index, integral, covered_s))

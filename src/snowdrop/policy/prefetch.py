"""In which order the chunks of an artefact are fetched. Pure: no clock, no I/O, same calls, same order.

First what somebody cannot go on without (files of the directory, retries), then what readers asked for, the
latest packet first, then what an earlier start has read, then everything in load order if the whole artefact is
wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from heapq import heapify, heappop, heappush
from typing import NamedTuple

URGENT = 0
WANTED = 1
FORESEEN = 2
"""What an earlier start has read: before the load order, the first packet first."""
LATER = 3
"""Behind the load order: what only completes the directory."""
RANKS = (URGENT, WANTED, FORESEEN, LATER)

EASY_BYTES = 128 << 20
EASY_S_MAX = 0.5
"""A load begins with few and short runs, until so many bytes have come or so long: the first tensor does not share
the link with bytes far behind it."""
FAST_BYTES_PER_S = 600e6
FAST_BYTES_MIN = 16 << 20
"""A link that brings so much so fast needs no such care: the first tensor waits for the processor."""
EASY_RUNS_MAX = 4
EASY_RUN_BYTES = 4 << 20
SMALL_RUN_BYTES = 64 << 10
"""Such runs count for nothing: headers and what is cut off at the edges hold up no tensor."""
START_RUNS = 4
"""At once at the very start; one more with each that has come."""
TAIL_RUNS = 16
"""What is left is cut into so many runs: connections are not served evenly, and the last one is waited for."""

_STALE_MAX = 1024
"""Outdated entries that a queue may hold beside one for each chunk."""


class FetchOrder:
    """The chunks of one artefact. What `next` gives stays next until it is no longer due."""

    def __init__(self, load_order: Sequence[int]) -> None:
        self._load_order = load_order
        self._at = 0
        self._queues: dict[int, list[tuple[int, int, int]]] = {rank: [] for rank in RANKS}
        self._latest: dict[int, dict[int, tuple[int, int]]] = {rank: {} for rank in RANKS}
        self._packets = 0

    def want(self, chunks: Iterable[int], rank: int = WANTED) -> None:
        """Moves `chunks`, most urgent first, to the front of their rank; FORESEEN and LATER ones to its end."""
        self._packets += 1
        packet = self._packets if rank in {FORESEEN, LATER} else -self._packets
        queue, latest = self._queues[rank], self._latest[rank]
        for position, chunk in enumerate(chunks):
            latest[chunk] = (packet, position)
            heappush(queue, (packet, position, chunk))
        if len(queue) > len(latest) + _STALE_MAX:
            queue[:] = [(*key, chunk) for chunk, key in latest.items()]
            heapify(queue)

    def is_wanted(self, chunk: int) -> bool:
        """Whether somebody asked for this chunk by number and it has not been passed since."""
        return any(chunk in latest for latest in self._latest.values())

    def forget(self) -> None:
        """Nobody waits for anything any more."""
        for rank in RANKS:
            self._queues[rank].clear()
            self._latest[rank].clear()
        self._at = 0

    def rewind(self) -> None:
        """Starts over with the load order: what had been passed may be due again."""
        self._at = 0

    def next(self, is_due: Callable[[int], bool], *, whole: bool) -> int | None:
        """The chunk to fetch now, or None; those that are not due are passed and forgotten.

        `whole` says whether the load order counts, or only what was asked for.
        """
        for rank in (URGENT, WANTED, FORESEEN):
            chunk = self._first(rank, is_due)
            if chunk is not None:
                return chunk
        while whole and self._at < len(self._load_order):
            if is_due(self._load_order[self._at]):
                return self._load_order[self._at]
            self._at += 1
        return self._first(LATER, is_due)

    def _first(self, rank: int, is_due: Callable[[int], bool]) -> int | None:
        queue, latest = self._queues[rank], self._latest[rank]
        while queue:
            packet, position, chunk = queue[0]
            if latest.get(chunk) == (packet, position):
                if is_due(chunk):
                    return chunk
                del latest[chunk]
            heappop(queue)
        return None


def load_order(headers: Iterable[int], chunks: Iterable[int]) -> list[int]:
    """Chunks with the headers of safetensors files first, then the others ascending: the order of the manifest."""
    first = list(dict.fromkeys(headers))
    taken = set(first)
    return first + sorted(set(chunks) - taken)


class Pace(NamedTuple):
    """How much of one artefact is asked of the origin at a time."""

    runs_max: int
    run_bytes_max: int


def pace_of(brought_bytes: int, left_bytes: int, elapsed_s: float, runs_done: int, run_bytes_max: int) -> Pace:
    """The pace after `brought_bytes` in `elapsed_s`; `run_bytes_max` is what the link wants."""
    runs_max = START_RUNS + runs_done
    short = min(run_bytes_max, EASY_RUN_BYTES)
    is_fast = brought_bytes >= FAST_BYTES_MIN and brought_bytes > FAST_BYTES_PER_S * elapsed_s
    if brought_bytes < EASY_BYTES and elapsed_s < EASY_S_MAX and not is_fast:
        return Pace(min(runs_max, EASY_RUNS_MAX), short)
    return Pace(runs_max, min(run_bytes_max, max(short, left_bytes // TAIL_RUNS)))

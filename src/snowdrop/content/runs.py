"""What a fill deals in: who waits, who reads, what is read at once, and how that went."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, Protocol

from snowdrop.content.area import Area
from snowdrop.content.source import ChunkSource, Tier
from snowdrop.domain.errors import SnowdropError
from snowdrop.policy.prefetch import SMALL_RUN_BYTES, URGENT, pace_of

Place = Literal["area", "landing"]


@dataclass(eq=False)
class Ticket:
    """Somebody who waits for chunks. `on_end` is called once, in any thread: all are there, or `error` is set."""

    place: Place
    remaining: set[int]
    on_end: Callable[[], None]
    rank: int = URGENT
    holder: str = ""
    """For whom the area is waited for: the wait ends when it no longer reads."""
    error: SnowdropError | None = None
    given: Counter[Tier] = field(default_factory=Counter)
    """Bytes by tier that were read for this ticket and no earlier one."""


@dataclass(eq=False)
class Reader:
    """A holder that was given the area. `wakes` are this side's ends of its sockets."""

    is_lazy: bool
    began_unix_ns: int = field(default_factory=time.time_ns)
    wakes: list[socket.socket] = field(default_factory=list)
    given: Counter[Tier] = field(default_factory=Counter)

    def wake(self) -> None:
        """Never blocks: a full socket wakes its reader anyway."""
        for wake in self.wakes:
            with suppress(OSError):
                wake.send(b"\0", socket.MSG_DONTWAIT)

    def end(self) -> None:
        """Whoever listens to the sockets finds their end and closes them."""
        for wake in self.wakes:
            with suppress(OSError):
                wake.shutdown(socket.SHUT_RDWR)


class Awaited(Protocol):
    """Chunks that other artefacts' areas are about to get, from where they are then copied."""

    def holds_up(self, chunk: int) -> bool:
        """Whether to wait with this chunk; remembers it if so."""

    def no_longer(self) -> list[int]:
        """Those that were held up and are not any more; forgets them."""


@dataclass(frozen=True)
class Run:
    """Consecutive chunks, read at once: in place at `area_offset`, or through scratch memory if -1."""

    source: ChunkSource
    first: int
    count: int
    length: int
    area: Area | None
    area_offset: int


@dataclass
class Outcome:
    """How a run went: `bad` chunks are not in place; `error` is why, if the source could not be read."""

    bad: list[int]
    error: SnowdropError | None = None
    landing_error: SnowdropError | None = None


def is_heavy(run: Run) -> bool:
    """Whether it is one of those of which only some go to the origin at once."""
    return run.source.tier == "origin" and run.length > SMALL_RUN_BYTES


class Paced:
    """How a fill of `size_bytes` has gone so far, for the pace at which it asks the origin."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._origin_bytes = 0
        self._runs = 0
        self._flights = 0
        self._began_s = 0.0

    def next(self, run_bytes_max: int) -> tuple[int, int]:
        """How long the next run may be, and how many may begin now; the first question begins the load."""
        self._began_s = self._began_s or time.monotonic()
        elapsed_s = time.monotonic() - self._began_s
        left_bytes = max(0, self._size_bytes - self._origin_bytes)
        pace = pace_of(self._origin_bytes, left_bytes, elapsed_s, self._runs, run_bytes_max)
        return pace.run_bytes_max, pace.runs_max - self._flights

    def began(self, run: Run) -> None:
        self._flights += is_heavy(run)

    def ended(self, run: Run) -> None:
        """A run has ended, well or not."""
        self._runs += 1
        self._flights -= is_heavy(run)
        self._origin_bytes += run.length if run.source.tier == "origin" else 0

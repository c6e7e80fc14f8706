"""What went wrong with bytes on this node and what became of it: a bounded log, kept over restarts."""

from __future__ import annotations

import threading
from collections import Counter, deque
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

EVENTS_MAX = 512
"""Kept in memory; the file holds at most twice as many."""

EventKind = Literal["quarantined", "replaced"]
SeenBy = Literal["load", "scrub"]


class ContentEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A chunk whose bytes in a landing file were wrong, or that was written anew after that.

    `artefact` is the digest of the manifest, `chunk` the index there, `digest` its 64 hex digits, `file` the first
    file that has it. `seen_by` says who found it.
    """

    time_unix_ns: int
    kind: EventKind
    artefact: str
    chunk: int
    digest: str
    file: str
    seen_by: SeenBy


class EventLog:
    """The newest events and how many there were of each kind since the log began. Any thread.

    Losing events is not an error: a disk that cannot take them is not to stop a load.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._events: deque[ContentEvent] = deque(maxlen=EVENTS_MAX)
        self._counts: Counter[str] = Counter()
        self._lines = 0
        self._lock = threading.Lock()

    def open(self) -> None:
        """Reads what an earlier process left; a line that is not an event is passed over."""
        if self._path is None:
            return
        with self._lock, suppress(OSError):
            for line in self._path.read_bytes().splitlines():
                self._lines += 1
                with suppress(msgspec.DecodeError, UnicodeDecodeError):
                    self._count(msgspec.json.decode(line, type=ContentEvent))

    @property
    def counts(self) -> dict[EventKind, int]:
        """By kind, of what the log holds and what was added since it was opened."""
        with self._lock:
            return {"quarantined": self._counts["quarantined"], "replaced": self._counts["replaced"]}

    def recent(self) -> list[ContentEvent]:
        """Oldest first, at most EVENTS_MAX."""
        with self._lock:
            return list(self._events)

    def add(self, event: ContentEvent) -> None:
        with self._lock:
            self._count(event)
            if self._path is None:
                return
            with suppress(OSError):
                if self._lines >= 2 * EVENTS_MAX:
                    self._rewrite(self._path)
                    return
                with self._path.open("ab") as stream:
                    stream.write(msgspec.json.encode(event) + b"\n")
                self._lines += 1

    def _count(self, event: ContentEvent) -> None:
        self._events.append(event)
        self._counts[event.kind] += 1

    def _rewrite(self, path: Path) -> None:
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(b"".join(msgspec.json.encode(event) + b"\n" for event in self._events))
        temporary.replace(path)
        self._lines = len(self._events)

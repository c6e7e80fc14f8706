"""What went wrong with bytes on this node and what became of it: a bounded log, kept over restarts."""

from __future__ import annotations

import os
import threading
from collections import Counter, deque
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

from snowdrop.content.diskio import DiskIo

EVENTS_MAX = 512
"""Kept, the newest ones."""

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

    def __init__(self, path: Path | None = None, io: DiskIo | None = None) -> None:
        self._path = path
        self._io = io or DiskIo()
        self._events: deque[ContentEvent] = deque(maxlen=EVENTS_MAX)
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def open(self) -> None:
        """Reads what an earlier process left; a line that is not an event is passed over."""
        if self._path is None:
            return
        with self._lock, suppress(OSError):
            for line in self._path.read_bytes().splitlines():
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
                self._store(self._path)

    def _count(self, event: ContentEvent) -> None:
        self._events.append(event)
        self._counts[event.kind] += 1

    def _store(self, path: Path) -> None:
        # Anew each time: events are rare, and a file that is replaced is never half of one and half of another.
        data = b"".join(msgspec.json.encode(event) + b"\n" for event in self._events)
        temporary = path.with_suffix(".tmp")
        self._io.create(temporary, 0, 0o600)
        fd = self._io.open(temporary, os.O_WRONLY)
        try:
            self._io.write(fd, memoryview(data), 0)
        finally:
            os.close(fd)
        self._io.replace(temporary, path)

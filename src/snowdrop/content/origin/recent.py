"""What reads from one origin took lately, and how many requests were made: what hedging is decided by."""

from __future__ import annotations

import threading
from collections import deque

import msgspec

from snowdrop.policy.hedge import MIB, Recent, Spent

SAMPLES_MAX = 128
PERCENTILE = 0.95
RENEW_EVERY = 8


class ReadCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Since the origin was opened. `hedges_won` brought their bytes first; `resumed` went on in the middle."""

    requests: int = 0
    bytes: int = 0
    retries: int = 0
    resumed: int = 0
    throttled: int = 0
    hedges: int = 0
    hedges_won: int = 0
    ignored_ranges: int = 0
    redirects: int = 0


class ReadRecord:
    """Shared by the threads that read from one origin."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = ReadCounts()
        self._first_byte_s: deque[float] = deque(maxlen=SAMPLES_MAX)
        self._per_mib_s: deque[float] = deque(maxlen=SAMPLES_MAX)
        self._recent = Recent()
        self._unseen = 0

    @property
    def counts(self) -> ReadCounts:
        return self._counts

    @property
    def recent(self) -> Recent:
        return self._recent

    @property
    def spent(self) -> Spent:
        counts = self._counts
        return Spent(requests=counts.requests, hedges=counts.hedges)

    def count(self, **more: int) -> None:
        """Adds to the counters of these names."""
        with self._lock:
            changed = {name: getattr(self._counts, name) + value for name, value in more.items()}
            self._counts = msgspec.structs.replace(self._counts, **changed)

    def sample(self, first_byte_s: float, body_s: float, body_bytes: int) -> None:
        """One whole answer that came by itself: the wait for its first byte, then its body."""
        with self._lock:
            self._first_byte_s.append(first_byte_s)
            self._per_mib_s.append(body_s * MIB / max(body_bytes, MIB // 4))
            self._unseen += 1
            if self._unseen >= RENEW_EVERY:
                self._unseen = 0
                self._recent = Recent(
                    samples=len(self._per_mib_s),
                    first_byte_s=_percentile(self._first_byte_s),
                    per_mib_s=_percentile(self._per_mib_s),
                )


def _percentile(samples: deque[float]) -> float:
    return sorted(samples)[min(int(len(samples) * PERCENTILE), len(samples) - 1)]

"""Counts of finished requests as a gateway's worker hands them to its owner."""

from __future__ import annotations

import msgspec

# Seconds. From a warm answer on the same machine to a large model's cold start.
DURATION_BOUNDS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)


class Durations(msgspec.Struct):
    """A histogram: `buckets` holds one count for each of DURATION_BOUNDS_S and one for what is above them."""

    sum_s: float = 0.0
    buckets: list[int] = msgspec.field(default_factory=lambda: [0] * (len(DURATION_BOUNDS_S) + 1))


class RequestSeries(msgspec.Struct, kw_only=True):
    """Counts of the requests that have these labels in common. `status` is a class, as in 2xx."""

    tenant: str
    deployment: str
    kind: str
    status: str
    count: int = 0
    cold: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0
    queued: Durations = msgspec.field(default_factory=Durations)
    first_byte: Durations = msgspec.field(default_factory=Durations)
    total: Durations = msgspec.field(default_factory=Durations)

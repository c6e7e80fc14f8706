"""Token buckets as arithmetic: how long a reader waits so that a rate is kept. Nothing here reads a clock."""

from __future__ import annotations

import msgspec

PIECE_BYTES_MIN = 64 << 10
PIECE_BYTES_MAX = 4 << 20
PIECE_S = 0.05
"""A limited read goes in pieces of about so long at the limit's rate, so that nobody waits long behind one."""
BURST_S = 0.1
"""What a bucket that was idle has saved up, in seconds of its rate."""


class Bucket(msgspec.Struct, frozen=True, kw_only=True):
    """`bytes_per_s` 0 is no limit. `free_s` is when everything that was taken so far is paid for."""

    bytes_per_s: int
    free_s: float = 0.0


def take(bucket: Bucket, size_bytes: int, *, now_s: float) -> tuple[Bucket, float]:
    """The bucket after `size_bytes` were taken, and the seconds that the taker waits before it uses them.

    Takers are served in the order in which they ask. Over any time t the bytes whose wait has ended are at most
    `bytes_per_s * (t + BURST_S)` plus one taking.
    """
    if bucket.bytes_per_s <= 0 or size_bytes <= 0:
        return bucket, 0.0
    begins_s = max(bucket.free_s, now_s - BURST_S)
    wait_s = max(0.0, begins_s - now_s)
    return msgspec.structs.replace(bucket, free_s=begins_s + size_bytes / bucket.bytes_per_s), wait_s


def piece_bytes(rates: tuple[int, ...]) -> int:
    """How much to read at a time under these limits (0: none); 0 if there is no limit at all."""
    limited = [rate for rate in rates if rate > 0]
    if not limited:
        return 0
    return min(max(int(min(limited) * PIECE_S), PIECE_BYTES_MIN), PIECE_BYTES_MAX)

"""How far to fetch beyond a read that had to wait. Pure.

A reader that goes through a file finds the next bytes on their way; one that jumps about gets what it asked for
and no more, so that its reads do not wait behind bytes that nobody wants.
"""

from __future__ import annotations

import msgspec

PASS_BYTES_MIN = 4 << 20
"""What the kernel reads ahead by itself around one access: only beyond that somebody goes through the file."""
FIRST_BYTES = 8 << 20
AHEAD_BYTES_MAX = 64 << 20
"""As much as a few connections hold under way."""


class ReadState(msgspec.Struct, frozen=True):
    """One file: the pass that its last waiting read belongs to, and up to where was fetched ahead of it."""

    begin: int = 0
    end: int = 0
    ahead_end: int = 0
    window_bytes: int = 0


class Ahead(msgspec.Struct, frozen=True):
    """Fetch `length` bytes at `offset` besides (none if 0); `state` is for the next decision."""

    offset: int
    length: int
    state: ReadState
    reason: str


def decide(state: ReadState, offset: int, length: int, file_bytes: int) -> Ahead:
    """After a read of `length` bytes at `offset` that had to wait. Reads of one pass may come out of order."""
    end = offset + length
    # What was fetched ahead does not wait: the next read of a pass that waits begins at most a little behind that.
    if not state.begin <= offset <= max(state.end, state.ahead_end) + PASS_BYTES_MIN:
        return Ahead(end, 0, ReadState(offset, end, end, 0), "not where the last read ended")
    end = max(end, state.end)
    under_way = max(end, state.ahead_end)
    if end - state.begin <= PASS_BYTES_MIN:
        return Ahead(end, 0, ReadState(state.begin, end, under_way, 0), "too short to be a pass")
    if under_way - end > state.window_bytes // 2:
        return Ahead(end, 0, ReadState(state.begin, end, under_way, state.window_bytes), "enough is under way")
    window = min(max(FIRST_BYTES, state.window_bytes * 2), AHEAD_BYTES_MAX)
    ahead_end = max(under_way, min(end + window, file_bytes))
    moved = ReadState(state.begin, end, ahead_end, window)
    return Ahead(under_way, ahead_end - under_way, moved, "goes through the file")

"""How many lines of a batch are under way at once: as many as keep the deployment's slots filled, and growing."""

from __future__ import annotations

AT_ONCE_FIRST = 4
LOOK_AHEAD = 2
"""Lines per slot that is there: one that runs, one that waits. What waits is also what lets a deployment grow."""


def at_once(before: int, *, slots: int | None, refused: bool, most: int) -> int:
    """The next bound after `before`.

    `slots` are those that are there now, None if nobody says; `refused`: the deployment turned a line away since.
    Grows to at most the double, halves when refused, never leaves 1 to `most`.
    """
    if refused:
        return max(1, min(before // 2, most))
    wanted = most if slots is None else max(AT_ONCE_FIRST, LOOK_AHEAD * slots)
    return max(1, min(wanted, 2 * before, most))

"""Which chunks read back from a landing directory are wrong: the fast check first, in doubt the digest."""

from __future__ import annotations

from snowdrop.content.landing import Landing
from snowdrop.content.source import FindBad


def wrong_on_disk(landing: Landing, find_bad: FindBad, first: int, count: int, view: memoryview) -> list[int]:
    """Those of the chunks, read from `landing` into `view`, whose bytes are not what their digests say.

    The fast check is enough to believe a chunk. One that has none, or fails it, is judged by `find_bad`; if it is
    right, its check is taken anew.
    """
    wrong: list[int] = []
    for chunk, data in landing.unchecked(first, count, view):
        if find_bad(chunk, 1, data):
            wrong.append(chunk)
        else:
            landing.learn(chunk, data)
    return wrong

"""How a deployment's replicas are divided among the revisions that its traffic goes to. Pure."""

from __future__ import annotations

import math

import msgspec

from snowdrop.domain.ids import RevisionId
from snowdrop.domain.scale import ScaleBounds


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """A revision, the part of the traffic that it gets (any positive scale), and its own bounds."""

    revision: RevisionId
    weight: float
    bounds: ScaleBounds = ScaleBounds()


def split(desired: int, shares: tuple[Share, ...], *, max_total: int | None = None) -> dict[RevisionId, int]:
    """Replicas by revision: each as much of `desired` as it has traffic, rounded up, within its bounds.

    Rounded up, since one that gets traffic needs a replica, the smallest share too; so the sum may exceed
    `desired` by as many as there are revisions less one. With `max_total` the largest give way until it is kept,
    down to one each. A revision without traffic has none beyond its own minimum.
    """
    total = sum(share.weight for share in shares if share.weight > 0)
    counts: dict[RevisionId, int] = {}
    for share in shares:
        count = math.ceil(desired * share.weight / total - 1e-9) if total > 0 and share.weight > 0 else 0
        low = share.bounds.min or 0
        high = share.bounds.max if share.bounds.max is not None else max(count, low)
        counts[share.revision] = min(max(count, low), high)
    least = {share.revision: max(1, share.bounds.min or 0) for share in shares}
    while max_total is not None and sum(counts.values()) > max_total:
        largest = max(counts, key=lambda name: (counts[name] - least[name], counts[name]))
        if counts[largest] <= least[largest]:
            break
        counts[largest] -= 1
    return counts

"""Which replica takes the next request."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Protocol, TypeVar

import msgspec

from snowdrop.domain.ids import RevisionId


class Slots(Protocol):
    """What the choice looks at: how much a replica has, how much it may have, whether it takes any more."""

    @property
    def in_flight(self) -> int: ...
    @property
    def concurrency(self) -> int: ...
    @property
    def accepting(self) -> bool: ...


SlotsT = TypeVar("SlotsT", bound=Slots)


def choose(replicas: Iterable[SlotsT]) -> SlotsT | None:
    """The accepting replica with the smallest part of its slots taken, or None if all are full.

    The first listed wins a tie. Replicas never get more than their `concurrency`.
    """
    best: SlotsT | None = None
    best_share = 1.0
    for replica in replicas:
        if not replica.accepting or replica.in_flight >= replica.concurrency:
            continue
        share = replica.in_flight / replica.concurrency
        if best is None or share < best_share:
            best, best_share = replica, share
    return best


class Turns(msgspec.Struct, frozen=True, kw_only=True):
    """What weighted routing remembers: a virtual time, and until when each revision has had its part."""

    time: float = 0.0
    until: dict[RevisionId, float] = msgspec.field(default_factory=dict)


def whose_turn(
    turns: Turns, weights: Mapping[RevisionId, float], free: Collection[RevisionId]
) -> tuple[RevisionId | None, Turns]:
    """Which of the revisions that have a `free` slot gets the next request, and the memory after it.

    Start-time fair queueing (Goyal, Vin, Cheng: "Start-time Fair Queueing", 1996): over any stretch in which all
    have free slots each gets its part, and one that had none does not catch up on what it missed. While only one
    has free slots it gets all, whatever its weight, for nobody waits beside a free slot; one of weight 0 gets
    nothing.
    """
    chosen: RevisionId | None = None
    best = (0.0, 0.0)
    for revision in sorted(free):
        weight = weights.get(revision, 0.0)
        rank = (max(turns.time, turns.until.get(revision, 0.0)), -weight)
        if weight > 0 and (chosen is None or rank < best):
            chosen, best = revision, rank
    if chosen is None:
        return None, turns
    until = {name: end for name, end in turns.until.items() if name in weights}
    until[chosen] = best[0] + 1.0 / weights[chosen]
    return chosen, Turns(time=best[0], until=until)

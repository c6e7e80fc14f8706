"""Which replica takes the next request."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar


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

"""Which deployments can never give a slot again, because whoever holds one waits for another. Pure.

A request that holds a slot is stuck as long as a call that it made to another service waits there, or runs and is
stuck itself. A
deployment is blocked if as many requests as it may ever have slots hold one there and are stuck on a blocked
deployment. That is the largest such set: begin with all that are full, and take away, until nothing
changes, each that has too few holders which are stuck on one of the rest.

Waits are the only way to add to such a set (a new holder is not stuck, a slot that is given back can only free),
so it is enough to ask when a call is about to wait. Slots that vanish meanwhile are left to the longest wait.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Generic, TypeVar

import msgspec

Key = TypeVar("Key", bound=Hashable)


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A deployment: the most slots it may have, and the leases on those that it has."""

    slots_max: int
    holders: tuple[int, ...]


class InnerWait(msgspec.Struct, Generic[Key], frozen=True):
    """A call that waits for a slot of `target`, made for the request that holds the lease `parent`."""

    parent: int
    target: Key


def blocked(
    targets: Mapping[Key, Target], waits: Sequence[InnerWait[Key]], parents: Mapping[int, int]
) -> frozenset[Key]:
    """The targets that no wait for a slot of can ever end, as things stand.

    `parents` gives, for a lease that a call holds, the lease that it was made under.
    """
    remaining = {key for key, target in targets.items() if len(target.holders) >= target.slots_max}
    while True:
        stuck = _stuck(waits, parents, remaining)
        free = {key for key in remaining if len(stuck.intersection(targets[key].holders)) < targets[key].slots_max}
        if not free:
            return frozenset(remaining)
        remaining -= free


def _stuck(waits: Sequence[InnerWait[Key]], parents: Mapping[int, int], remaining: set[Key]) -> set[int]:
    """The leases whose calls wait for one of the `remaining`, and those that wait for such a call to end."""
    stuck: set[int] = set()
    for wait in waits:
        lease = wait.parent if wait.target in remaining else 0
        while lease and lease not in stuck:
            stuck.add(lease)
            lease = parents.get(lease, 0)
    return stuck

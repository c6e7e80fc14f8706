"""Which deployments can never give a slot again, because whoever holds one waits for another. Pure.

A request that holds a slot and whose call to another service waits there is stuck as long as that one waits. A
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


def blocked(targets: Mapping[Key, Target], waits: Sequence[InnerWait[Key]]) -> frozenset[Key]:
    """The targets that no wait for a slot of can ever end, as things stand."""
    waited_for: dict[int, set[Key]] = {}
    for wait in waits:
        waited_for.setdefault(wait.parent, set()).add(wait.target)
    remaining = {key for key, target in targets.items() if len(target.holders) >= target.slots_max}
    while True:
        free = {key for key in remaining if _stuck(targets[key], waited_for, remaining) < targets[key].slots_max}
        if not free:
            return frozenset(remaining)
        remaining -= free


def _stuck(target: Target, waited_for: Mapping[int, set[Key]], remaining: set[Key]) -> int:
    """How many of its holders wait for one of the `remaining`."""
    return sum(1 for holder in target.holders if not waited_for.get(holder, set()).isdisjoint(remaining))

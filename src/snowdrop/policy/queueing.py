"""Whose turn is next among those who wait for a slot. Pure: no clock, no I/O, same calls, same order.

*Priority.* Each step of priority lets a request count as if it had come `lead_s` earlier; whoever counts as the
earliest has the turn. So a high one passes those that came up to `lead_s` per step before it, and none waits for
ever: what comes later than that does not pass it.

*Within a class* of one priority: first come first served, or fair. Fair is weighted fair queueing with equal
weights: each caller has a tag that grows by one with each of its turns, the lowest tag has the turn, and a caller
that comes (back) starts at the virtual time, which grows by one when every waiting caller had a turn. Callers that
wait all the time get the same number of turns, give or take one; in between, those who come first go first.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator
from heapq import heapify, heappop, heappush
from typing import Generic, NamedTuple, TypeVar

import msgspec

from snowdrop.domain.service import QueueSpec

FORGOTTEN_MIN = 64
"""Callers without a waiting request whose tags are kept, at least, before those that mean nothing are dropped."""

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LineRules(msgspec.Struct, frozen=True, kw_only=True):
    fair: bool = False
    lead_s: float = 60.0


def rules_of(queue: QueueSpec) -> LineRules:
    return LineRules(fair=queue.order == "fair", lead_s=queue.priority_lead_s)


def priority_of(queue: QueueSpec, asked: int | None, key_max: int | None = None) -> int:
    """The priority that a request gets: what it asks for, as far as the deployment and its key allow."""
    wanted = queue.priority if asked is None else min(asked, queue.priority_max)
    if key_max is not None:
        wanted = min(wanted, key_max)
    return max(wanted, queue.priority_min)


class Standing(NamedTuple):
    """What the order goes by. `pin`: what alone may serve it ("": anything); `first`: it has had its turn."""

    came_s: float
    priority: int = 0
    caller: str = ""
    pin: str = ""
    first: bool = False


class Line(Generic[K, V]):
    """Those who wait at one deployment, by key."""

    def __init__(self, rules: LineRules) -> None:
        self.rules = rules
        self._classes: dict[tuple[float, str], _Class[K]] = {}
        self._waiting: OrderedDict[K, tuple[V, Standing]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, key: K) -> bool:
        return key in self._waiting

    def values(self) -> Iterator[V]:
        """All who wait, in the order in which they came."""
        return (value for value, _standing in self._waiting.values())

    def join(self, key: K, value: V, standing: Standing) -> None:
        self._waiting[key] = (value, standing)
        name = _class_of(standing)
        found = self._classes.get(name)
        if found is None:
            found = self._classes[name] = _Class(fair=self.rules.fair)
        found.join(key, standing)

    def leave(self, key: K) -> V | None:
        """Whoever gives up; None if it does not wait."""
        found = self._waiting.pop(key, None)
        if found is None:
            return None
        value, standing = found
        name = _class_of(standing)
        of = self._classes[name]
        of.leave(key, standing.caller)
        if not of.came:
            del self._classes[name]
        return value

    def take(self, closed: Collection[str] = ()) -> V | None:
        """Whoever has the turn leaves the line; None if none waits but for pins that are `closed` ("": any)."""
        name = self._next_class(closed)
        if name is None:
            return None
        of = self._classes[name]
        key = of.next()
        value, standing = self._waiting[key]
        of.served(key, standing.caller)
        del self._waiting[key]
        if not of.came:
            del self._classes[name]
        return value

    def change(self, rules: LineRules, standing_of: Callable[[V], Standing] | None = None) -> None:
        """Other rules from now on; all who wait are put in order anew, by what they count as from now on."""
        waiting = list(self._waiting.items())
        self.rules = rules
        self._classes.clear()
        self._waiting.clear()
        for key, (value, standing) in waiting:
            self.join(key, value, standing_of(value) if standing_of is not None else standing)

    def clear(self) -> list[V]:
        """Empties the line; who waited, in the order in which they came."""
        values = list(self.values())
        self._classes.clear()
        self._waiting.clear()
        return values

    def ranks(self) -> dict[K, int]:
        """How many are ahead of each, if nobody comes or leaves. It costs as much as the line is long."""
        order: list[tuple[float, int, int, K]] = []
        for number, ((priority, _pin), of) in enumerate(self._classes.items()):
            # A class has its next turn by the earliest of those who are left in it.
            left_s = math.inf
            for behind, key in enumerate(reversed(list(of.in_order()))):
                left_s = min(left_s, self._counts_as_s(priority, self._waiting[key][1].came_s))
                order.append((left_s, number, -behind, key))
        order.sort(key=lambda entry: entry[:3])
        return {key: rank for rank, (*_, key) in enumerate(order)}

    def _next_class(self, closed: Collection[str]) -> tuple[float, str] | None:
        if len(self._classes) == 1 and not closed:  # nearly always
            return next(iter(self._classes))
        best: tuple[float, str] | None = None
        best_s = math.inf
        for name, of in self._classes.items():
            if name[1] in closed:
                continue
            counts_s = self._counts_as_s(name[0], of.first_came_s)
            if best is None or counts_s < best_s:
                best, best_s = name, counts_s
        return best

    def _counts_as_s(self, priority: float, came_s: float) -> float:
        return -math.inf if priority == math.inf else came_s - priority * self.rules.lead_s


def _class_of(standing: Standing) -> tuple[float, str]:
    return (math.inf if standing.first else standing.priority, standing.pin)


class _Lane(Generic[K]):
    """One caller's waiting requests. `mark` tells its valid entry in the heap from outdated ones."""

    __slots__ = ("keys", "mark", "tag")

    def __init__(self, tag: float) -> None:
        self.keys: OrderedDict[K, None] = OrderedDict()
        self.tag = tag
        self.mark = 0


class _Class(Generic[K]):
    """Those of one priority (and pin)."""

    def __init__(self, *, fair: bool) -> None:
        self._fair = fair
        self.came: OrderedDict[K, float] = OrderedDict()
        self._lanes: dict[str, _Lane[K]] = {}
        self._heap: list[tuple[float, int, str]] = []
        self._tags: dict[str, float] = {}
        self._virtual = 0.0
        self._marks = 0

    @property
    def first_came_s(self) -> float:
        return next(iter(self.came.values()))

    def join(self, key: K, standing: Standing) -> None:
        self.came[key] = standing.came_s
        if not self._fair:
            return
        lane = self._lanes.get(standing.caller)
        if lane is None:
            tag = max(self._virtual, self._tags.pop(standing.caller, 0.0))
            lane = self._lanes[standing.caller] = _Lane(tag)
            self._offer(standing.caller, lane)
        lane.keys[key] = None

    def next(self) -> K:
        if not self._fair:
            return next(iter(self.came))
        while True:
            if self._is_valid(self._heap[0]):
                return next(iter(self._lanes[self._heap[0][2]].keys))
            heappop(self._heap)

    def served(self, key: K, caller: str) -> None:
        """`key`, which was next, has had its turn."""
        if self._fair:
            lane = self._lanes[caller]
            heappop(self._heap)
            self._virtual = max(self._virtual, lane.tag) + 1 / len(self._lanes)
            lane.tag += 1
            if len(lane.keys) > 1:
                self._offer(caller, lane)
        self.leave(key, caller)

    def leave(self, key: K, caller: str) -> None:
        del self.came[key]
        if not self._fair:
            return
        lane = self._lanes[caller]
        del lane.keys[key]
        if lane.keys:
            return
        del self._lanes[caller]
        self._tags[caller] = lane.tag
        if len(self._tags) > FORGOTTEN_MIN + 2 * len(self._lanes):
            # Whoever comes back with a tag that has been reached is as good as new.
            self._tags = {name: tag for name, tag in self._tags.items() if tag > self._virtual}

    def in_order(self) -> Iterator[K]:
        """The turns as they would come."""
        if not self._fair:
            yield from self.came
            return
        turns = [
            (lane.tag + turn, lane.mark, key)
            for lane in self._lanes.values()
            for turn, key in enumerate(lane.keys)
        ]
        turns.sort(key=lambda entry: entry[:2])
        for _tag, _mark, key in turns:
            yield key

    def _is_valid(self, entry: tuple[float, int, str]) -> bool:
        lane = self._lanes.get(entry[2])
        return lane is not None and lane.mark == entry[1]

    def _offer(self, caller: str, lane: _Lane[K]) -> None:
        if len(self._heap) > FORGOTTEN_MIN + 2 * len(self._lanes):  # callers that gave up leave entries behind
            self._heap = [entry for entry in self._heap if self._is_valid(entry)]
            heapify(self._heap)
        self._marks += 1
        lane.mark = self._marks
        heappush(self._heap, (lane.tag, lane.mark, caller))

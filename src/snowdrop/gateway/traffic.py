"""How one deployment's traffic is shared among revisions, and what came of it: counters by revision."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Protocol, TypeVar

from snowdrop.domain.errors import NotFoundError
from snowdrop.domain.ids import RevisionId
from snowdrop.policy import routing
from snowdrop.policy.rollout import LATENCY_BUCKETS, latency_bucket
from snowdrop.wire.control import DeploymentRoute, ReplicaRoute, RevisionLoad
from snowdrop.wire.slots import Outcome

STABLE, CANDIDATE = "stable", "candidate"


class RoutedSlots(routing.Slots, Protocol):
    """A replica with its slots."""

    @property
    def route(self) -> ReplicaRoute: ...


RoutedT = TypeVar("RoutedT", bound=RoutedSlots)


class _Tally:
    """Answers of one revision since the gateway started."""

    __slots__ = ("done", "failed", "latency")

    def __init__(self) -> None:
        self.done = 0
        self.failed = 0
        self.latency = [0] * LATENCY_BUCKETS


class Traffic:
    """Weights, pinned requests and counters of one deployment."""

    def __init__(self) -> None:
        self.weights: dict[RevisionId, float] = {}
        self.pins: dict[str, int] = {}
        self._roles: dict[str, RevisionId] = {}
        self._turns = routing.Turns()
        self._tallies: dict[RevisionId, _Tally] = {}

    def change(self, route: DeploymentRoute) -> None:
        """Other weights from now on; counters of revisions that are no longer known are forgotten."""
        self.weights = {each.revision: each.weight for each in route.weights}
        self._roles = {each.role: each.revision for each in route.weights}
        known = {route.revision, *self.weights, *(replica.revision for replica in route.replicas)}
        self._tallies = {name: tally for name, tally in self._tallies.items() if name in known}

    def named(self, route: DeploymentRoute, text: str) -> RevisionId | None:
        """The revision that a request names, None if it names none. Raises NotFoundError for one not served."""
        if not text:
            return None
        known = {route.revision, *self.weights, *(r.revision for r in route.replicas if r.accepting)}
        revision = self._roles.get(text, route.revision if text == STABLE else RevisionId(text))
        if revision not in known:
            raise NotFoundError(
                f"{route.deployment!r} serves no revision {text!r} now",
                where="header snowdrop-revision",
                next_step=f"`snowdrop revisions {route.deployment}` lists them; or `stable`, or in a rollout"
                " `candidate`",
            )
        return revision

    def choose(self, replicas: Collection[RoutedT], pin: str) -> RoutedT | None:
        """The replica for one request, or None if none that may have it is free."""
        if pin:
            return routing.choose(each for each in replicas if each.route.revision == pin)
        if not self.weights:
            return routing.choose(replicas)
        free = {each.route.revision for each in replicas if is_free(each)}
        revision, self._turns = routing.whose_turn(self._turns, self.weights, free)
        if revision is None:
            return None
        return routing.choose(each for each in replicas if each.route.revision == revision)

    def closed(self, replicas: Collection[RoutedSlots]) -> frozenset[str]:
        """Pins whose revision has no free slot; "" if those without a pin find none."""
        free = {each.route.revision for each in replicas if is_free(each)}
        anyone = any(self.weights.get(each, 0.0) > 0 for each in free) if self.weights else bool(free)
        return frozenset({*(pin for pin in self.pins if pin not in free), *(() if anyone else ("",))})

    def joined(self, pin: str) -> None:
        if pin:
            self.pins[pin] = self.pins.get(pin, 0) + 1

    def left(self, pin: str) -> None:
        if pin in self.pins:
            self.pins[pin] -= 1
            if self.pins[pin] == 0:
                del self.pins[pin]

    def note(self, revision: RevisionId, outcome: Outcome) -> None:
        """One answer."""
        tally = self._tallies.get(revision)
        if tally is None:
            tally = self._tallies[revision] = _Tally()
        tally.done += 1
        if outcome.failed:
            tally.failed += 1
        if outcome.first_byte_s is not None:
            tally.latency[latency_bucket(outcome.first_byte_s)] += 1

    def loads(self) -> tuple[RevisionLoad, ...]:
        return tuple(
            RevisionLoad(revision=name, done=tally.done, failed=tally.failed, latency=tuple(tally.latency))
            for name, tally in self._tallies.items()
        )

    def pinned(self) -> dict[RevisionId, int]:
        return {RevisionId(pin): count for pin, count in self.pins.items()}


def is_free(slots: routing.Slots) -> bool:
    return slots.accepting and slots.in_flight < slots.concurrency


def lost_pins(pins: Iterable[str], route: DeploymentRoute) -> frozenset[str]:
    """Pins of revisions that the route does not know any more."""
    known = {route.revision, *(w.revision for w in route.weights), *(r.revision for r in route.replicas)}
    return frozenset(pin for pin in pins if pin not in known)

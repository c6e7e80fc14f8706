"""A Retry-After is true: who comes back when told gets in. The queue core in a world with a clock of its own."""

from heapq import heappop, heappush
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from platform_helpers import KEY, NAME, REVISION, replica_route, route
from snowdrop.domain.ids import ReplicaId
from snowdrop.domain.replica import ReplicaState
from snowdrop.domain.service import QueueSpec
from snowdrop.gateway.effects import Deny, Effect, Grant, Now
from snowdrop.gateway.queue import QueueCore
from snowdrop.policy.waiting import RETRY_AFTER_S_MAX
from snowdrop.wire.control import DeploymentRoute, StartingReplica
from snowdrop.wire.slots import Acquire

EPOCH_S = 1_000_000.0
TICK_S = 0.25


class World:
    """One deployment; a start takes `start_s`, a request `service_s`; clients do as they are told."""

    def __init__(
        self, *, queue: QueueSpec, replicas: int, concurrency: int, start_s: float, service_s: float
    ) -> None:
        self.core = QueueCore(keys_required=False)
        self.queue = queue
        self.replicas = replicas
        self.concurrency = concurrency
        self.start_s = start_s
        self.service_s = service_s
        self.now_s = 0.0
        self.happens: list[tuple[float, int, str, int]] = []
        self.number = 0
        self.refusals: dict[int, list[float]] = {}
        self.served: dict[int, float] = {}
        self.client_of: dict[int, int] = {}
        self.ordered = False
        self.core.set_routes([self.table(ready=0, starting=0)], (), self.now)

    @property
    def now(self) -> Now:
        return Now(self.now_s, int((EPOCH_S + self.now_s) * 1e9))

    def table(self, *, ready: int, starting: int) -> DeploymentRoute:
        more: dict[str, Any] = {"start_s": self.start_s, "start_high_s": self.start_s, "service_s": self.service_s}
        coming = tuple(
            StartingReplica(
                replica=ReplicaId(f"rep-{n}"),
                revision=REVISION,
                state=ReplicaState.LOADING,
                ordered_unix_ns=self.now.unix_ns,
            )
            for n in range(starting)
        )
        up = (replica_route(f"rep-{n}", concurrency=self.concurrency, ready=1) for n in range(ready))
        table = route(*up, queue=self.queue, starting=starting, coming=coming, **more)
        return DeploymentRoute(
            **{**{f: getattr(table, f) for f in table.__struct_fields__}, "concurrency": self.concurrency}
        )

    def at(self, after_s: float, what: str, which: int) -> None:
        self.number += 1
        heappush(self.happens, (self.now_s + after_s, self.number, what, which))

    def take(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Grant):
                self.served[self.client_of[effect.message.ticket]] = self.now_s
                self.at(self.service_s, "done", effect.message.lease)
            elif isinstance(effect, Deny):
                client = self.client_of[effect.message.ticket]
                later_s = effect.message.error.retry_after_s
                assert later_s is not None
                self.refusals.setdefault(client, []).append(later_s)
                self.at(later_s, "ask", client)

    def run(self, until_s: float) -> None:
        self.at(TICK_S, "tick", 0)
        while self.happens and self.now_s < until_s:
            self.now_s, _, what, which = heappop(self.happens)
            if what == "ask":
                self.number += 1
                self.client_of[self.number] = which
                request = Acquire(
                    ticket=self.number, key_sha256=None, deployment=NAME, arrived_unix_ns=self.now.unix_ns
                )
                self.take(self.core.arrive("w", request, self.now))
                if not self.ordered:
                    self.ordered = True
                    starting = self.table(ready=0, starting=self.replicas)
                    self.take(self.core.change_route(KEY, starting, self.now))
                    self.at(self.start_s, "ready", 0)
            elif what == "ready":
                self.take(self.core.change_route(KEY, self.table(ready=self.replicas, starting=0), self.now))
            elif what == "done":
                self.take(self.core.release(which, self.now))
            elif what == "tick":
                self.take(self.core.tick(self.now))
                if self.core.busy or len(self.happens) > 0:
                    self.at(TICK_S, "tick", 0)


@settings(max_examples=100, deadline=None)
@given(
    clients=st.integers(1, 80),
    length_max=st.integers(1, 20),
    replicas=st.integers(1, 4),
    concurrency=st.integers(1, 4),
    start_s=st.floats(0.5, 60.0),
    service_s=st.floats(0.05, 5.0),
)
def test_an_obedient_client_that_was_refused_for_a_full_queue_gets_in(
    clients: int, length_max: int, replicas: int, concurrency: int, start_s: float, service_s: float
) -> None:
    """A burst at zero: all are served, and who comes back when told is refused once more at most."""
    world = World(
        queue=QueueSpec(length_max=length_max, wait_s_max=10_000.0),
        replicas=replicas,
        concurrency=concurrency,
        start_s=start_s,
        service_s=service_s,
    )
    for client in range(clients):
        world.at(0.0, "ask", client)
    world.run(start_s + clients * service_s * 2 + 600.0)
    assert len(world.served) == clients, "somebody never got in"
    assert all(len(told) <= 2 for told in world.refusals.values())
    again = [client for client, told in world.refusals.items() if len(told) == 2]
    assert len(again) <= len(world.refusals) / 2 + 1, "most get in the first time that they come back"
    told_s = [told[0] for told in world.refusals.values()]
    assert told_s == sorted(told_s), "who is refused later is told no earlier time"


@settings(max_examples=60, deadline=None)
@given(start_s=st.floats(3.0, 120.0), wait_s_max=st.floats(0.5, 20.0), service_s=st.floats(0.05, 1.0))
def test_an_obedient_client_whose_wait_was_too_short_gets_in_the_next_time(
    start_s: float, wait_s_max: float, service_s: float
) -> None:
    world = World(
        queue=QueueSpec(wait_s_max=wait_s_max), replicas=1, concurrency=1, start_s=start_s, service_s=service_s
    )
    world.at(0.0, "ask", 0)
    world.run(start_s * 3 + 60.0)
    assert list(world.served) == [0]
    assert len(world.refusals.get(0, [])) == (
        1 if wait_s_max + TICK_S < start_s else len(world.refusals.get(0, []))
    )


@settings(max_examples=150, deadline=None)
@given(known_s=st.floats(0.05, 50.0), ages_s=st.lists(st.floats(0.0, 200.0), min_size=1, max_size=8))
def test_nobody_is_told_less_than_those_that_run_have_left(known_s: float, ages_s: list[float]) -> None:
    """A request takes what was learned, but no less than half of those that run have taken already."""
    core, now_s = QueueCore(keys_required=False), 1_000.0
    replica = replica_route("rep-0", concurrency=len(ages_s), ready=1)
    queue = QueueSpec(length_max=1, wait_s_max=10_000.0)
    at_start = Now(now_s - 500.0, 0)
    core.set_routes([route(replica, queue=queue, service_s=known_s)], (), at_start)

    def ask(number: int, at_s: float) -> list[Effect]:
        now = Now(at_s, int(at_s * 1e9))
        request = Acquire(ticket=number, key_sha256=None, deployment=NAME, arrived_unix_ns=now.unix_ns)
        return core.arrive("w", request, now)

    oldest_first = sorted(ages_s, reverse=True)
    for number, age_s in enumerate(oldest_first):
        (granted,) = ask(number, now_s - age_s)
        assert isinstance(granted, Grant)
    ask(100, now_s)  # the one place in the line
    (refused,) = ask(101, now_s)
    assert isinstance(refused, Deny)
    told_s = refused.message.error.retry_after_s
    assert told_s is not None
    takes_s = max(known_s, oldest_first[len(oldest_first) // 2])
    assert told_s >= min(takes_s, RETRY_AFTER_S_MAX) - 1e-6

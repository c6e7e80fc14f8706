"""Calls between services in the queue: who waits for whom, and what is refused at once."""

import msgspec

from platform_helpers import replica_route, route
from snowdrop.domain.ids import DEFAULT_TENANT, DeploymentName, ReplicaId
from snowdrop.gateway.effects import Deny, Effect, Grant, Now
from snowdrop.gateway.lineage import CALL_DEPTH_MAX
from snowdrop.gateway.queue import QueueCore
from snowdrop.wire.control import DeploymentRoute
from snowdrop.wire.slots import Acquire, Granted

NOW = Now(0.0, 1_000)


def single(name: str, *, slots: int = 1, replicas_max: int = 1) -> DeploymentRoute:
    made = route(replica_route(f"rep-{name}", concurrency=slots), name=name)
    return msgspec.structs.replace(made, concurrency=slots, replicas_max=replicas_max)


class Bench:
    def __init__(self, *routes: DeploymentRoute) -> None:
        self.core = QueueCore(keys_required=False)
        self.core.set_routes(routes, (), NOW)
        self.tickets = 0

    def call(self, target: str, under: Granted | None = None, *, by: str | None = None) -> list[Effect]:
        """A request from outside, or the call of a service for its request with the lease `under`."""
        self.tickets += 1
        request = Acquire(
            ticket=self.tickets,
            key_sha256=None,
            deployment=DeploymentName(target),
            arrived_unix_ns=500,
            tenant=DEFAULT_TENANT,
            parent_lease=0 if under is None else under.lease,
            from_replica=ReplicaId(by) if by else None if under is None else under.replica,
        )
        return self.core.arrive("w", request, NOW)

    def granted(self, target: str, under: Granted | None = None) -> Granted:
        (effect,) = self.call(target, under)
        assert isinstance(effect, Grant)
        return effect.message


def waits(effects: list[Effect]) -> bool:
    return not any(isinstance(effect, Grant | Deny) for effect in effects)


def refusal(effects: list[Effect]) -> str:
    (effect,) = effects
    assert isinstance(effect, Deny)
    assert effect.message.error.kind == "call_deadlock"
    return effect.message.error.message


def test_a_waiting_parent_does_not_starve_its_child() -> None:
    bench = Bench(single("parent"), single("child"))
    parent = bench.granted("parent")
    other = bench.call("parent")
    assert waits(other)
    child = bench.granted("child", parent)
    assert waits(bench.call("child", parent))  # the second child waits for the first, which runs
    bench.core.release(child.lease, NOW)


def test_a_circle_of_full_services_is_refused_at_once() -> None:
    bench = Bench(single("a"), single("b"))
    one = bench.granted("a")
    two = bench.granted("b", one)
    assert "a -> b -> a" in refusal(bench.call("a", two))
    assert "a -> a" in refusal(bench.call("a", one))


def test_two_that_wait_for_each_other_crosswise_are_told() -> None:
    """No chain holds a name twice, and still neither could ever go on."""
    bench = Bench(single("a"), single("b"))
    one, two = bench.granted("a"), bench.granted("b")
    assert waits(bench.call("b", one))
    assert "would wait for itself" in refusal(bench.call("a", two))


def test_a_circle_waits_where_a_slot_can_come_free_or_be_added() -> None:
    bench = Bench(single("a", slots=2), single("b"))
    one = bench.granted("a")
    two = bench.granted("b", one)
    bench.granted("a")  # somebody who calls nobody, and ends some time
    assert waits(bench.call("a", two))
    growing = Bench(single("a", replicas_max=2), single("b"))
    assert waits(growing.call("a", growing.granted("b", growing.granted("a"))))


def test_what_waited_and_is_over_counts_no_more() -> None:
    bench = Bench(single("a"), single("b"))
    one, two = bench.granted("a"), bench.granted("b")
    assert waits(bench.call("b", one))
    bench.core.cancel("w", bench.tickets, NOW)
    assert waits(bench.call("a", two))


def test_a_lease_of_another_replica_or_of_nobody_counts_for_nothing() -> None:
    bench = Bench(single("a"), single("b"))
    one = bench.granted("a")
    assert waits(bench.call("a", one, by="rep-other"))
    bench.core.release(one.lease, NOW)
    assert waits(bench.call("a", one))


def test_calls_inside_of_each_other_have_a_bound() -> None:
    bench = Bench(single("a", slots=100))
    inner = bench.granted("a")
    for _ in range(CALL_DEPTH_MAX):
        inner = bench.granted("a", inner)
    assert "too many calls inside of each other" in refusal(bench.call("a", inner))


def test_requests_from_outside_are_never_called_a_deadlock() -> None:
    bench = Bench(single("a"), single("b"))
    one = bench.granted("a")
    bench.granted("b", one)
    assert waits(bench.call("a"))
    assert waits(bench.call("b"))

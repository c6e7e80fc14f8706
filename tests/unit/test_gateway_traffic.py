"""Traffic by revision in the queues: weights, named revisions, counters, and requests that are parked."""

from collections import Counter

import msgspec

from platform_helpers import KEY, NAME, replica_route, route
from snowdrop.domain.errors import ErrorBody
from snowdrop.domain.ids import RevisionId
from snowdrop.gateway.effects import Deny, Effect, Grant, Now
from snowdrop.gateway.queue import QueueCore
from snowdrop.policy.rollout import quantile_s
from snowdrop.wire.control import DeploymentLoad, DeploymentRoute, Parked, ReplicaRoute, RevisionWeight
from snowdrop.wire.slots import Acquire, Outcome

OLD, NEW = RevisionId("rev-1"), RevisionId("rev-2")
S = 1_000_000_000


class Bench:
    """A core, its clock, and the requests that it was sent."""

    def __init__(self, changed: DeploymentRoute) -> None:
        self.core = QueueCore(keys_required=False)
        self.now_s = 100.0
        self.tickets = 0
        self.core.set_routes([changed], [], self.now)

    @property
    def now(self) -> Now:
        return Now(self.now_s, int(self.now_s * S))

    def ask(self, revision: str = "") -> list[Effect]:
        self.tickets += 1
        asked = Acquire(
            ticket=self.tickets,
            key_sha256=None,
            deployment=NAME,
            arrived_unix_ns=self.now.unix_ns,
            revision=revision,
        )
        return self.core.arrive("w", asked, self.now)

    def change(self, changed: DeploymentRoute) -> list[Effect]:
        return self.core.change_route(KEY, changed, self.now)

    def load(self) -> DeploymentLoad:
        (load,) = self.core.loads(self.now)
        return load


def of(name: str, revision: RevisionId, concurrency: int = 1) -> ReplicaRoute:
    return msgspec.structs.replace(replica_route(name, concurrency=concurrency), revision=revision)


def shared(old: float, new: float, *replicas: ReplicaRoute, **more: object) -> DeploymentRoute:
    weights = (
        RevisionWeight(revision=OLD, role="stable", weight=old),
        RevisionWeight(revision=NEW, role="candidate", weight=new),
    )
    return route(*replicas, weights=weights, **more)


def granted(effects: list[Effect]) -> list[str]:
    return [effect.message.replica for effect in effects if isinstance(effect, Grant)]


def denied(effects: list[Effect]) -> list[ErrorBody]:
    return [effect.message.error for effect in effects if isinstance(effect, Deny)]


def test_requests_are_shared_out_by_weight() -> None:
    bench = Bench(shared(0.8, 0.2, of("a", OLD, 10_000), of("b", NEW, 10_000)))
    got = Counter(granted([effect for _ in range(100) for effect in bench.ask()]))
    assert got == {"a": 80, "b": 20}


def test_a_free_slot_is_used_whatever_the_weight_but_for_weight_zero() -> None:
    bench = Bench(shared(0.99, 0.01, of("a", OLD), of("b", NEW)))
    assert sorted(granted(bench.ask() + bench.ask())) == ["a", "b"]
    preview = Bench(shared(1.0, 0.0, of("a", OLD), of("b", NEW)))
    assert granted(preview.ask()) == ["a"]
    assert granted(preview.ask()) == []
    assert granted(preview.ask("candidate")) == ["b"]


def test_a_named_revision_alone_may_answer_and_others_are_not_held_up() -> None:
    bench = Bench(shared(1.0, 0.0, of("a", OLD)))
    assert granted(bench.ask("rev-2")) == []
    assert bench.load().pinned == {NEW: 1}
    assert granted(bench.ask()) == ["a"], "behind one that waits for another revision"
    assert granted(bench.ask("stable")) == []
    got = bench.change(shared(1.0, 0.0, of("a", OLD), of("b", NEW)))
    assert granted(got) == ["b"]
    lease = next(e.message.lease for e in got if isinstance(e, Grant))
    assert granted(bench.core.release(lease, bench.now)) == [], "the one that is left named the other"
    assert bench.load().pinned == {OLD: 1}


def test_a_revision_that_is_not_served_is_an_error_that_says_so() -> None:
    bench = Bench(route(of("a", OLD)))
    (error,) = denied(bench.ask("rev-9"))
    assert (error.kind, error.where) == ("not_found", "header snowdrop-revision")
    assert denied(bench.ask("candidate"))
    assert granted(bench.ask("stable")) == ["a"]


def test_who_waits_for_a_revision_whose_rollout_ends_is_told() -> None:
    bench = Bench(shared(1.0, 0.0, of("a", OLD)))
    bench.ask("candidate")
    (error,) = denied(bench.change(route(of("a", OLD))))
    assert "does not serve revision 'rev-2' any more" in error.message
    assert bench.load().queued == 0


def test_answers_are_counted_by_revision_and_clients_that_go_are_not() -> None:
    bench = Bench(shared(0.5, 0.5, of("a", OLD, 9), of("b", NEW, 9)))
    outcomes = [Outcome(False, 0.1), Outcome(True, 0.2), Outcome(True), None]
    for outcome in outcomes:
        (grant,) = [e for e in bench.ask("rev-2") if isinstance(e, Grant)]
        bench.core.release(grant.message.lease, bench.now, outcome)
    (load,) = bench.load().revisions
    assert (load.revision, load.done, load.failed, sum(load.latency)) == (NEW, 3, 2, 2)
    assert 0.1 <= quantile_s(load.latency, 0.5) <= 0.2
    bench.change(route(of("a", OLD)))
    assert bench.load().revisions == (), "of a revision that is gone"


def test_parked_requests_wait_their_time_and_learn_when_to_come_back() -> None:
    error = ErrorBody(kind="revision_failed", message="boom")
    parked = Parked(error=error, wait_s_max=60.0, next_try_unix_ns=190 * S)
    bench = Bench(route(start_s=5.0))
    bench.ask()
    bench.now_s = 110.0
    assert denied(bench.change(route(start_s=5.0, parked=parked))) == [], "refused at once"
    bench.now_s = 130.0
    bench.ask()
    bench.now_s = 169.0
    assert denied(bench.core.tick(bench.now)) == []
    bench.now_s = 170.0
    (refused,) = denied(bench.core.tick(bench.now))
    assert (refused.kind, refused.message, refused.retry_after_s) == ("revision_failed", "boom", 25.0)
    assert granted(bench.change(route(of("a", OLD), start_s=5.0))) == ["a"], "the one that still waited"


def test_what_recovers_in_time_serves_those_who_were_parked() -> None:
    parked = Parked(error=ErrorBody(kind="revision_failed", message="boom"), wait_s_max=10.0, next_try_unix_ns=0)
    bench = Bench(route(parked=parked))
    bench.ask()
    bench.now_s = 105.0
    bench.change(route())
    bench.now_s = 150.0
    assert denied(bench.core.tick(bench.now)) == [], "its own bound counts again"
    assert granted(bench.change(route(of("a", OLD)))) == ["a"]

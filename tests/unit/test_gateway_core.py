"""The queue core in single situations; the property test walks through all others."""

import pytest

from platform_helpers import KEY, NAME, replica_route, route
from snowdrop.domain.errors import RevisionFailedError
from snowdrop.domain.ids import DeploymentName, TenantId
from snowdrop.domain.receipt import Span
from snowdrop.domain.service import QueueSpec
from snowdrop.gateway.effects import DemandChanged, Deny, Effect, Grant, Idle, Now
from snowdrop.gateway.queue import PENALTY_S, QueueCore
from snowdrop.tenancy.keys import key_sha256
from snowdrop.wire.control import DeploymentRoute, KeyGrant
from snowdrop.wire.slots import Acquire, Granted


class Bench:
    """A core with one deployment and numbered requests."""

    def __init__(
        self, *routes: DeploymentRoute, keys_required: bool = False, keys: tuple[KeyGrant, ...] = ()
    ) -> None:
        self.core = QueueCore(keys_required=keys_required)
        self.now = Now(0.0, 1_000)
        self.tickets = 0
        if routes or keys:
            self.core.set_routes(routes, keys, self.now)

    def ask(self, *, name: str = NAME, secret: str | None = None, arrived: int = 500) -> list[Effect]:
        self.tickets += 1
        digest = key_sha256(secret) if secret else None
        request = Acquire(
            ticket=self.tickets, key_sha256=digest, deployment=DeploymentName(name), arrived_unix_ns=arrived
        )
        return self.core.arrive("w", request, self.now)


def granted(effects: list[Effect]) -> Granted:
    (effect,) = effects
    assert isinstance(effect, Grant)
    return effect.message


def kinds(effects: list[Effect]) -> list[str]:
    return [effect.message.error.kind for effect in effects if isinstance(effect, Deny)]


def test_before_control_has_spoken_nothing_is_called_unknown() -> None:
    assert kinds(Bench().ask()) == ["unavailable"]
    assert kinds(Bench(route(name="other")).ask()) == ["not_found"]


def test_the_queue_is_bounded_and_says_when_to_come_back() -> None:
    bench = Bench(route(queue=QueueSpec(length_max=2)))
    assert bench.ask() == bench.ask() == [DemandChanged(KEY)]
    (refused,) = bench.ask()
    assert isinstance(refused, Deny)
    assert refused.message.error.kind == "queue_full"
    assert refused.message.error.retry_after_s is not None
    assert refused.message.error.retry_after_s >= 1
    (load,) = bench.core.loads(bench.now)
    assert (load.queued, load.arrived, load.refused, load.peak) == (2, 3, 1, 2)


def test_waiting_ends_at_the_bound() -> None:
    bench = Bench(route(queue=QueueSpec(wait_s_max=5.0)))
    bench.ask()
    assert bench.core.tick(Now(4.9, 0)) == []
    (late,) = bench.core.tick(Now(5.0, 0))
    assert isinstance(late, Deny)
    assert late.message.error.kind == "waited_too_long"
    assert late.message.error.where == "queue.wait_s_max=5"
    assert not bench.core.busy


def test_a_crash_looping_revision_denies_those_who_wait_and_those_who_come() -> None:
    bench = Bench(route())
    bench.ask()
    bench.ask()
    refusal = RevisionFailedError("it does not start").body()
    effects = bench.core.change_route(KEY, route(refusal=refusal), bench.now)
    assert kinds(effects) == ["revision_failed"] * 2
    assert kinds(bench.ask()) == ["revision_failed"]
    bench.core.change_route(KEY, route(), bench.now)
    assert bench.ask() == [DemandChanged(KEY)]


def test_a_draining_replica_gets_nothing_and_is_called_idle_once() -> None:
    bench = Bench(route(replica_route(concurrency=2)))
    lease = granted(bench.ask()).lease
    draining = route(replica_route(accepting=False))
    assert bench.core.change_route(KEY, draining, bench.now) == []
    assert bench.ask() == [DemandChanged(KEY)]
    assert bench.core.release(lease, bench.now) == [Idle(replica_route().replica)]
    assert bench.core.change_route(KEY, draining, bench.now) == []
    # A control that was restarted has not heard it.
    assert bench.core.set_routes([draining], [], bench.now) == [Idle(replica_route().replica)]


def test_requests_at_a_replica_that_left_the_table_count_when_it_is_back() -> None:
    bench = Bench(route(replica_route(concurrency=1)))
    lease = granted(bench.ask()).lease
    bench.core.set_routes([], [], bench.now)
    bench.core.set_routes([route(replica_route(concurrency=1))], [], bench.now)
    assert bench.ask() == [DemandChanged(KEY)], "more than its concurrency"
    assert granted(bench.core.release(lease, bench.now)).ticket == 2


def test_a_replica_that_was_not_there_is_left_out_until_the_penalty_is_over() -> None:
    bench = Bench(route(replica_route(concurrency=1)))
    replica, effects = bench.core.unreachable(granted(bench.ask()).lease, bench.now)
    assert (replica, effects) == ("rep-1", [])
    assert bench.ask() == [DemandChanged(KEY)]
    assert bench.core.tick(Now(PENALTY_S / 2, 0)) == []
    assert granted(bench.core.tick(Now(PENALTY_S, 0))).replica == "rep-1"


def test_news_of_the_replica_end_its_penalty() -> None:
    bench = Bench(route(replica_route(concurrency=1)))
    bench.core.unreachable(granted(bench.ask()).lease, bench.now)
    bench.ask()
    unchanged = bench.core.change_route(KEY, route(replica_route(concurrency=1), starting=1), bench.now)
    assert unchanged == [], "news of others say nothing of this one"
    moved = route(replica_route(concurrency=1, socket_path="/run/new.sock"))
    assert granted(bench.core.change_route(KEY, moved, bench.now)).socket_path == "/run/new.sock"


def test_who_waited_for_the_start_gets_its_receipt_and_the_first_one_completes_it() -> None:
    spans = (Span(name="mount", start_unix_ns=600, end_unix_ns=700),)
    bench = Bench(route())
    bench.ask(arrived=500)
    bench.ask(arrived=550)
    up = route(replica_route(concurrency=3, ready=900, spans=spans))
    first, second = [e.message for e in bench.core.change_route(KEY, up, bench.now) if isinstance(e, Grant)]
    assert (first.receipt, first.spans) == ("rcp-1", spans)
    assert second.receipt == "rcp-1"
    warm = granted(bench.ask(arrived=950))
    assert (warm.receipt, warm.spans) == (None, ())


def test_a_removed_deployment_tells_those_who_wait() -> None:
    bench = Bench(route())
    bench.ask()
    assert kinds(bench.core.change_route(KEY, None, bench.now)) == ["not_found"]
    assert bench.core.change_route(KEY, None, bench.now) == []


def test_keys_choose_the_tenant_and_are_never_mixed() -> None:
    team = TenantId("team")
    grants = (KeyGrant(key_sha256=key_sha256("sd_team"), tenant=team),)
    bench = Bench(route(replica_route("rep-9"), tenant=team), keys_required=True, keys=grants)
    assert kinds(bench.ask()) == ["unauthorised"]
    assert kinds(bench.ask(secret="sd_wrong")) == ["unauthorised"]
    assert granted(bench.ask(secret="sd_team")).replica == "rep-9"
    bench.core.set_routes([route(replica_route("rep-9"), tenant=team)], (), bench.now)
    assert kinds(bench.ask(secret="sd_team")) == ["unauthorised"], "a revoked key still works"


@pytest.mark.parametrize("event", ["cancel", "worker_gone"])
def test_who_left_is_not_served(event: str) -> None:
    bench = Bench(route())
    bench.ask()
    if event == "cancel":
        assert bench.core.cancel("w", 1, bench.now) == []
    else:
        assert bench.core.worker_gone("w", bench.now) == []
    assert bench.core.change_route(KEY, route(replica_route()), bench.now) == []
    assert not bench.core.busy


def test_load_goes_to_the_emptier_replica() -> None:
    bench = Bench(route(replica_route("rep-1", concurrency=4), replica_route("rep-2", concurrency=2)))
    got = [granted(bench.ask()).replica for _ in range(6)]
    assert sorted(got) == ["rep-1"] * 4 + ["rep-2"] * 2
    assert set(got[:2]) == {"rep-1", "rep-2"}

"""The queue core in single situations; the property test walks through all others."""

from typing import Any

import pytest

from platform_helpers import KEY, NAME, replica_route, route
from snowdrop.domain.errors import RevisionFailedError
from snowdrop.domain.ids import DeploymentName, TenantId
from snowdrop.domain.receipt import Span
from snowdrop.domain.service import QueueSpec
from snowdrop.gateway.effects import DemandChanged, Deny, Effect, Grant, Idle, Now, Tell
from snowdrop.gateway.queue import PENALTY_S, QueueCore
from snowdrop.tenancy.keys import key_sha256
from snowdrop.wire.control import DeploymentRoute, KeyGrant
from snowdrop.wire.slots import Acquire, Granted, Look


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


class Asking:
    """Requests of several callers at one full deployment, and the order of their turns."""

    def __init__(self, queue: QueueSpec) -> None:
        self.core = QueueCore(keys_required=False)
        self.now = Now(0.0, 1_000)
        self.names: dict[int, str] = {}
        self.queue = queue
        self.core.set_routes([route(replica_route(concurrency=1), queue=queue)], (), self.now)
        self.lease = granted(self.ask("busy")).lease

    def ask(self, name: str, **more: Any) -> list[Effect]:
        ticket = len(self.names) + 1
        self.names[ticket] = name
        fields: dict[str, Any] = {"ticket": ticket, "key_sha256": None, "deployment": NAME, "arrived_unix_ns": 1}
        return self.core.arrive("w", Acquire(**fields | more), self.now)

    def later(self, seconds: float) -> None:
        self.now = Now(self.now.s + seconds, self.now.unix_ns + int(seconds * 1e9))

    def turns(self) -> list[str]:
        order: list[str] = []
        while grants := [e.message for e in self.core.release(self.lease, self.now) if isinstance(e, Grant)]:
            self.lease = grants[0].lease
            order.append(self.names[grants[0].ticket])
        return order


def test_fair_gives_each_caller_its_turn_however_many_requests_one_sends() -> None:
    asking = Asking(QueueSpec(order="fair"))
    for n in range(3):
        asking.ask(f"a{n}", key_sha256=None)
    asking.core.set_routes(
        [route(replica_route(concurrency=1), queue=asking.queue)],
        (KeyGrant(key_sha256="k", tenant=KEY[0]),),
        asking.now,
    )
    asking.ask("b0", key_sha256="k", label="is not looked at")
    asking.ask("b1", key_sha256="k")
    asking.ask("c0", tenant=KEY[0], label="tasks")
    assert asking.turns() == ["a0", "b0", "c0", "a1", "b1", "a2"]


def test_fair_by_caller_goes_by_what_the_header_says() -> None:
    asking = Asking(QueueSpec(order="fair", fair_by="caller"))
    for name in ("x0", "x1", "x2", "y0"):
        asking.ask(name, label=name[0])
    assert asking.turns() == ["x0", "y0", "x1", "x2"]


def test_a_priority_passes_those_who_came_a_little_earlier_within_what_is_allowed() -> None:
    asking = Asking(QueueSpec(priority_min=-1, priority_max=1, priority_lead_s=10.0))
    asking.ask("old")
    asking.later(11.0)
    asking.ask("plain")
    asking.ask("low", priority=-1)
    asking.later(5.0)
    asking.ask("high", priority=9)
    assert asking.turns() == ["old", "high", "plain", "low"]


def test_a_key_bounds_the_priority_of_its_requests() -> None:
    asking = Asking(QueueSpec(priority_min=-1, priority_max=2))
    asking.core.set_routes(
        [route(replica_route(concurrency=1), queue=asking.queue)],
        (KeyGrant(key_sha256="k", tenant=KEY[0], priority_max=-1),),
        asking.now,
    )
    asking.ask("bounded", key_sha256="k", priority=2)
    asking.ask("free", priority=0)
    assert asking.turns() == ["free", "bounded"]


def test_without_being_allowed_a_priority_changes_nothing() -> None:
    asking = Asking(QueueSpec())
    asking.ask("first")
    asking.ask("second", priority=9)
    assert asking.turns() == ["first", "second"]


def test_one_whose_replica_could_not_be_reached_keeps_its_place_also_in_a_full_queue() -> None:
    asking = Asking(QueueSpec(length_max=1, wait_s_max=30.0))
    asking.ask("waits")
    assert kinds(asking.ask("too many")) == ["queue_full"]
    asking.later(10.0)
    assert asking.ask("again", attempt=1) == [DemandChanged(KEY)]
    assert asking.turns() == ["again", "waits"]
    asking.lease = granted(asking.ask("busy")).lease
    asking.ask("again", attempt=1, arrived_unix_ns=asking.now.unix_ns - 20 * 10**9)
    asking.later(10.1)
    assert kinds(asking.core.tick(asking.now)) == ["waited_too_long"], "its wait goes on, it does not begin anew"


def test_other_rules_put_those_who_wait_in_order_anew() -> None:
    asking = Asking(QueueSpec())
    for name in ("x0", "x1", "y0"):
        asking.ask(name, label=name[0])
    fair = QueueSpec(order="fair", fair_by="caller")
    asking.core.change_route(KEY, route(replica_route(concurrency=1), queue=fair), asking.now)
    assert asking.turns() == ["x0", "y0", "x1"]


def test_a_caller_may_wait_less_than_the_deployment_lets_it_never_longer() -> None:
    asking = Asking(QueueSpec(wait_s_max=30.0))
    asking.ask("short", wait_s_max=5.0)
    asking.ask("long", wait_s_max=99.0)
    asking.later(5.0)
    (late,) = asking.core.tick(asking.now)
    assert isinstance(late, Deny)
    assert asking.names[late.message.ticket] == "short"
    assert late.message.error.where == "the caller's own bound of 5 s"
    asking.later(25.0)
    (late,) = asking.core.tick(asking.now)
    assert isinstance(late, Deny)
    assert late.message.error.where == "queue.wait_s_max=30"


def test_what_a_request_waited_for_is_kept_until_control_is_told() -> None:
    bench = Bench(route(starting=1, start_s=4.0, queue=QueueSpec(length_max=1)))
    bench.ask()
    bench.ask()
    bench.now = Now(3.0, 1_000 + 3 * 10**9)
    bench.core.change_route(KEY, route(replica_route(ready=3 * 10**9)), bench.now)
    refused, granted_ = bench.core.waits.take()
    assert (refused.outcome, refused.error, refused.waited_s) == ("refused", "queue_full", 5e-7)
    assert (granted_.outcome, granted_.replica, granted_.receipt) == ("granted", "rep-1", "rcp-1")
    assert granted_.reason == "no replica was ready, 1 starting (phase activate)"
    assert granted_.waited_s == 3.0
    assert not bench.core.waits


def test_sums_of_time_under_lease_are_told_and_return_to_nothing() -> None:
    bench = Bench(route(replica_route(concurrency=3)))
    leases = [granted(bench.ask()).lease for _ in range(3)]
    bench.now = Now(2.0, 1_000)
    bench.core.release(leases[0], bench.now)
    bench.core.unreachable(leases[1], bench.now)
    (load,) = bench.core.loads(Now(3.0, 1_000))
    assert (load.done, load.slot_s, load.running_s) == (1, 2.0, 3.0)
    bench.core.worker_gone("w", bench.now)
    (load,) = bench.core.loads(Now(4.0, 1_000))
    assert (load.done, load.running_s) == (1, 0.0), "what was cut off teaches nothing of how long a request takes"


def test_a_deployment_that_was_woken_counts_as_asked_until_a_replica_is_ready_or_refuses() -> None:
    def look(bench: Bench, *, activate: bool) -> list[Effect]:
        return bench.core.look(
            "w", Look(ticket=99, key_sha256=None, deployment=NAME, activate=activate), bench.now
        )

    bench = Bench(route(queue=QueueSpec(wait_s_max=50.0)))
    (told,) = look(bench, activate=False)
    assert isinstance(told, Tell)
    assert look(bench, activate=True)[0] == DemandChanged(KEY)
    assert bench.core.loads(bench.now)[0].queued == 1
    assert bench.core.worth_reporting, "a control that is restarted hears of it, too"
    bench.core.tick(Now(50.0, 0))
    assert bench.core.loads(Now(50.0, 0))[0].queued == 0, "it is bounded as a wait is"
    look(bench, activate=True)
    bench.core.change_route(KEY, route(replica_route()), bench.now)
    assert bench.core.loads(bench.now)[0].queued == 0
    look(bench, activate=True)
    assert bench.core.loads(bench.now)[0].peak == 1, "it counts as use of a ready one"

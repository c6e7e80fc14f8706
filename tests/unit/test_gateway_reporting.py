"""When a gateway tells control its load: every change, to its end, and nothing while nothing happens."""

from __future__ import annotations

from platform_helpers import replica_route, route
from snowdrop.domain.ids import DeploymentName
from snowdrop.gateway.effects import Grant, Now
from snowdrop.gateway.owner import Owner
from snowdrop.gateway.queue import QueueCore
from snowdrop.wire.slots import Acquire

NOW = Now(0.0, 1_000)


def ask(core: QueueCore, ticket: int) -> int | None:
    """The lease of a request, or None if it waits."""
    name = DeploymentName("embed")
    effects = core.arrive("w", Acquire(ticket=ticket, key_sha256=None, deployment=name, arrived_unix_ns=1), NOW)
    return effects[0].message.lease if isinstance(effects[0], Grant) else None


def make(*replicas: str) -> QueueCore:
    core = QueueCore(keys_required=False)
    core.set_routes([route(*(replica_route(name) for name in replicas))], (), NOW)
    return core


def test_nothing_is_worth_reporting_at_rest() -> None:
    assert not make("rep-1").worth_reporting


def test_a_request_between_two_reports_counts_and_so_does_its_end() -> None:
    """Otherwise a service of quick requests would look idle and be scaled to zero while it is used."""
    core = make("rep-1")
    lease = ask(core, 1)
    assert lease is not None
    core.release(lease, NOW)
    assert core.worth_reporting
    (load,) = core.loads(NOW)
    assert (load.in_flight, load.queued, load.peak) == (0, 0, 1)
    assert not core.worth_reporting


def test_a_wait_that_was_reported_is_taken_back() -> None:
    """A start quicker than the report's period must not leave one request waiting for ever in control's eyes."""
    core = make()
    assert ask(core, 1) is None
    assert core.loads(NOW)[0].queued == 1
    core.cancel("w", 1, NOW)
    assert core.worth_reporting
    assert core.loads(NOW)[0].queued == 0
    (gone,) = core.waits.take()
    assert gone.outcome == "gone"
    assert not core.worth_reporting


def test_what_is_in_flight_is_told_by_replica() -> None:
    core = make("rep-1", "rep-2")
    for ticket in range(3):
        ask(core, ticket)
    (load,) = core.loads(NOW)
    assert sorted(load.busy.values()) == [1, 2]


class Uplink:
    """Control's end of the link: how often it was told to expect the load."""

    def __init__(self) -> None:
        self.loads = 0

    def send_soon(self, message: object) -> None: ...

    def load_changed(self) -> None:
        self.loads += 1


def test_a_control_that_comes_back_hears_of_those_who_wait() -> None:
    """The request came while nobody listened: without being told again control would never start anything."""
    core = make()
    owner = Owner(core, "gw")
    owner.attach("w", lambda _message: None)
    owner.arrive("w", Acquire(ticket=1, key_sha256=None, deployment=DeploymentName("embed"), arrived_unix_ns=1))
    uplink = Uplink()
    owner.connected(uplink)
    assert uplink.loads == 1
    assert owner.load_report().loads[0].queued == 1


def test_who_waits_is_reported_again_and_again() -> None:
    """A report that was lost, or that control could not act on then, is not the last word."""
    core = make()
    ask(core, 1)
    for _ in range(3):
        assert core.worth_reporting
        assert core.loads(NOW)[0].queued == 1


def test_waits_ride_on_reports_a_bounded_number_at_a_time_each_once() -> None:
    core = make()
    for ticket in range(1, 251):
        ask(core, ticket)
        core.cancel("w", ticket, NOW)
    owner = Owner(core, "gw")
    told = [owner.load_report().waits for _ in range(4)]
    assert [len(waits) for waits in told] == [100, 100, 50, 0]
    assert {wait.outcome for waits in told for wait in waits} == {"gone"}

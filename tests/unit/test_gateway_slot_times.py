"""What control hears of how long requests hold their slots."""

import msgspec

from platform_helpers import replica_route, route
from snowdrop.domain.ids import DeploymentName
from snowdrop.domain.scale import Scale
from snowdrop.gateway.effects import Now
from snowdrop.gateway.queue import QueueCore
from snowdrop.gateway.slottimes import ODD_S_MIN, SlotTimes
from snowdrop.policy.autoscale import AutoscaleInput, AutoscaleState, decide
from snowdrop.policy.autoscale.learned import Learned, note_done
from snowdrop.wire.slots import Acquire


def test_one_that_stays_for_long_is_not_the_rule_and_many_are() -> None:
    times = SlotTimes()
    times.lent(("w", 1), 0.0)
    for number in (2, 3, 4):
        times.lent(("w", number), 600.0 - number * 0.01)
    assert times.running_s(600.0) < 0.2
    times.lent(("w", 5), 0.0)
    times.back(("w", 4), 600.0, done=False, usual_s=0.1)
    times.back(("w", 3), 600.0, done=False, usual_s=0.1)
    assert times.running_s(600.0) < 0.1, "half of them are short"
    times.back(("w", 2), 600.0, done=False, usual_s=0.1)
    assert times.running_s(600.0) == 1_200.0
    assert (times.done, times.slot_s) == (0, 0.0)


def test_an_odd_one_that_ends_leaves_what_was_learned_nearly_as_it_was() -> None:
    times = SlotTimes()
    times.lent(("w", 1), 0.0)
    times.back(("w", 1), 3_600.0, done=True, usual_s=0.1)
    assert times.slot_s == ODD_S_MIN
    learned = note_done(Learned(done=280.0, slot_s=28.0), done=times.done, slot_s=times.slot_s)
    assert learned.service_s() < 0.15


def test_what_has_become_slow_for_good_is_learned_in_a_few_steps() -> None:
    learned, count = Learned(done=280.0, slot_s=28.0), 0
    while learned.service_s() < 300.0:
        times = SlotTimes()
        times.lent(("w", 1), 0.0)
        times.back(("w", 1), 600.0, done=True, usual_s=learned.service_s())
        learned = note_done(learned, done=1, slot_s=times.slot_s)
        count += 1
    assert count < 300


def test_an_open_websocket_beside_short_requests_starts_no_replicas() -> None:
    core = QueueCore(keys_required=False)
    core.set_routes([route(replica_route(concurrency=4), service_s=0.1)], (), Now(0.0, 1))
    name = DeploymentName("embed")

    def ask(ticket: int, now_s: float) -> None:
        request = Acquire(ticket=ticket, key_sha256=None, deployment=name, arrived_unix_ns=1)
        core.arrive("w", request, Now(now_s, 1))

    ask(1, 0.0)
    for ticket in range(2, 11):
        ask(ticket, 600.0)
    (told,) = core.loads(Now(600.05, 1))
    assert (told.in_flight, told.queued) == (4, 6)
    learned = Learned(starts_s=(2.0,), done=280.0, slot_s=28.0)
    seen = AutoscaleInput(
        in_flight=told.in_flight,
        queued=told.queued,
        peak=told.peak,
        ready=1,
        starting=0,
        concurrency=4,
        scale=Scale(max=8),
        start_s=2.0,
        service_s=learned.service_s(in_flight=told.in_flight, running_s=told.running_s),
    )
    state, _first = decide(AutoscaleState(), msgspec.structs.replace(seen, in_flight=1, queued=0, peak=1), 0.0)
    _state, decision = decide(state, seen, 1.0)
    assert decision.desired == 1, decision.reason

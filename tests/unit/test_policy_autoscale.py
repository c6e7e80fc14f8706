"""What the autoscaler decides in the situations that its docs describe."""

from platform_helpers import scale
from snowdrop.domain.service import Scale
from snowdrop.policy.autoscale import AutoscaleDecision, AutoscaleInput, AutoscaleState, decide, idle_at_s

SCALE = scale(max=100, idle_s=30.0)


class Run:
    """Calls the decider with what is seen at each time."""

    def __init__(self, scale: Scale = SCALE, concurrency: int = 10) -> None:
        self.state = AutoscaleState()
        self.scale = scale
        self.concurrency = concurrency

    def at(
        self,
        now_s: float,
        load: int,
        *,
        ready: int = 0,
        starting: int = 0,
        peak: int | None = None,
        queued: int = 0,
        **learned: float,
    ) -> AutoscaleDecision:
        seen = AutoscaleInput(
            in_flight=load,
            queued=queued,
            peak=load + queued if peak is None else peak,
            ready=ready,
            starting=starting,
            concurrency=self.concurrency,
            scale=self.scale,
            **learned,
        )
        self.state, decision = decide(self.state, seen, now_s)
        return decision


def test_without_a_request_there_is_nothing() -> None:
    assert Run().at(0, 0).desired == 0
    assert Run(scale(min=2)).at(0, 0).desired == 2


def test_from_zero_one_request_is_enough() -> None:
    decision = Run().at(100, 0, queued=1)
    assert decision.desired == 1
    assert "from zero" in decision.reason or "1.0 in flight" in decision.reason


def test_from_zero_a_burst_starts_the_number_it_needs_at_once() -> None:
    assert Run(concurrency=10).at(0, 0, queued=45).desired >= 5
    assert Run(concurrency=1).at(0, 0, queued=7).desired >= 7
    assert Run(scale(max=4), concurrency=10).at(0, 0, queued=1_000).desired == 4


def test_a_burst_after_a_long_quiet_is_not_averaged_away_while_nothing_is_ready() -> None:
    run = Run()
    for now_s in range(0, 60, 5):
        run.at(now_s, 0)
    assert run.at(60, 0, queued=45).desired >= 5


def test_replicas_that_are_starting_are_not_asked_for_again() -> None:
    run = Run()
    wanted = [run.at(float(now_s), 0, queued=45, starting=5 if now_s else 0).desired for now_s in range(20)]
    assert max(wanted) == min(wanted), "the wait for a slow load bred replicas"


def test_a_peak_between_two_looks_counts() -> None:
    run = Run()
    run.at(0, 0)
    assert run.at(1, 0, peak=25).desired >= 3


def test_the_last_replica_stays_for_idle_s_and_then_goes_to_min() -> None:
    run = Run(scale(max=4, idle_s=30.0, stable_window_s=10.0, panic_window_s=1.0))
    run.at(0, 1, ready=1)
    run.at(1, 0, peak=1, ready=1)  # it ended between the two looks
    for now_s in range(2, 31):
        assert run.at(float(now_s), 0, ready=1).desired == 1, now_s
    assert idle_at_s(run.state, run.scale.idle_s) == 31.0
    after = run.at(31.0, 0, ready=1)
    assert after.desired == 0
    assert "idle" in after.reason


def test_idle_time_starts_again_with_each_request() -> None:
    run = Run(scale(idle_s=30.0))
    run.at(0, 1, ready=1)
    run.at(1, 0, ready=1)
    run.at(25, 0, ready=1, peak=1)
    assert run.at(40, 0, ready=1).desired == 1
    assert run.at(55, 0, ready=1).desired == 0


def test_replicas_found_after_a_restart_of_control_count_as_just_used() -> None:
    run = Run(scale(idle_s=30.0))
    assert run.at(500, 0, ready=1).desired == 1
    assert run.at(529, 0, ready=1).desired == 1
    assert run.at(530, 0, ready=1).desired == 0


def test_a_busy_deployment_keeps_a_replica_whatever_its_average() -> None:
    run = Run(scale(target=1.0), concurrency=1_000)
    run.at(0, 0, ready=1)
    assert run.at(100, 1, ready=1).desired == 1
    assert idle_at_s(run.state, run.scale.idle_s) is None


def test_idle_with_min_falls_to_min() -> None:
    run = Run(scale(min=2, max=8, idle_s=1.0, stable_window_s=1.0, panic_window_s=1.0))
    run.at(0, 60, ready=4)
    run.at(1, 60, ready=4)
    run.at(2, 0, ready=4)
    assert run.at(50, 0, ready=4).desired == 2


def test_panic_raises_at_once_and_does_not_lower_until_it_is_over() -> None:
    run = Run(Scale(max=100, target=1.0, stable_window_s=60.0, panic_window_s=6.0))
    for now_s in range(60):
        run.at(float(now_s), 10, ready=1)
    surge = [run.at(60.0 + i, 100, ready=1) for i in range(7)]
    assert surge[-1].panicking
    assert surge[-1].desired >= 8, "the stable window alone would ask for two"
    highest = surge[-1].desired
    for i in range(50):
        after = run.at(67.0 + i, 0 if i > 2 else 20, ready=highest)
        assert after.desired >= highest, i
    assert run.at(140.0, 0, ready=highest).panicking is False


def test_the_reason_names_the_bound_that_was_met() -> None:
    assert "max=3" in Run(scale(max=3)).at(0, 0, queued=500).reason
    assert "min=1" in Run(scale(min=1)).at(0, 0).reason


def test_load_that_fits_exactly_gets_no_replica_more() -> None:
    run = Run(Scale(max=100, target=0.7), concurrency=10)
    assert {run.at(i * 0.1, 14, ready=2).desired for i in range(1_200)} == {2}


def test_buckets_stay_bounded_however_often_it_is_called() -> None:
    run = Run(scale(stable_window_s=3600.0, panic_window_s=0.1))
    for i in range(4_300):
        run.at(i * 0.9, 3, ready=1)
    assert len(run.state.windows.buckets) <= 4_000


def test_a_queue_that_does_not_empty_gets_another_replica_whatever_was_predicted() -> None:
    run = Run(scale(max=4, target=1.0), concurrency=2)
    wrong = {"start_s": 2.0, "service_s": 0.01}
    assert run.at(0.0, 2, ready=1, queued=3, **wrong).desired == 1, "three are taken long before another is ready"
    assert run.at(4.0, 2, ready=1, queued=3, **wrong).desired == 1
    assert run.at(5.5, 2, ready=1, queued=3, **wrong).desired == 2
    assert run.at(6.0, 2, ready=1, starting=1, queued=3, **wrong).desired == 2, "one at a time"
    assert run.at(8.0, 4, ready=2, queued=1, **wrong).desired == 3
    run.at(9.0, 4, ready=2, queued=0, **wrong)
    assert run.at(10.0, 4, ready=2, queued=1, **wrong).desired <= 3, "it was empty meanwhile"


def test_what_will_have_drained_when_a_replica_could_be_ready_starts_none() -> None:
    run = Run(scale(max=10, target=1.0), concurrency=4)
    known = {"start_s": 30.0, "service_s": 0.2}
    assert run.at(0.0, 4, ready=1, queued=400, **known).desired == 1, "600 are taken in 30 s"
    assert run.at(0.1, 4, ready=1, queued=4_000, **known).desired > 1


def test_one_scales_down_only_when_both_windows_agree() -> None:
    run = Run(Scale(max=10, target=1.0, stable_window_s=60.0, panic_window_s=6.0, idle_s=300.0), concurrency=4)
    for second in range(120):
        run.at(float(second), 0, ready=4, peak=1)
    busy = [run.at(120.0 + second, 16, ready=4) for second in range(12)]
    assert {decision.desired for decision in busy[7:]} == {4}, "the long window alone would ask for fewer"


def test_after_a_restart_of_control_no_replica_goes_before_a_whole_window_was_seen() -> None:
    run = Run(Scale(max=10, target=1.0, stable_window_s=60.0, panic_window_s=6.0, idle_s=300.0), concurrency=4)
    decisions = [run.at(500.0 + second, 2 if second % 10 else 30, ready=8).desired for second in range(60)]
    assert min(decisions) == 8
    assert [run.at(560.0 + second, 2, ready=8).desired for second in range(120)][-1] == 1


def test_other_windows_of_a_new_revision_begin_anew() -> None:
    run = Run(Scale(max=50, target=1.0, stable_window_s=20.0, panic_window_s=2.0, idle_s=900.0), concurrency=1)
    for tick in range(200):
        run.at(1_000.0 + tick * 0.5, 20, ready=20)
    run.scale = Scale(max=50, target=1.0, stable_window_s=600.0, panic_window_s=60.0, idle_s=900.0)
    for tick in range(2_000):
        last = run.at(1_100.0 + tick * 0.5, 4, ready=20)
    assert last.stable_load == 4.0, "buckets of the old width were counted with the new ones"
    assert last.desired <= 5

"""Rollouts step by step, on values alone."""

import msgspec
import pytest

from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.ids import RevisionId
from snowdrop.domain.rollout import Rollout, RolloutPhase, RolloutSpec, RolloutStep, parse_steps
from snowdrop.policy.rollout import (
    RolloutInput,
    Sample,
    Shares,
    decide,
    judge,
    latency_bucket,
    next_look_unix_ns,
    promoted,
    shares,
)

S = 1_000_000_000
OLD, NEW = RevisionId("rev-1"), RevisionId("rev-2")
CANARY = (RolloutStep(weight=0.1, s=60, requests_min=10), RolloutStep(weight=0.5, s=60))


def rollout(**fields: object) -> Rollout:
    spec = RolloutSpec(**fields)  # type: ignore[arg-type]
    return Rollout(candidate=NEW, stable=OLD, spec=spec, began_unix_ns=0)


def seen(now_s: float, **fields: object) -> RolloutInput:
    given = {"desired": 2, "stable_living": 2, "candidate_ready": 0, "candidate_starting": 0} | fields
    return RolloutInput(now_unix_ns=int(now_s * S), **given)  # type: ignore[arg-type]


def sample(done: int, failed: int = 0, *, latency_s: float = 0.1) -> Sample:
    buckets = [0] * 40
    buckets[latency_bucket(latency_s)] = done
    return Sample(done=done, failed=failed, latency=tuple(buckets))


def test_all_at_once_waits_for_as_many_ready_ones_as_are_needed() -> None:
    active = rollout()
    assert (decide(active, seen(1, candidate_starting=1)).phase, active.weight) == (RolloutPhase.STARTING, 0.0)
    assert shares(active, seen(1)) == Shares(2, 1)
    preparing = decide(active, seen(2, candidate_ready=1))
    assert (preparing.phase, preparing.weight) == (RolloutPhase.SHIFTING, 0.0)
    assert shares(preparing, seen(2, candidate_ready=1)) == Shares(2, 2)
    shifted = decide(preparing, seen(3, candidate_ready=2))
    assert (shifted.phase, shifted.weight) == (RolloutPhase.PROVING, 1.0)
    assert next_look_unix_ns(shifted) == 63 * S
    assert decide(shifted, seen(62, candidate_ready=2)) == shifted
    done = decide(shifted, seen(63, candidate_ready=2))
    assert (done.phase, done.ended_unix_ns) == (RolloutPhase.DONE, 63 * S)


def test_without_room_for_all_one_ready_replica_is_enough() -> None:
    active = decide(rollout(), seen(1, candidate_ready=1))
    assert decide(active, seen(2, candidate_ready=1, no_room=True)).phase is RolloutPhase.PROVING


def test_canary_steps_take_their_time_and_their_answers() -> None:
    active = decide(rollout(steps=CANARY), seen(1, candidate_ready=1))
    assert (active.step, active.weight) == (0, 0.1)
    assert decide(active, seen(60, candidate_ready=1, new=sample(10))) == active, "not long enough"
    assert decide(active, seen(90, candidate_ready=1, new=sample(9))) == active, "not enough answers"
    second = decide(active, seen(90, candidate_ready=1, new=sample(10)))
    assert (second.step, second.weight) == (1, 0.5)
    assert shares(second, seen(90, candidate_ready=1)) == Shares(1, 1)
    last = decide(second, seen(150, candidate_ready=1))
    assert (last.step, last.weight) == (2, 0.5)
    assert decide(last, seen(151, candidate_ready=2)).weight == 1.0


def test_a_revision_that_does_not_start_never_gets_traffic() -> None:
    active = decide(rollout(failures_max=2), seen(1, failures=1, failure_reason="boom"))
    assert (active.phase, active.ended_unix_ns) == (RolloutPhase.STARTING, 0)
    back = decide(active, seen(2, failures=2, failure_reason="boom"))
    assert (back.phase, back.weight) == (RolloutPhase.ROLLED_BACK, 0.0)
    assert back.reason == "2 starts of the new revision failed, the last with: boom"


def test_one_that_is_not_ready_in_time_goes_back_and_says_that_there_was_no_room() -> None:
    idle = decide(rollout(start_s_max=10.0, steps=CANARY), seen(1, desired=0, stable_living=0))
    wanted = decide(idle, seen(5_000))
    assert (wanted.phase, wanted.step_unix_ns) == (RolloutPhase.STARTING, 5_000 * S), "nobody needed it before"
    assert decide(wanted, seen(5_010, candidate_starting=1)) == wanted
    assert decide(wanted, seen(5_011, desired=0)).step_unix_ns == 0
    back = decide(wanted, seen(5_011, candidate_starting=1, no_room=True))
    assert back.phase is RolloutPhase.ROLLED_BACK
    assert back.reason.endswith("start_s_max=10; there was no room for it")


def test_errors_of_the_new_revision_send_it_back() -> None:
    active = decide(rollout(steps=CANARY), seen(1, candidate_ready=1))
    old = sample(1_000, 5)
    assert decide(active, seen(2, candidate_ready=1, new=sample(19, 19), old=old)) == active, "too few"
    back = decide(active, seen(2, candidate_ready=1, new=sample(20, 6), old=old))
    assert back.phase is RolloutPhase.ROLLED_BACK
    assert back.reason == "6 of 20 answers of the new revision failed (30.0%), of the old one 0.5%"


def test_a_service_that_failed_as_often_before_is_not_sent_back() -> None:
    assert judge(sample(100, 30), sample(100, 30), RolloutSpec()) is None


def test_slow_answers_send_it_back_unless_latency_is_not_watched() -> None:
    spec = RolloutSpec(latency_ratio_max=3.0)
    old, slow = sample(100, latency_s=0.1), sample(100, latency_s=1.0)
    reason = judge(slow, old, spec)
    assert reason is not None
    assert reason.startswith("100 of 100 answers of the new revision took longer than")
    assert judge(sample(100, latency_s=0.2), old, spec) is None
    assert judge(slow, old, RolloutSpec(latency_ratio_max=0.0)) is None
    assert judge(slow, sample(5, latency_s=0.1), spec) is None, "nothing is known of the old one"


def test_watching_goes_on_after_the_shift_and_keeps_the_old_one_warm() -> None:
    active = decide(rollout(keep_warm=1), seen(1, candidate_ready=1))
    shifted = decide(active, seen(2, candidate_ready=2))
    assert shares(shifted, seen(3, candidate_ready=2)) == Shares(1, 2)
    back = decide(shifted, seen(3, candidate_ready=2, new=sample(50, 50), old=sample(50)))
    assert back.phase is RolloutPhase.ROLLED_BACK


def test_where_nothing_runs_the_next_start_is_new_and_its_time_begins_when_it_is_ready() -> None:
    shifted = decide(rollout(), seen(1, desired=0, stable_living=0))
    assert (shifted.phase, shifted.step_unix_ns) == (RolloutPhase.PROVING, 0)
    assert decide(shifted, seen(1_000, desired=0, stable_living=0)) == shifted
    counting = decide(shifted, seen(1_000, stable_living=0, candidate_ready=1))
    assert counting.step_unix_ns == 1_000 * S
    failed = decide(shifted, seen(1_000, stable_living=0, failures=2, failure_reason="boom"))
    assert failed.phase is RolloutPhase.ROLLED_BACK


def test_a_paused_rollout_takes_no_step_but_still_goes_back() -> None:
    active = msgspec.structs.replace(decide(rollout(steps=CANARY), seen(1, candidate_ready=1)), paused=True)
    assert decide(active, seen(900, candidate_ready=1, new=sample(50))) == active
    bad = decide(active, seen(900, candidate_ready=1, new=sample(50, 50), old=sample(50)))
    assert bad.phase is RolloutPhase.ROLLED_BACK


def test_a_preview_gets_nothing_unnamed_until_it_is_promoted() -> None:
    active = decide(rollout(steps=(RolloutStep(weight=0.0, hold=True),)), seen(1, candidate_ready=1))
    assert active.weight == 0.0
    assert decide(active, seen(10**6, candidate_ready=1, new=sample(999))) == active
    assert shares(active, seen(2, desired=0), pinned=1).candidate == 1
    on = promoted(active, 5)
    assert decide(on, seen(10**6, candidate_ready=2)).weight == 1.0


def test_steps_are_written_short() -> None:
    assert parse_steps("5%:10m, 25%:90:500,50%:hold") == (
        RolloutStep(weight=0.05, s=600.0),
        RolloutStep(weight=0.25, s=90.0, requests_min=500),
        RolloutStep(weight=0.5, s=0.0, hold=True),
    )
    for wrong in ("", "x", "5%:10d", "100%", "0%", "50%,5%"):
        with pytest.raises(InvalidInputError):
            RolloutSpec(steps=parse_steps(wrong))

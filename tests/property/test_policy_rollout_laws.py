"""Laws of rollouts over random histories."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from snowdrop.domain.ids import RevisionId
from snowdrop.domain.rollout import Rollout, RolloutPhase, RolloutSpec, RolloutStep
from snowdrop.policy.rollout import (
    LATENCY_BUCKETS,
    RolloutInput,
    Sample,
    bucket_floor_s,
    decide,
    judge,
    latency_bucket,
    lower_bound,
    quantile_s,
    shares,
)

counts = st.integers(0, 300)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    latency = tuple(draw(st.lists(st.integers(0, 30), max_size=LATENCY_BUCKETS)))
    done = sum(latency)
    return Sample(done=done, failed=draw(st.integers(0, done)), latency=latency)


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    weights = sorted(draw(st.lists(st.floats(0.01, 0.99), max_size=4)))
    steps = tuple(
        RolloutStep(weight=w, s=draw(st.floats(0, 100)), requests_min=draw(st.integers(0, 20))) for w in weights
    )
    spec = RolloutSpec(
        steps=steps,
        samples_min=draw(st.integers(1, 50)),
        keep_warm=draw(st.integers(0, 3)),
        prove_s=draw(st.floats(0, 100)),
    )
    return Rollout(candidate=RevisionId("b"), stable=RevisionId("a"), spec=spec, began_unix_ns=0)


@st.composite
def histories(draw: st.DrawFn) -> list[RolloutInput]:
    now, found = 0, []
    for _ in range(draw(st.integers(1, 15))):
        now += draw(st.integers(1, 100 * 10**9))
        found.append(
            RolloutInput(
                now_unix_ns=now,
                desired=draw(st.integers(0, 6)),
                stable_living=draw(st.integers(0, 6)),
                candidate_ready=draw(st.integers(0, 6)),
                candidate_starting=draw(st.integers(0, 3)),
                failures=draw(st.integers(0, 3)),
                no_room=draw(st.booleans()),
                new=draw(samples()),
                old=draw(samples()),
            )
        )
    return found


@given(rollouts(), histories())
def test_traffic_only_grows_until_it_goes_back_and_an_end_is_an_end(
    active: Rollout, history: list[RolloutInput]
) -> None:
    for seen in history:
        following = decide(active, seen)
        if active.ended_unix_ns:
            assert following == active
        elif following.phase is not RolloutPhase.ROLLED_BACK:
            assert active.weight <= following.weight <= 1.0
            assert following.step >= active.step or following.phase is RolloutPhase.PROVING
        assert following.reason or following == active
        active = following


@given(rollouts(), histories())
def test_the_old_revision_keeps_its_traffic_while_the_new_one_was_never_ready(
    active: Rollout, history: list[RolloutInput]
) -> None:
    for seen in history:
        blind = msgspec.structs.replace(seen, candidate_ready=0, desired=max(1, seen.desired))
        active = decide(active, blind)
        assert active.weight == 0.0
        assert shares(active, blind).stable == blind.desired or active.ended_unix_ns


@given(rollouts(), histories())
def test_there_are_never_fewer_replicas_than_desired(active: Rollout, history: list[RolloutInput]) -> None:
    for seen in history:
        active = decide(active, seen)
        if active.ended_unix_ns:
            return
        parts = shares(active, seen)
        assert parts.stable + parts.candidate >= seen.desired
        assert parts.candidate <= max(1, seen.desired)
        if seen.desired == 0 and active.phase != RolloutPhase.PROVING:
            assert parts.stable == parts.candidate == 0


@given(samples(), samples(), st.integers(1, 100))
def test_nothing_is_judged_before_there_are_enough_answers(new: Sample, old: Sample, least: int) -> None:
    if new.done < least:
        assert judge(new, old, RolloutSpec(samples_min=least)) is None


@given(samples())
def test_a_revision_that_does_as_the_old_one_is_never_sent_back(old: Sample) -> None:
    assert judge(old, old, RolloutSpec(samples_min=1)) is None


@given(counts, counts)
def test_more_failures_are_never_judged_better(done: int, failed: int) -> None:
    failed = min(failed, done)
    spec = RolloutSpec(samples_min=1)
    old = Sample(done=100, failed=1)
    if failed < done and judge(Sample(done=done, failed=failed), old, spec):
        assert judge(Sample(done=done, failed=failed + 1), old, spec)


@given(st.integers(20, 500))
def test_one_that_always_fails_is_sent_back(done: int) -> None:
    assert judge(Sample(done=done, failed=done), Sample(done=100, failed=1), RolloutSpec())


@given(counts, counts)
def test_the_lower_bound_lies_between_nothing_and_the_share(hits: int, total: int) -> None:
    hits = min(hits, total)
    assert 0.0 <= lower_bound(hits, total) <= (hits / total if total else 0.0) + 1e-12


@given(st.floats(0, 1_000))
def test_a_latency_lies_within_its_bucket(latency_s: float) -> None:
    index = latency_bucket(latency_s)
    assert bucket_floor_s(index) <= latency_s * (1 + 1e-6)
    one = tuple(1 if each == index else 0 for each in range(LATENCY_BUCKETS))
    assert quantile_s(one, 0.95) >= min(latency_s, bucket_floor_s(LATENCY_BUCKETS - 1)) * (1 - 1e-6)

"""Laws of the deciders of the origin: retry, hedge, parallelism, bandwidth."""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from snowdrop.policy import bandwidth, hedge, parallelism, retry
from snowdrop.policy.parallelism import ParallelismLimits, Window

LIMITS = retry.RetryLimits()
KINDS = st.sampled_from(["connect", "reset", "truncated", "stalled", "server", "throttled", "expired", "garbled"])
DRAWS = st.floats(0, 1, exclude_max=True)


@given(
    st.lists(
        st.tuples(KINDS, st.integers(0, 1 << 20), st.none() | st.floats(-5, 100), DRAWS, st.floats(0, 5)),
        min_size=1,
        max_size=20,
    )
)
def test_a_read_ends_within_its_bounds_whatever_fails(
    failures: list[tuple[retry.FailureKind, int, float | None, float, float]],
) -> None:
    history, now_s = retry.ReadHistory(started_s=0.0), 0.0
    for count in range(1, 250):
        kind, moved, retry_after_s, draw, took_s = failures[count % len(failures)]
        now_s += took_s
        failure = retry.Failure(kind=kind, moved_bytes=moved, retry_after_s=retry_after_s)
        what = retry.after_failure(LIMITS, history, failure, now_s=now_s, draw=draw)
        if isinstance(what, retry.GiveUp):
            assert what.bound
            return
        assert 0 <= what.pause_s <= LIMITS.pause_s_max + LIMITS.retry_after_s_max
        assert retry_after_s is None or what.pause_s >= retry_after_s
        assert now_s + what.pause_s <= LIMITS.elapsed_s_max
        assert count <= LIMITS.failures_max
        history, now_s = what.history, now_s + what.pause_s
    raise AssertionError("it never gave up")


@given(st.integers(1, 7), DRAWS, DRAWS)
def test_pauses_are_jittered_and_begin_anew_when_bytes_came(fruitless: int, one: float, other: float) -> None:
    history = retry.ReadHistory(started_s=0.0, failures=fruitless - 1, fruitless=fruitless - 1)
    failure = retry.Failure(kind="reset")
    pauses = []
    for draw in (one, other):
        what = retry.after_failure(LIMITS, history, failure, now_s=1.0, draw=draw)
        assert isinstance(what, retry.RetryAfter)
        pauses.append(what.pause_s)
    assert (pauses[0] < pauses[1]) == (one < other)
    fruitful = retry.after_failure(
        LIMITS, history, retry.Failure(kind="reset", moved_bytes=1), now_s=1.0, draw=one
    )
    assert isinstance(fruitful, retry.RetryAfter)
    assert fruitful.history.fruitless == 1
    assert fruitful.pause_s <= LIMITS.pause_s_first


HEDGES = hedge.HedgeLimits()
RECENT = st.builds(
    hedge.Recent, samples=st.integers(0, 200), first_byte_s=st.floats(0, 20), per_mib_s=st.floats(0, 20)
)


@given(RECENT, st.integers(1, 1000), st.floats(0, 100), st.floats(0, 100))
def test_hedges_are_a_small_share_of_requests(
    recent: hedge.Recent, requests: int, silent_s: float, age_s: float
) -> None:
    hedges = 0
    for made in range(1, requests + 1):
        spent = hedge.Spent(requests=made, hedges=hedges)
        read = hedge.ReadProgress(
            started_s=-age_s - silent_s, moved_s=-silent_s, done_bytes=0, total_bytes=1 << 23
        )
        hedges += isinstance(hedge.verdict(HEDGES, recent, spent, read, now_s=0.0), hedge.Hedge)
    assert hedges <= HEDGES.burst + HEDGES.share_max * requests + 1


@given(RECENT, st.floats(0, 100), st.floats(0, 100), st.integers(1, 1 << 24))
def test_a_read_in_time_is_never_hedged_and_a_silent_one_is(
    recent: hedge.Recent, silent_s: float, age_s: float, total: int
) -> None:
    read = hedge.ReadProgress(started_s=-age_s - silent_s, moved_s=-silent_s, done_bytes=0, total_bytes=total)
    what = hedge.verdict(HEDGES, recent, hedge.Spent(), read, now_s=0.0)
    if silent_s + age_s < HEDGES.late_s_min:
        assert isinstance(what, hedge.Wait)
        assert what.until_s > 0.0
    if silent_s >= HEDGES.late_s_max:
        assert isinstance(what, hedge.Hedge)


LIMITS_OF_CONNECTIONS = st.builds(ParallelismLimits, connections_max=st.integers(1, 64))
WINDOWS = st.builds(
    Window,
    bytes=st.integers(0, 1 << 34),
    elapsed_s=st.floats(0, 10),
    in_flight=st.floats(0, 64),
    first_byte_s=st.floats(0, 10),
    throttled=st.integers(0, 3),
)


@given(LIMITS_OF_CONNECTIONS, st.lists(WINDOWS, max_size=60))
def test_steering_stays_within_its_bounds(limits: ParallelismLimits, windows: list[Window]) -> None:
    now = parallelism.start(limits)
    for window in windows:
        before, now = now, parallelism.steer(limits, now, window)
        assert 1 <= now.connections <= limits.connections_max
        assert limits.range_bytes_min <= now.range_bytes <= limits.range_bytes_max
        assert now.range_bytes.bit_count() == 1
        assert now.reason
        if window.throttled:
            assert now.connections <= max(1, before.connections // 2)


def run_in_world(
    limits: ParallelismLimits, link: float, each: float, windows: int, noise: list[float] | None = None
) -> list[parallelism.Steering]:
    """Decisions where `connections` bring min(link, connections * each) bytes a second."""
    now = parallelism.start(limits)
    seen = [now]
    for index in range(windows):
        rate = min(link, now.connections * each) * (1 + (noise[index % len(noise)] if noise else 0.0))
        window = Window(bytes=int(rate), elapsed_s=1.0, in_flight=now.connections, first_byte_s=0.005)
        now = parallelism.steer(limits, now, window)
        seen.append(now)
    return seen


@given(LIMITS_OF_CONNECTIONS, st.floats(1e6, 1e10), st.floats(1e6, 1e9))
@settings(max_examples=200)
def test_steering_converges_to_what_the_link_needs(limits: ParallelismLimits, link: float, each: float) -> None:
    seen = run_in_world(limits, link, each, 600)
    needed = min(max(1, -(-int(link) // int(each))), limits.connections_max)
    best = min(link, limits.connections_max * each)
    for now in seen[-100:]:
        assert now.connections <= needed + 1
    mean = sum(min(link, now.connections * each) for now in seen[-100:]) / 100
    assert mean >= 0.85 * best


@given(LIMITS_OF_CONNECTIONS, st.floats(1e6, 1e10))
def test_connections_do_not_grow_when_throughput_does_not(limits: ParallelismLimits, link: float) -> None:
    seen = run_in_world(limits, link, 1e12, 300)
    first = seen[0].connections
    kept = [now.connections for now in seen if now.phase == "hold"]
    assert max(kept) <= first
    assert seen[-1].connections <= 2


@given(
    st.lists(st.tuples(st.integers(1, 1 << 22), st.floats(0, 0.5)), min_size=1, max_size=80),
    st.integers(1, 1 << 24),
)
def test_a_bucket_never_gives_more_than_its_rate(takes: list[tuple[int, float]], rate: int) -> None:
    bucket, now_s = bandwidth.Bucket(bytes_per_s=rate), 100.0
    used: list[tuple[float, int]] = []
    for size, later_s in takes:
        now_s += later_s
        bucket, wait_s = bandwidth.take(bucket, size, now_s=now_s)
        assert wait_s >= 0
        used.append((now_s + wait_s, size))
    begins = [at for at, _ in used]
    assert begins == sorted(begins)
    for index, (began_s, _) in enumerate(used):
        for end in range(index, len(used)):
            within = sum(size for _, size in used[index:end])
            assert within <= rate * (used[end][0] - began_s + bandwidth.BURST_S) * (1 + 1e-6) + 1


def test_no_limit_never_waits() -> None:
    bucket, wait_s = bandwidth.take(bandwidth.Bucket(bytes_per_s=0), 1 << 40, now_s=1.0)
    assert wait_s == 0
    assert bucket == bandwidth.Bucket(bytes_per_s=0)
    assert bandwidth.piece_bytes((0, 0)) == 0


@given(st.tuples(st.integers(0, 1 << 40), st.integers(0, 1 << 40)))
def test_pieces_are_small_where_the_rate_is(rates: tuple[int, int]) -> None:
    piece = bandwidth.piece_bytes(rates)
    slowest = min((rate for rate in rates if rate), default=0)
    assert (piece == 0) == (slowest == 0)
    if piece:
        assert bandwidth.PIECE_BYTES_MIN <= piece <= bandwidth.PIECE_BYTES_MAX
        assert piece <= max(slowest * bandwidth.PIECE_S, bandwidth.PIECE_BYTES_MIN)


def test_reasons_are_for_people() -> None:
    limits = ParallelismLimits(connections_max=8)
    busy = Window(bytes=1 << 30, elapsed_s=1.0, in_flight=4.0, first_byte_s=0.001)
    idle = msgspec.structs.replace(busy, in_flight=0.5)
    assert "doubled" in parallelism.steer(limits, parallelism.start(limits), busy).reason
    assert "busy" in parallelism.steer(limits, parallelism.start(limits), idle).reason

"""Back-off between failed starts, and when to stop trying."""

from snowdrop.policy.restart import (
    BACKOFF_S_FIRST,
    FAILURES_MAX,
    PROBE_S_FIRST,
    PROBE_S_MAX,
    PROVEN_S,
    BackOff,
    CrashLooping,
    MayStart,
    StartHistory,
    after_failure,
    after_proof,
    starts_max,
    verdict,
)


def failed(times: int, *, at_s: float = 100.0) -> StartHistory:
    history = StartHistory()
    for _ in range(times):
        history = after_failure(history, reason="boom", ready_s=None, now_s=at_s)
    return history


def test_nothing_failed_nothing_waits() -> None:
    assert verdict(StartHistory(), 0.0) == MayStart()


def test_each_failure_doubles_the_wait() -> None:
    waits = []
    for times in range(1, FAILURES_MAX):
        answer = verdict(failed(times), 100.0)
        assert isinstance(answer, BackOff)
        waits.append(answer.until_s - 100.0)
        assert verdict(failed(times), answer.until_s) == MayStart()
    assert waits == [BACKOFF_S_FIRST * 2**n for n in range(FAILURES_MAX - 1)]


def test_a_crash_loop_starts_nothing_but_one_try_after_each_growing_pause() -> None:
    pauses = []
    for times in range(FAILURES_MAX, FAILURES_MAX + 12):
        looping = verdict(failed(times), 100.0)
        assert isinstance(looping, CrashLooping)
        assert starts_max(looping, starting=0, now_s=looping.until_s - 0.1) == 0
        assert starts_max(looping, starting=0, now_s=looping.until_s) == 1
        assert starts_max(looping, starting=1, now_s=looping.until_s) == 0, "two tries at once"
        pauses.append(looping.until_s - 100.0)
    assert pauses[0] == PROBE_S_FIRST
    assert pauses == sorted(pauses)
    assert pauses[-1] == PROBE_S_MAX
    assert isinstance(verdict(failed(100_000), 100.0), CrashLooping)


def test_a_replica_that_had_proven_itself_forgives_what_was_before() -> None:
    history = failed(3)
    assert after_failure(history, reason="late", ready_s=PROVEN_S, now_s=1.0) == StartHistory()
    assert after_proof(history) == StartHistory()
    early = after_failure(history, reason="early", ready_s=PROVEN_S - 1, now_s=1.0)
    assert early.failures == 4

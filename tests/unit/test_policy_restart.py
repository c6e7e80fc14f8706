"""Back-off between failed starts, and when to stop trying."""

from snowdrop.policy.restart import (
    BACKOFF_S_FIRST,
    FAILURES_MAX,
    PROVEN_S,
    BackOff,
    CrashLooping,
    MayStart,
    StartHistory,
    after_failure,
    after_proof,
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


def test_after_enough_failures_in_a_row_nothing_starts_any_more() -> None:
    assert verdict(failed(FAILURES_MAX), 1e9) == CrashLooping(FAILURES_MAX, "boom")


def test_a_replica_that_had_proven_itself_forgives_what_was_before() -> None:
    history = failed(3)
    assert after_failure(history, reason="late", ready_s=PROVEN_S, now_s=1.0) == StartHistory()
    assert after_proof(history) == StartHistory()
    early = after_failure(history, reason="early", ready_s=PROVEN_S - 1, now_s=1.0)
    assert early.failures == 4

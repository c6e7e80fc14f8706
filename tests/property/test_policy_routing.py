"""Routing and admission."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from snowdrop.domain.service import QueueSpec
from snowdrop.policy.admission import RETRY_AFTER_S_MAX, RETRY_AFTER_S_MIN, Admit, Refuse, admit, retry_after_s
from snowdrop.policy.routing import choose


class Slots(msgspec.Struct, frozen=True):
    in_flight: int
    concurrency: int
    accepting: bool

    @property
    def free(self) -> bool:
        return self.accepting and self.in_flight < self.concurrency


slots = st.builds(Slots, st.integers(0, 8), st.integers(1, 8), st.booleans())


@given(st.lists(slots, max_size=8))
def test_the_least_loaded_free_replica_is_chosen(replicas: list[Slots]) -> None:
    chosen = choose(replicas)
    free = [r for r in replicas if r.free]
    if not free:
        assert chosen is None
        return
    assert chosen is not None
    assert chosen.free
    share = min(r.in_flight / r.concurrency for r in free)
    assert chosen is next(r for r in free if r.in_flight / r.concurrency == share), "the first wins a tie"


@given(st.integers(1, 50), st.integers(0, 100), st.floats(0, 1e4), st.floats(0, 1e6), st.floats(0.1, 1e4))
def test_admission_holds_the_bound_and_tells_a_bounded_time(
    length_max: int, waiting: int, rate: float, now_s: float, wait_s_max: float
) -> None:
    queue = QueueSpec(length_max=length_max, wait_s_max=wait_s_max)
    verdict = admit(queue, waiting=waiting, drained_per_s=rate, start_s=0.0, now_s=now_s)
    if waiting < length_max:
        assert verdict == Admit(now_s + wait_s_max)
    else:
        assert isinstance(verdict, Refuse)
        assert RETRY_AFTER_S_MIN <= verdict.retry_after_s <= RETRY_AFTER_S_MAX
        assert verdict.retry_after_s == int(verdict.retry_after_s)


def test_retry_after_follows_how_fast_the_queue_drains() -> None:
    assert retry_after_s(waiting=100, drained_per_s=10.0) == 5.0
    assert retry_after_s(waiting=100, drained_per_s=0.0) == RETRY_AFTER_S_MIN
    assert retry_after_s(waiting=10**6, drained_per_s=0.01) == RETRY_AFTER_S_MAX
    assert retry_after_s(waiting=10, drained_per_s=0.0, start_s=7.2) == 8.0, "a start must end first"
    assert retry_after_s(waiting=1, drained_per_s=5e-324) == RETRY_AFTER_S_MAX

"""Laws of keeping warm parents."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from snowdrop.policy.warm import IDLE_S_MAX, STARTING_MAX, Candidate, keep_warm, retry_after_s

_GIB = 1 << 30


@st.composite
def _candidates(draw: st.DrawFn) -> tuple[Candidate, ...]:
    made = []
    for number in range(draw(st.integers(0, 8))):
        state = draw(st.sampled_from(["none", "running", "starting"]))
        made.append(
            Candidate(
                key=(f"tenant-{number % 3}", "host", (f"module{number}",)),
                unused_s=draw(st.floats(0, 2 * IDLE_S_MAX)),
                memory_bytes=draw(st.integers(1, 2 * _GIB)),
                is_running=state == "running",
                is_starting=state == "starting",
                failures=draw(st.integers(0, 12)),
                failed_s=draw(st.floats(0, 1_000)),
            )
        )
    return tuple(made)


class TestKeepWarm:
    @given(_candidates(), st.integers(0, 4 * _GIB))
    def test_what_is_kept_and_started_fits_into_the_memory(
        self, candidates: tuple[Candidate, ...], memory_bytes_max: int
    ) -> None:
        kept = keep_warm(candidates, memory_bytes_max=memory_bytes_max)
        after = [
            each
            for each in candidates
            if each.key in kept.start or ((each.is_running or each.is_starting) and each.key not in kept.stop)
        ]
        assert sum(each.memory_bytes for each in after) <= memory_bytes_max

    @given(_candidates(), st.integers(0, 4 * _GIB))
    def test_only_what_lives_is_stopped_and_only_what_does_not_is_started(
        self, candidates: tuple[Candidate, ...], memory_bytes_max: int
    ) -> None:
        kept = keep_warm(candidates, memory_bytes_max=memory_bytes_max)
        living = {each.key for each in candidates if each.is_running or each.is_starting}
        assert set(kept.stop) <= living
        assert not set(kept.start) & living
        assert {*kept.start, *kept.stop} <= set(kept.reasons)

    @given(_candidates(), st.integers(0, 4 * _GIB))
    def test_starts_are_few_at_a_time_and_none_before_its_time(
        self, candidates: tuple[Candidate, ...], memory_bytes_max: int
    ) -> None:
        kept = keep_warm(candidates, memory_bytes_max=memory_bytes_max)
        starting = sum(each.is_starting for each in candidates)
        assert len(kept.start) <= max(0, STARTING_MAX - starting)
        for each in candidates:
            if each.key in kept.start:
                assert each.unused_s <= IDLE_S_MAX
                assert each.failed_s >= retry_after_s(each.failures)

    @given(_candidates(), st.integers(0, 4 * _GIB))
    def test_none_is_evicted_while_one_no_larger_that_was_used_earlier_stays(
        self, candidates: tuple[Candidate, ...], memory_bytes_max: int
    ) -> None:
        kept = keep_warm(candidates, memory_bytes_max=memory_bytes_max)
        staying = [each for each in candidates if each.is_running and each.key not in kept.stop]
        for gone in (each for each in candidates if each.key in kept.stop and each.unused_s <= IDLE_S_MAX):
            assert not any(
                stays.unused_s > gone.unused_s and stays.memory_bytes >= gone.memory_bytes for stays in staying
            )

    @given(st.integers(0, 100))
    def test_the_wait_after_a_death_never_shrinks(self, failures: int) -> None:
        assert retry_after_s(failures) <= retry_after_s(failures + 1)

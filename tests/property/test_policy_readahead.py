from hypothesis import given
from hypothesis import strategies as st

from snowdrop.policy.readahead import AHEAD_BYTES_MAX, FIRST_BYTES, PASS_BYTES_MIN, ReadState, decide

MIB = 1 << 20
reads = st.lists(st.tuples(st.integers(0, 400), st.integers(1, 4)), max_size=60)


@given(reads=reads, size=st.integers(1, 400))
def test_what_is_fetched_ahead_is_bounded_inside_the_file_and_fetched_once_in_a_pass(
    reads: list[tuple[int, int]], size: int
) -> None:
    state = ReadState()
    fetched: list[tuple[int, int]] = []
    for place, pages in reads:
        offset = min(place, size - 1) * MIB
        length = min(pages * MIB, size * MIB - offset)
        ahead = decide(state, offset, length, size * MIB)
        if ahead.state.begin != state.begin:
            fetched.clear()
        assert 0 <= ahead.length <= AHEAD_BYTES_MAX
        assert ahead.reason
        if ahead.length:
            assert ahead.offset + ahead.length <= size * MIB
            assert all(end <= ahead.offset for _, end in fetched)
            fetched.append((ahead.offset, ahead.offset + ahead.length))
        state = ahead.state


@given(start=st.integers(0, 1000), step=st.integers(1, 4))
def test_a_reader_that_goes_through_finds_ever_more_under_way(start: int, step: int) -> None:
    state, size, total = ReadState(), 10_000 * MIB, 0
    for offset in range(start * MIB, (start + 200) * MIB, step * MIB):
        if offset < state.ahead_end:
            continue  # was fetched ahead: it does not wait
        ahead = decide(state, offset, step * MIB, size)
        total, state = total + ahead.length, ahead.state
    assert state.window_bytes == AHEAD_BYTES_MAX
    assert total >= 200 * MIB - 2 * AHEAD_BYTES_MAX


@given(st.lists(st.integers(0, 100), min_size=1, max_size=50, unique=True))
def test_a_reader_that_jumps_gets_nothing_ahead(places: list[int]) -> None:
    state = ReadState()
    apart = (FIRST_BYTES + 3 * PASS_BYTES_MIN) // MIB
    for place in sorted(places, reverse=True):
        ahead = decide(state, (place + 1) * apart * MIB, MIB, 10_000 * MIB)
        assert ahead.length == 0
        state = ahead.state

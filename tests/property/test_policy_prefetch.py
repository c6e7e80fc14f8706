from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snowdrop.policy.prefetch import (
    EASY_RUN_BYTES,
    EASY_RUNS_MAX,
    FORESEEN,
    LATER,
    RANKS,
    TAIL_RUNS,
    URGENT,
    WANTED,
    FetchOrder,
    load_order,
    pace_of,
)

CHUNKS = 30
chunk_lists = st.lists(st.integers(0, CHUNKS - 1), max_size=CHUNKS)


def drained(order: FetchOrder, *, whole: bool, due: Iterable[int] = range(CHUNKS)) -> list[int]:
    """Everything that it gives while each is taken in turn."""
    left, given_out = set(due), []
    while (chunk := order.next(left.__contains__, whole=whole)) is not None:
        assert order.next(left.__contains__, whole=whole) == chunk, "asking twice changes nothing"
        given_out.append(chunk)
        left.remove(chunk)
    return given_out


@given(chunk_lists, chunk_lists)
def test_the_load_order_has_every_chunk_once_headers_first(headers: list[int], chunks: list[int]) -> None:
    order = load_order(headers, chunks)
    assert sorted(order) == sorted({*headers, *chunks})
    first = list(dict.fromkeys(headers))
    assert order[: len(first)] == first
    assert order[len(first) :] == sorted(order[len(first) :])


@given(st.lists(st.tuples(st.sampled_from(RANKS), chunk_lists), max_size=8), st.sets(st.integers(0, CHUNKS - 1)))
def test_what_is_due_comes_once_and_a_lower_rank_never_before_a_higher(
    packets: list[tuple[int, list[int]]], due: set[int]
) -> None:
    order = FetchOrder(range(CHUNKS))
    best: dict[int, int] = {}
    for rank, chunks in packets:
        order.want(chunks, rank)
        for chunk in chunks:
            best[chunk] = min(best.get(chunk, 9), rank)
    got = drained(order, whole=False, due=due)
    assert sorted(got) == sorted(set(best) & due)
    assert [best[chunk] for chunk in got] == sorted(best[chunk] for chunk in got)


@given(chunk_lists, chunk_lists)
def test_the_latest_packet_comes_first_in_its_own_order(earlier: list[int], later: list[int]) -> None:
    order = FetchOrder(range(CHUNKS))
    order.want(earlier)
    order.want(later)
    got = drained(order, whole=False)
    last_place = {chunk: place for place, chunk in enumerate(later)}
    assert got[: len(last_place)] == sorted(last_place, key=lambda chunk: last_place[chunk])


@given(chunk_lists)
def test_the_rest_follows_in_load_order_and_what_only_completes_comes_last(wanted: list[int]) -> None:
    order = FetchOrder(range(CHUNKS))
    order.want([CHUNKS, CHUNKS + 1], LATER)
    order.want(wanted)
    got = drained(order, whole=True, due=range(CHUNKS + 2))
    rest = [chunk for chunk in range(CHUNKS) if chunk not in wanted]
    assert got[len(set(wanted)) :] == [*rest, CHUNKS, CHUNKS + 1]


@given(chunk_lists, chunk_lists, chunk_lists)
def test_what_an_earlier_start_read_keeps_its_order_between_readers_and_the_rest(
    foreseen: list[int], more: list[int], wanted: list[int]
) -> None:
    order = FetchOrder(range(CHUNKS))
    order.want(foreseen, FORESEEN)
    order.want([chunk for chunk in more if chunk not in foreseen], FORESEEN)
    order.want(wanted)
    got = drained(order, whole=True)
    first = set(wanted)
    last_place = {chunk: place for place, chunk in enumerate([*foreseen, *(c for c in more if c not in foreseen)])}
    expected = [chunk for chunk in sorted(last_place, key=lambda c: last_place[c]) if chunk not in first]
    assert got[len(first) :][: len(expected)] == expected


def test_many_wants_of_one_chunk_do_not_pile_up() -> None:
    order = FetchOrder(range(CHUNKS))
    for _ in range(10_000):
        order.want([3, 4])
    assert sum(len(queue) for queue in order._queues.values()) <= 2048
    assert drained(order, whole=False) == [3, 4]


def test_what_was_forgotten_is_no_longer_wanted_and_a_rewind_starts_over() -> None:
    order = FetchOrder(range(3))
    order.want([2], URGENT)
    assert order.is_wanted(2)
    order.forget()
    assert not order.is_wanted(2)
    assert drained(order, whole=False) == []
    assert drained(order, whole=True, due=range(3)) == [0, 1, 2]
    assert drained(order, whole=True, due=range(3)) == []
    order.rewind()
    order.want([2], WANTED)
    assert drained(order, whole=True, due=range(3)) == [2, 0, 1]


@given(st.integers(0, 1 << 30), st.floats(0, 10), st.integers(0, 100), st.integers(1 << 20, 16 << 20))
def test_the_pace_never_falls_and_never_exceeds_what_the_link_wants(
    brought: int, elapsed_s: float, runs: int, wanted: int
) -> None:
    pace = pace_of(brought, 1 << 30, elapsed_s, runs, wanted)
    assert 0 < pace.run_bytes_max <= wanted
    assert pace.runs_max > 0
    later = pace_of(brought, 1 << 30, elapsed_s + 1, runs + 1, wanted)
    assert later.runs_max >= pace.runs_max
    assert later.run_bytes_max == wanted


@pytest.mark.parametrize(("bytes_per_s", "is_easy"), [(250e6, True), (500e6, True), (2e9, False)])
def test_a_fast_link_is_asked_for_much_as_soon_as_it_is_known_to_be_fast(
    bytes_per_s: float, is_easy: bool
) -> None:
    pace = pace_of(32 << 20, 1 << 30, (32 << 20) / bytes_per_s, 10, 8 << 20)
    assert (pace == (EASY_RUNS_MAX, EASY_RUN_BYTES)) == is_easy
    assert pace_of(1 << 20, 1 << 30, 1e-6, 1, 8 << 20).run_bytes_max == EASY_RUN_BYTES, "too little is known"


@given(st.integers(0, 1 << 30), st.integers(1 << 20, 16 << 20))
def test_the_last_bytes_are_cut_into_many_runs(left: int, wanted: int) -> None:
    pace = pace_of(1 << 30, left, 1.0, 100, wanted)
    assert pace.run_bytes_max == min(wanted, EASY_RUN_BYTES) or pace.run_bytes_max * TAIL_RUNS <= left

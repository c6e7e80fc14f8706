"""Traces of images: the decoder against any bytes, and the planner against plain sets of bytes."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snowdrop.content.imagetrace import check_trace, decode_trace, encode_trace
from snowdrop.domain.errors import CorruptContentError
from snowdrop.domain.ids import Digest
from snowdrop.domain.image import ALIGN_BYTES
from snowdrop.domain.imagetrace import TRACE_EXTENTS_MAX, ImageTrace, Stretch
from snowdrop.policy import replay
from snowdrop.policy.replay import (
    Place,
    ReadRecord,
    covered_bytes,
    has_changed,
    merged,
    replay_order,
    windows,
)

DIGEST = Digest("blake3:" + "a" * 64)
BLOCKS = 64
DATA_BYTES = BLOCKS * ALIGN_BYTES
stretches = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30)), max_size=20)
reads = st.lists(st.tuples(st.integers(0, DATA_BYTES + 9), st.integers(1, DATA_BYTES)), max_size=30)
numbers = st.integers(-(1 << 63), (1 << 64) - 1)
anything = st.recursive(
    st.one_of(numbers, st.text(max_size=5), st.binary(max_size=5), st.none(), st.floats()),
    lambda inner: st.lists(inner, max_size=5),
    max_leaves=20,
)


def bytes_of(extents: list[Stretch]) -> set[int]:
    return {at for offset, length in extents for at in range(offset, offset + length)}


@given(st.one_of(st.binary(max_size=300), anything.map(msgspec.msgpack.encode)))
def test_any_bytes_are_a_trace_within_its_bounds_or_refused(data: bytes) -> None:
    try:
        trace = decode_trace(data)
        check_trace(trace, DIGEST, DATA_BYTES)
    except CorruptContentError:
        return
    assert all(0 <= offset < offset + length <= DATA_BYTES for offset, length in trace.extents)


@given(
    st.tuples(st.integers(0, 3), st.text(max_size=3), st.text(max_size=600), numbers),
    st.lists(st.tuples(numbers, numbers), max_size=5),
    st.integers(0, DATA_BYTES),
)
def test_any_trace_that_is_believed_reads_nothing_that_is_not_there(
    head: tuple[int, str, str, int], extents: list[Stretch], data_bytes: int
) -> None:
    version, manifest, start, time_ns = head
    encoded = msgspec.msgpack.encode([version, manifest or DIGEST, start, time_ns, extents])
    try:
        trace = decode_trace(encoded)
        check_trace(trace, DIGEST, data_bytes)
    except CorruptContentError:
        return
    assert trace.manifest == DIGEST
    assert sum(length for _, length in trace.extents) <= data_bytes
    assert all(0 <= offset < offset + length <= data_bytes for offset, length in trace.extents)


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 99)), max_size=9), st.data())
def test_a_trace_comes_back_as_it_was_and_never_cut_short(extents: list[Stretch], data: st.DataObject) -> None:
    trace = ImageTrace(1, DIGEST, "python -m app", 5, tuple(extents))
    encoded = encode_trace(trace)
    assert decode_trace(encoded) == trace
    cut = data.draw(st.integers(0, len(encoded) - 1))
    with pytest.raises(CorruptContentError):
        decode_trace(encoded[:cut])


@pytest.mark.parametrize(
    "trace",
    [
        ImageTrace(2, DIGEST, "x", 0, ()),
        ImageTrace(1, DIGEST, "", 0, ()),
        ImageTrace(1, DIGEST, "x" * 501, 0, ()),
        ImageTrace(1, DIGEST, "x\x1b[2J", 0, ()),
        ImageTrace(1, DIGEST, "x", -1, ()),
        ImageTrace(1, DIGEST, "x", 0, ((0, 0),)),
        ImageTrace(1, DIGEST, "x", 0, ((-1, 5),)),
        ImageTrace(1, DIGEST, "x", 0, ((0, 1),) * (TRACE_EXTENTS_MAX + 1)),
        ImageTrace(1, DIGEST, "x", 0, ((1 << 62, 1 << 62),) * 60_000),
    ],
)
def test_what_breaks_a_bound_is_refused(trace: ImageTrace) -> None:
    with pytest.raises(CorruptContentError):
        encode_trace(trace)


def test_a_trace_of_another_image_or_of_overlapping_reads_is_refused() -> None:
    with pytest.raises(CorruptContentError):
        check_trace(ImageTrace(1, DIGEST, "x", 0, ((0, 5),)), Digest("blake3:" + "b" * 64), 100)
    with pytest.raises(CorruptContentError):
        check_trace(ImageTrace(1, DIGEST, "x", 0, ((0, 60), (0, 60))), DIGEST, 100)
    with pytest.raises(CorruptContentError):
        check_trace(ImageTrace(1, DIGEST, "x", 0, ((60, 60),)), DIGEST, 100)


@given(reads)
def test_a_record_has_each_block_once_in_the_order_of_first_reads(seen: list[Stretch]) -> None:
    record = ReadRecord(DATA_BYTES)
    order: dict[int, None] = {}
    for offset, length in seen:
        record.seen(offset, length)
        end = min(-(-(offset + length) // ALIGN_BYTES), BLOCKS)
        order.update(dict.fromkeys(range(offset // ALIGN_BYTES, end)))
    found = [
        block
        for offset, length in record.extents()
        for block in range(offset // ALIGN_BYTES, (offset + length) // ALIGN_BYTES)
    ]
    assert found == list(order)
    check_trace(ImageTrace(1, DIGEST, "x", 0, record.extents()), DIGEST, DATA_BYTES)


def test_a_record_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "TRACE_EXTENTS_MAX", 3)
    record = ReadRecord(DATA_BYTES)
    for block in (9, 7, 5, 3):
        record.seen(block * ALIGN_BYTES, 1)
    assert record.is_cut
    assert [offset // ALIGN_BYTES for offset, _ in record.extents()] == [9, 7, 5]
    monkeypatch.setattr(replay, "UNITS_MAX", 4)
    large = ReadRecord(100 * ALIGN_BYTES + 1)
    large.seen(99 * ALIGN_BYTES, 2 * ALIGN_BYTES)
    assert large.extents() == ((96 * ALIGN_BYTES, 4 * ALIGN_BYTES + 1),)


@given(stretches, st.lists(st.integers(1, 9), max_size=12))
def test_a_replay_is_each_chunk_that_was_touched_once_in_order(extents: list[Stretch], sizes: list[int]) -> None:
    places: list[Place] = []
    at = 0
    for number, size in enumerate(sizes):
        places.append(Place(at, size, 100 - number))
        at += size
    wanted: dict[int, None] = {}
    for extent in extents:
        touched = bytes_of([extent])
        for place in places:
            if touched & bytes_of([(place.offset, place.length)]):
                wanted[place.chunk] = None
    assert replay_order(extents, places) == list(wanted)


@given(st.lists(st.integers(1, 40 << 20), max_size=20))
def test_windows_have_every_chunk_in_order_and_are_bounded(sizes: list[int]) -> None:
    found = list(windows(range(len(sizes)), lambda chunk: sizes[chunk]))
    assert [chunk for window in found for chunk in window] == list(range(len(sizes)))
    for window in found:
        assert len(window) == 1 or sum(sizes[chunk] for chunk in window) <= replay.WINDOW_BYTES


@given(stretches, stretches)
def test_what_is_shown_and_compared_counts_each_byte_once(one: list[Stretch], other: list[Stretch]) -> None:
    ascending = merged(one)
    assert bytes_of(ascending) == bytes_of(one)
    assert sum(length for _, length in ascending) == len(bytes_of(one))
    for offset, length in other:
        assert covered_bytes(ascending, offset, length) == len(bytes_of(one) & bytes_of([(offset, length)]))
    difference = len(bytes_of(one) ^ bytes_of(other))
    assert has_changed(one, other) == (difference > replay.CHANGED_SHARE * len(bytes_of(one)))

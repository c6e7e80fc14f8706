"""Trace context: what goes on is well-formed, whatever came; a good parent is continued, a bad one is not."""

from __future__ import annotations

import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snowdrop.domain.receipt import Span
from snowdrop.domain.trace import TRACESTATE_CHARS_MAX, begin_trace, spans_within

VALID = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-0[01]")
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SEEDS = st.integers(0, 2**32)


@given(st.one_of(st.none(), st.text(max_size=80)), st.one_of(st.none(), st.text(max_size=600)), SEEDS)
def test_what_goes_on_is_well_formed(traceparent: str | None, tracestate: str | None, seed: int) -> None:
    context = begin_trace(traceparent, tracestate, sample_ratio=0.5, rng=Random(seed))
    assert VALID.fullmatch(context.traceparent)
    assert len(context.state) <= TRACESTATE_CHARS_MAX


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.integers(0, 255), SEEDS)
def test_a_good_parent_is_continued(trace: int, parent: int, flags: int, seed: int) -> None:
    context = begin_trace(f"00-{trace:032x}-{parent:016x}-{flags:02x}", "a=b", sample_ratio=0.0, rng=Random(seed))
    assert (context.trace_id, context.parent_id) == (f"{trace:032x}", f"{parent:016x}")
    assert context.sampled == bool(flags & 1)
    assert context.state == "a=b"
    again = begin_trace(context.traceparent, None, sample_ratio=0.0, rng=Random(seed + 1))
    assert (again.trace_id, again.parent_id, again.sampled) == (context.trace_id, context.span_id, context.sampled)


@pytest.mark.parametrize(
    "header",
    [
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}",
        "",
    ],
)
def test_a_bad_parent_begins_a_new_trace(header: str) -> None:
    context = begin_trace(header, "a=b", sample_ratio=0.0, rng=Random(1))
    assert context.trace_id != TRACE
    assert (context.parent_id, context.state, context.sampled) == ("", "", False)


def test_a_later_version_is_read_as_far_as_it_is_known() -> None:
    context = begin_trace(f"01-{TRACE}-{PARENT}-01-what-comes", None, sample_ratio=0.0, rng=Random(1))
    assert (context.trace_id, context.sampled) == (TRACE, True)


def test_new_traces_are_sampled_as_often_as_asked() -> None:
    rng = Random(7)
    assert not any(begin_trace(None, None, sample_ratio=0.0, rng=rng).sampled for _ in range(200))
    assert all(begin_trace(None, None, sample_ratio=1.0, rng=rng).sampled for _ in range(200))
    assert 60 < sum(begin_trace(None, None, sample_ratio=0.5, rng=rng).sampled for _ in range(200)) < 140


def test_a_receipts_spans_become_children_and_details_lie_below_their_phase() -> None:
    rng = Random(3)
    context = begin_trace(None, None, sample_ratio=1.0, rng=rng)
    spans = (
        Span(name="startup", start_unix_ns=1, end_unix_ns=9),
        Span(name="weights", start_unix_ns=2, end_unix_ns=5, parent="startup", note="disk"),
    )
    startup, weights = spans_within(context, spans, "cold start: ", rng)
    assert startup.context.parent_id == context.span_id
    assert weights.context.parent_id == startup.context.span_id
    assert (weights.name, weights.attributes) == ("cold start: weights", {"snowdrop.note": "disk"})
    assert {startup.context.trace_id, weights.context.trace_id} == {context.trace_id}

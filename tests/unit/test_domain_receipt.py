"""A start's spans as its first caller felt them."""

from hypothesis import given
from hypothesis import strategies as st

from platform_helpers import caller, receipt
from snowdrop.domain.receipt import PHASES, Span, join_caller, total_ns

OWN = ("mount", "start", "import", "startup")


@st.composite
def lines(draw: st.DrawFn, *, contiguous: bool = False) -> tuple[Span, ...]:
    """A replica's own main line: in order, without overlap, with gaps unless contiguous."""
    at, made = draw(st.integers(100, 200)), []
    for name in OWN:
        if not contiguous:
            at += draw(st.integers(0, 20))
        end = at + draw(st.integers(0, 100))
        made.append(Span(name=name, start_unix_ns=at, end_unix_ns=end))
        at = end
    return tuple(made)


@st.composite
def callers(draw: st.DrawFn):
    arrived = draw(st.integers(0, 700))
    admitted = arrived + draw(st.integers(0, 700))
    return caller(arrived=arrived, admitted=admitted, first_byte=admitted + draw(st.integers(0, 50)))


@st.composite
def starts(draw: st.DrawFn, *, contiguous: bool = False):
    """(own spans, ordered, ready): the order before the first span, ready after the last."""
    own = draw(lines(contiguous=contiguous))
    gap = st.just(0) if contiguous else st.integers(0, 30)
    return own, own[0].start_unix_ns - draw(gap), own[-1].end_unix_ns + draw(gap)


@given(starts(), callers())
def test_the_main_line_never_overlaps_and_lies_within_the_wait(start, felt) -> None:
    own, ordered, ready = start
    line = join_caller(own, felt, ordered_unix_ns=ordered, ready_unix_ns=ready)
    at = felt.arrived_unix_ns
    for span in line:
        assert at <= span.start_unix_ns <= span.end_unix_ns <= felt.first_byte_unix_ns
        at = span.end_unix_ns
    assert at == felt.first_byte_unix_ns
    assert {span.name for span in line} <= set(PHASES)
    assert total_ns(line) <= felt.waited_ns


@given(starts(contiguous=True), callers())
def test_a_start_without_gaps_accounts_for_all(start, felt) -> None:
    own, ordered, ready = start
    assert receipt(spans=own, caller=felt, started=ordered, ready=ready).unaccounted_ns == 0


@given(starts(), callers())
def test_what_no_phase_measured_is_unaccounted(start, felt) -> None:
    """Also before the first and after the last span of the replica: messages on their way are nobody's phase."""
    own, ordered, ready = start
    measured = [(0, ordered), *((s.start_unix_ns, s.end_unix_ns) for s in own), (ready, 10**6)]
    wait = range(felt.arrived_unix_ns, felt.admitted_unix_ns)
    outside = sum(not any(a <= ns < b for a, b in measured) for ns in wait)
    assert receipt(spans=own, caller=felt, started=ordered, ready=ready).unaccounted_ns == outside


def test_details_are_drawn_but_not_summed() -> None:
    own = Span(name="startup", start_unix_ns=10, end_unix_ns=20)
    detail = Span(name="weights", start_unix_ns=11, end_unix_ns=19, parent="startup")
    made = receipt(spans=(own, detail), started=10, ready=20)
    assert made.main_line() == (own,)
    assert (made.waited_ns, made.unaccounted_ns) == (10, 0)


def test_a_caller_that_comes_half_way_waits_only_for_the_rest() -> None:
    own = (
        Span(name="import", start_unix_ns=0, end_unix_ns=10),
        Span(name="startup", start_unix_ns=10, end_unix_ns=30),
    )
    line = join_caller(own, caller(arrived=20, admitted=33, first_byte=40), ordered_unix_ns=0, ready_unix_ns=30)
    assert [(s.name, s.start_unix_ns, s.end_unix_ns) for s in line] == [
        ("startup", 20, 30),
        ("route", 30, 33),
        ("answer", 33, 40),
    ]

"""Trace context: who continues whose trace, as the headers `traceparent` and `tracestate` carry it.

Format: W3C Trace Context (https://www.w3.org/TR/trace-context/), version 00.
"""

import re
from contextvars import ContextVar
from typing import Protocol

import msgspec

from snowdrop.domain.receipt import Span

TRACESTATE_CHARS_MAX = 512
"""The recommendation asks that at least so much be passed on; a longer one is dropped, as it allows."""
_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 0x01


class RandomBits(Protocol):
    """As `random.Random`: labels need no secret randomness."""

    def getrandbits(self, k: int, /) -> int: ...
    def random(self) -> float: ...


class TraceContext(msgspec.Struct, frozen=True, kw_only=True):
    """One hop of a trace: its own span, and the span of whoever called (empty at the trace's beginning)."""

    trace_id: str
    span_id: str
    parent_id: str = ""
    sampled: bool = False
    state: str = ""

    @property
    def traceparent(self) -> str:
        """The header for the next hop, whose parent is this one."""
        return f"00-{self.trace_id}-{self.span_id}-{_SAMPLED if self.sampled else 0:02x}"

    def child(self, rng: RandomBits) -> "TraceContext":
        """A span inside this one."""
        return TraceContext(
            trace_id=self.trace_id,
            span_id=_fresh(64, rng),
            parent_id=self.span_id,
            sampled=self.sampled,
            state=self.state,
        )


def begin_trace(
    traceparent: str | None, tracestate: str | None, *, sample_ratio: float, rng: RandomBits
) -> TraceContext:
    """The context of a request that has just come in.

    A caller's trace is continued, and whether it is sampled is the caller's word. Without a usable `traceparent`
    a new trace begins, sampled with the probability `sample_ratio`; `tracestate` then means nothing.
    """
    found = _parse(traceparent) if traceparent is not None else None
    if found is None:
        return TraceContext(
            trace_id=_fresh(128, rng), span_id=_fresh(64, rng), sampled=rng.random() < sample_ratio
        )
    trace_id, parent_id, sampled = found
    state = (tracestate or "").strip()
    return TraceContext(
        trace_id=trace_id,
        span_id=_fresh(64, rng),
        parent_id=parent_id,
        sampled=sampled,
        # By the format it is printable ASCII; anything else would break exporters that encode it.
        state=state if len(state) <= TRACESTATE_CHARS_MAX and state.isascii() else "",
    )


CURRENT_TRACE: ContextVar[TraceContext | None] = ContextVar("snowdrop_current_trace", default=None)
"""The trace of the request that this code works on, for calls that it makes in turn; None outside of one."""


class TraceSpan(msgspec.Struct, frozen=True, kw_only=True):
    """A finished span. `kind` and `error` as OpenTelemetry has them; times are unix nanoseconds."""

    context: TraceContext
    name: str
    start_unix_ns: int
    end_unix_ns: int
    kind: str = "internal"
    error: str = ""
    attributes: dict[str, str | int | float | bool] = msgspec.field(default_factory=dict)


def spans_within(context: TraceContext, spans: tuple[Span, ...], prefix: str, rng: RandomBits) -> list[TraceSpan]:
    """A receipt's spans as children of `context`; those with a parent of their own lie below it."""
    made: dict[str, TraceSpan] = {}
    for span in spans:
        above = made.get(span.parent)
        made[span.name] = TraceSpan(
            context=(above.context if above is not None else context).child(rng),
            name=f"{prefix}{span.name}",
            start_unix_ns=span.start_unix_ns,
            end_unix_ns=span.end_unix_ns,
            attributes={"snowdrop.note": span.note} if span.note else {},
        )
    return list(made.values())


def _parse(header: str) -> tuple[str, str, bool] | None:
    """(trace id, parent id, sampled); None for what the recommendation calls invalid."""
    match = _PARENT.fullmatch(header.strip())
    if match is None:
        return None
    version, trace_id, parent_id, flags, rest = match.groups()
    # Version ff is forbidden; 00 has nothing after the flags; later ones may have more, not ours to read.
    if version == "ff" or (version == "00" and rest) or not int(trace_id, 16) or not int(parent_id, 16):
        return None
    return trace_id, parent_id, bool(int(flags, 16) & _SAMPLED)


def _fresh(bits: int, rng: RandomBits) -> str:
    """A random id that is not zero, which would mean: none."""
    return f"{rng.getrandbits(bits) or 1:0{bits // 4}x}"

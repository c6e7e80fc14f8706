"""Spans that a replica tells of, under the name of its deployment and at a bounded rate.

They come out of a sandbox: which service they are of is the agent's word, not the replica's.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from snowdrop.domain.replica import ReplicaKey
from snowdrop.domain.trace import TraceSpan
from snowdrop.telemetry.tracing import Tracing
from snowdrop.wire.replica import SPANS_MAX, SpansDone

SPANS_PER_S_MAX = 200.0
SPANS_BURST_MAX = 1_000.0
NAME_CHARS_MAX = 200
ATTRIBUTES_MAX = 32


class ReplicaTraces:
    """Passes one replica's spans on; those beyond the rate are dropped."""

    def __init__(self, tracing: Tracing, key: ReplicaKey, clock: Callable[[], float] = time.monotonic) -> None:
        self._tracing = tracing
        self._key = key
        self._clock = clock
        self._tokens = SPANS_BURST_MAX
        self._then_s = clock()

    def finished(self, message: SpansDone) -> None:
        now_s = self._clock()
        self._tokens = min(SPANS_BURST_MAX, self._tokens + (now_s - self._then_s) * SPANS_PER_S_MAX)
        self._then_s = now_s
        taken = message.spans[: min(SPANS_MAX, int(self._tokens))]
        self._tokens -= len(taken)
        self._tracing.finished(map(self._owned, taken), service=self._key.deployment)

    def _owned(self, span: TraceSpan) -> TraceSpan:
        kept = dict(list(span.attributes.items())[:ATTRIBUTES_MAX])
        mine = {"snowdrop.tenant": self._key.tenant, "snowdrop.replica": self._key.replica}
        return msgspec.structs.replace(span, name=span.name[:NAME_CHARS_MAX], attributes={**kept, **mine})

"""Counts of finished requests, cheap enough to be kept in their path, and their Prometheus families.

A request costs some additions to plain numbers; the library's objects are only made when somebody looks. A worker
hands its counts to the gateway's owner as differences, so nothing is lost or doubled when a worker is replaced.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator

from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from snowdrop.telemetry.observing import RequestDone
from snowdrop.wire.counts import DURATION_BOUNDS_S, Durations, RequestSeries

SERIES_MAX = 10_000
"""Beyond it requests are counted under the deployment `other`: labels must not grow with what strangers send."""
UNNAMED_KINDS = frozenset({"not_found", "unauthorised"})
_LABELS = ("tenant", "deployment", "kind", "status")
_OWNED = ("tenant", "deployment")
_BOUNDS = (*(str(bound) for bound in DURATION_BOUNDS_S), "+Inf")
_STATUS = tuple(f"{hundreds}xx" for hundreds in range(10))

Key = tuple[str, str, str, str]


class RequestCounts(Collector):
    """A listener of finished requests. In a worker `taken` empties it; in the owner it is collected."""

    def __init__(self) -> None:
        self._series: dict[Key, RequestSeries] = {}

    def request_done(self, done: RequestDone) -> None:
        """Counts one request."""
        # A name that nobody was served under is the caller's invention, and no label.
        unnamed = not done.replica and done.error_kind in UNNAMED_KINDS
        key = (
            done.tenant,
            "" if unnamed else done.deployment,
            done.kind,
            _STATUS[done.status // 100] if 0 <= done.status < 1000 else "other",
        )
        series = self._series.get(key)
        if series is None:
            series = self._open(key)
        series.count += 1
        if done.receipt:
            series.cold += 1
        series.received_bytes += done.received_bytes
        series.sent_bytes += done.sent_bytes
        arrived = done.arrived_unix_ns
        _note(series.queued, ((done.granted_unix_ns or done.ended_unix_ns) - arrived) / 1e9)
        if done.first_byte_unix_ns:
            _note(series.first_byte, (done.first_byte_unix_ns - arrived) / 1e9)
        _note(series.total, (done.ended_unix_ns - arrived) / 1e9)

    def taken(self) -> tuple[RequestSeries, ...]:
        """What was counted since the last call."""
        taken, self._series = tuple(self._series.values()), {}
        return taken

    def add(self, counts: Iterable[RequestSeries]) -> None:
        """Adds what a worker counted."""
        for more in counts:
            key = (more.tenant, more.deployment, more.kind, more.status)
            series = self._series.get(key) or self._open(key)
            series.count += more.count
            series.cold += more.cold
            series.received_bytes += more.received_bytes
            series.sent_bytes += more.sent_bytes
            _add(series.queued, more.queued)
            _add(series.first_byte, more.first_byte)
            _add(series.total, more.total)

    def _open(self, key: Key) -> RequestSeries:
        if len(self._series) >= SERIES_MAX:
            key = ("", "other", "", key[3])
        tenant, deployment, kind, status = key
        made = RequestSeries(tenant=tenant, deployment=deployment, kind=kind, status=status)
        return self._series.setdefault(key, made)

    def collect(self) -> Iterator[Metric]:
        """The families of Prometheus."""
        yield from self._counters()
        for name, what, field in (
            ("snowdrop_request_queue_seconds", "From a request's arrival to its slot.", "queued"),
            ("snowdrop_request_first_byte_seconds", "From arrival to the answer's first byte.", "first_byte"),
            ("snowdrop_request_duration_seconds", "From arrival to the answer's last byte.", "total"),
        ):
            yield self._histogram(name, what, field)

    def _counters(self) -> Iterator[Metric]:
        counters = [
            (CounterMetricFamily("snowdrop_requests", "Finished requests.", labels=_LABELS), "count"),
            (
                CounterMetricFamily(
                    "snowdrop_cold_requests", "Requests that waited for a replica to start.", labels=_LABELS
                ),
                "cold",
            ),
            (
                CounterMetricFamily(
                    "snowdrop_request_received_bytes", "Bytes of request bodies relayed.", labels=_LABELS
                ),
                "received_bytes",
            ),
            (
                CounterMetricFamily("snowdrop_request_sent_bytes", "Bytes of answers relayed.", labels=_LABELS),
                "sent_bytes",
            ),
        ]
        for family, field in counters:
            for series in self._series.values():
                labels = (series.tenant, series.deployment, series.kind, series.status)
                family.add_metric(labels, getattr(series, field))
            yield family

    def _histogram(self, name: str, what: str, field: str) -> Metric:
        by_owner: dict[tuple[str, str], Durations] = {}
        for series in self._series.values():
            _add(by_owner.setdefault((series.tenant, series.deployment), Durations()), getattr(series, field))
        family = HistogramMetricFamily(name, what, labels=_OWNED)
        for labels, durations in by_owner.items():
            below, cumulative = 0, []
            for bound, count in zip(_BOUNDS, durations.buckets, strict=True):
                below += count
                cumulative.append((bound, below))
            family.add_metric(labels, cumulative, durations.sum_s)
        return family


def _note(durations: Durations, seconds: float) -> None:
    # The wall clock may be set back; a negative time would make the sum go down, which counters must not.
    seconds = max(seconds, 0.0)
    durations.sum_s += seconds
    durations.buckets[bisect_left(DURATION_BOUNDS_S, seconds)] += 1


def _add(durations: Durations, more: Durations) -> None:
    durations.sum_s += more.sum_s
    durations.buckets = [ours + theirs for ours, theirs in zip(durations.buckets, more.buckets, strict=True)]

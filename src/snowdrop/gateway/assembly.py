"""Wires a gateway process from settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from snowdrop.domain.settings import Settings
from snowdrop.gateway.broker import Broker
from snowdrop.gateway.carrier import Carrier
from snowdrop.gateway.finished import observer_of, reported_to
from snowdrop.gateway.upstream.pool import Upstreams
from snowdrop.telemetry.observing import Listener
from snowdrop.telemetry.tracing import open_tracing


@contextmanager
def carrying(broker: Broker, upstreams: Upstreams, settings: Settings, *listeners: Listener) -> Iterator[Carrier]:
    """The carrier of one worker, whose finished calls are logged, traced and told to `listeners`."""
    tracing = open_tracing(settings.tracing)
    ratio = settings.tracing.sample_ratio if settings.tracing.otlp_endpoint else 0.0
    observer = observer_of(settings, tracing, *listeners)
    try:
        yield Carrier(
            broker, upstreams, finished=reported_to(observer, sample_ratio=ratio), trace_sample_ratio=ratio
        )
    finally:
        tracing.close()  # blocks within its bound: by now nothing else is going on

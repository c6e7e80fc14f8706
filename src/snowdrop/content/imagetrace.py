"""Traces at the origin, beside the manifests: their bytes, a decoder that believes nothing, reading and writing.

A trace that is missing, wrong or hostile is as good as none: what uses them asks `load_trace`, which says so and
gives None.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice

import msgspec
from blake3 import blake3

from snowdrop.content.layout import trace_key, trace_prefix
from snowdrop.content.origin import Origin
from snowdrop.domain.errors import CorruptContentError, InvalidInputError, NotFoundError, SnowdropError
from snowdrop.domain.ids import Digest, TenantId
from snowdrop.domain.imagetrace import (
    START_CHARS_MAX,
    TRACE_BYTES_MAX,
    TRACE_EXTENTS_MAX,
    TRACE_FORMAT_VERSION,
    ImageTrace,
)

TRACES_SHOWN_MAX = 100
"""Of one image, that `stored_traces` gives."""
UNIX_NS_MAX = 1 << 62
_NAME_DIGITS = 32
_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(ImageTrace)

log = logging.getLogger("snowdrop.content")


def check_start(start: str) -> str:
    """Returns the name of a start; raises InvalidInputError if it is too long or cannot be shown."""
    if not start or len(start) > START_CHARS_MAX or not start.isprintable():
        raise InvalidInputError(
            f"the name of a start has 1 to {START_CHARS_MAX} printable characters",
            where="start",
            next_step="name the program, as in `python -m app`",
        )
    return start


def encode_trace(trace: ImageTrace) -> bytes:
    """Raises CorruptContentError if it breaks the bounds."""
    data = _ENCODER.encode(trace)
    decode_trace(data)
    return data


def decode_trace(data: bytes) -> ImageTrace:
    """Raises CorruptContentError. What it says of an image is not checked against one: see `load_trace`."""
    if len(data) > TRACE_BYTES_MAX:
        raise _corrupt(f"{len(data)} bytes (trace_bytes_max={TRACE_BYTES_MAX})")
    try:
        trace = _DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _corrupt(f"undecodable: {error}") from error
    if trace.version != TRACE_FORMAT_VERSION:
        raise _corrupt(f"version {trace.version} is not {TRACE_FORMAT_VERSION}")
    if not 0 <= trace.recorded_unix_ns <= UNIX_NS_MAX:
        raise _corrupt("its time is out of bounds")
    if len(trace.extents) > TRACE_EXTENTS_MAX:
        raise _corrupt(f"{len(trace.extents)} extents (trace_extents_max={TRACE_EXTENTS_MAX})")
    if any(offset < 0 or length <= 0 for offset, length in trace.extents):
        raise _corrupt("an extent is out of bounds")
    try:
        check_start(trace.start)
    except InvalidInputError as error:
        raise _corrupt(error.message) from error
    return trace


def check_trace(trace: ImageTrace, manifest: Digest, data_bytes: int) -> None:
    """Raises CorruptContentError if it is another image's, or reads what this one does not have."""
    if trace.manifest != manifest:
        raise _corrupt(f"it is that of {trace.manifest[:80]}")
    if any(offset + length > data_bytes for offset, length in trace.extents):
        raise _corrupt("an extent runs over the end of data")
    if sum(length for _, length in trace.extents) > data_bytes:
        raise _corrupt("it reads more than there is: extents overlap")


def load_trace(origin: Origin, key: str, manifest: Digest, start: str, data_bytes: int) -> ImageTrace | None:
    """The trace of a start at `key_of` it; None if there is none to be used, whatever the reason. Blocks."""
    try:
        trace = read_trace(origin, key)
        check_trace(trace, manifest, data_bytes)
    except NotFoundError:
        return None
    except SnowdropError as error:
        log.warning("the trace %s is not used: %s", key, error)
        return None
    return trace if trace.start == start else None


def store_trace(origin: Origin, domain: str, tenant: TenantId, trace: ImageTrace) -> None:
    """Replaces what was there. Blocks; raises what the origin raises."""
    origin.put(key_of(domain, tenant, trace.manifest, trace.start), encode_trace(trace))


def stored_traces(origin: Origin, domain: str, tenant: TenantId, manifest: Digest) -> Iterator[ImageTrace]:
    """An image's traces, at most TRACES_SHOWN_MAX; those that are not understood are passed over. Blocks."""
    keys = sorted(islice(origin.list(trace_prefix(domain, tenant, manifest)), TRACES_SHOWN_MAX))
    for key in keys:
        try:
            trace = read_trace(origin, key)
        except (NotFoundError, CorruptContentError) as error:
            log.warning("the trace %s is passed over: %s", key, error)
            continue
        if trace.manifest == manifest:
            yield trace


def read_trace(origin: Origin, key: str) -> ImageTrace:
    """Raises NotFoundError, CorruptContentError and what the origin raises. Blocks."""
    size = origin.size(key)
    if size > TRACE_BYTES_MAX:
        raise _corrupt(f"{size} bytes (trace_bytes_max={TRACE_BYTES_MAX})")
    data = bytearray(size)
    origin.read_range(key, 0, memoryview(data))
    return decode_trace(bytes(data))


def key_of(domain: str, tenant: TenantId, manifest: Digest, start: str) -> str:
    """Where the trace of a start lies."""
    return trace_key(domain, tenant, manifest, blake3(start.encode()).hexdigest()[:_NAME_DIGITS])


def _corrupt(message: str) -> CorruptContentError:
    return CorruptContentError(message, where="image trace", next_step="the next start records another one")

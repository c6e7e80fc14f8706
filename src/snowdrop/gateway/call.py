"""One call: what is asked of a deployment, by whom, how long it may wait, and where its answer goes.

HTTP requests, OpenAI requests, tasks and calls between services all become a `Call` with a `Sink`; `carrier.py`
carries them alike, so that queue, slots, leases and deadlines hold for all.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

import msgspec
from multidict import CIMultiDict

from snowdrop.domain.errors import SnowdropError, TooLargeError
from snowdrop.domain.ids import DeploymentName, ReplicaId, TenantId
from snowdrop.domain.trace import TraceContext
from snowdrop.wire.slots import Granted, WaitNews


class CallerGoneError(Exception):
    """Raised by a sink that nobody listens to any more. The call ends; it says nothing of the replica."""


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """Who calls. `tenant` is for calls from inside (a task, another service) and never comes from a header.

    `label` names whom the queue is to be fair to, beside the key. Of a call by a service, `replica` is who calls,
    and `parent_lease` the lease of the request that it calls for, as it says.
    """

    key_sha256: str | None = None
    tenant: TenantId | None = None
    label: str = ""
    replica: ReplicaId | None = None
    parent_lease: int = 0


class WaitOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the caller asks of the queue. The deployment's bounds hold all the same.

    `wait_s_max` shortens the deployment's longest wait; with `progress` the sink is told while the call waits.
    """

    wait_s_max: float | None = None
    priority: int | None = None
    progress: bool = False


ANY_WAIT = WaitOptions()


class Body(Protocol):
    """A request's body. `whole` is None for one that must be streamed; `refused` says why a stream broke off."""

    @property
    def whole(self) -> bytes | None: ...
    @property
    def refused(self) -> SnowdropError | None: ...
    @property
    def received_bytes(self) -> int: ...
    def stream(self) -> AsyncIterator[bytes]: ...


class WholeBody:
    """A body that is there."""

    refused: SnowdropError | None = None

    def __init__(self, data: bytes) -> None:
        self.whole: bytes | None = data
        self.received_bytes = len(data)

    async def stream(self) -> AsyncIterator[bytes]:
        if self.whole:
            yield self.whole


class Call(msgspec.Struct, kw_only=True):
    """One call. `target` is the raw path and query at the replica; `headers` go up as they are.

    `headers` must be free of hop-by-hop headers and of the caller's key (`headers_up` in `relay.py` makes such).
    `dialect` is the path of OpenAI's dialect that the deployment must serve.
    The fields from `granted` on are what became of it, filled in by the carrier for whoever observes.
    """

    deployment: DeploymentName
    method: str
    target: str
    headers: CIMultiDict[str]
    body: Body
    caller: Caller
    request_id: str
    arrived_unix_ns: int
    wait: WaitOptions = ANY_WAIT
    deadline_unix_s: float | None = None
    kind: str = "http"
    dialect: str = ""
    trace: TraceContext | None = None
    attempt: int = 0
    revision: str = ""
    granted: Granted | None = None
    status: int = 0
    first_byte_unix_ns: int = 0
    sent_bytes: int = 0


class Sink(Protocol):
    """Where an answer goes: once `whole`, or `begin`, any number of `write`, `end`. Raises CallerGoneError."""

    @property
    def begun(self) -> bool:
        """Something has gone out: a failure can only be told inside the answer from now on."""
        ...

    async def whole(self, status: int, headers: CIMultiDict[str], body: bytes) -> None: ...
    async def begin(self, status: int, headers: CIMultiDict[str], length: int | None) -> None: ...
    async def write(self, chunk: bytes) -> None: ...
    async def end(self) -> None: ...
    async def progress(self, news: WaitNews) -> None:
        """Called while the call waits, if it asked for it."""
        ...

    async def broken(self, error: SnowdropError) -> None:
        """The answer failed after it had begun: says so inside of it, or cuts it."""
        ...


class BufferSink:
    """Keeps an answer in memory, up to a bound; TooLargeError beyond it."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._chunks: list[bytes] = []
        self._bytes = 0
        self.status = 0
        self.headers: CIMultiDict[str] = CIMultiDict()
        self.error: SnowdropError | None = None

    @property
    def begun(self) -> bool:
        return self.status != 0

    @property
    def body(self) -> bytes:
        return b"".join(self._chunks)

    async def whole(self, status: int, headers: CIMultiDict[str], body: bytes) -> None:
        await self.begin(status, headers, len(body))
        await self.write(body)

    async def begin(self, status: int, headers: CIMultiDict[str], length: int | None) -> None:
        self._check(length or 0)
        self.status, self.headers = status, headers

    async def write(self, chunk: bytes) -> None:
        self._bytes += len(chunk)
        self._check(self._bytes)
        self._chunks.append(chunk)

    async def end(self) -> None: ...
    async def progress(self, news: WaitNews) -> None: ...

    async def broken(self, error: SnowdropError) -> None:
        """The error is kept in `error`; what had come so far is not an answer."""
        self.error = error

    def _check(self, count: int) -> None:
        if count > self._bytes_max:
            raise TooLargeError(
                "the answer is too large to be kept", where=f"bytes_max={self._bytes_max}", next_step="answer less"
            )

"""Carries one call: slot from the broker -> connect -> body up, answer down into the sink -> slot back.

A call goes to a second replica only if no connection to the first could be made: nothing can have been started
then. Once the answer has begun, a failure can only be told inside of it.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio
from aiohttp import hdrs
from multidict import CIMultiDict, CIMultiDictProxy, istr

from snowdrop.domain.calling import DEADLINE_HEADER, LEASE_HEADER
from snowdrop.domain.errors import ReplicaDiedError, SnowdropError, TimedOutError, UnavailableError
from snowdrop.domain.receipt import CallerTimes, Span, join_caller
from snowdrop.gateway.bodies import BODY_WHOLE_BYTES_MAX
from snowdrop.gateway.bounds import Bounds
from snowdrop.gateway.broker import Broker
from snowdrop.gateway.call import Call, Sink
from snowdrop.gateway.finished import begin_call_trace
from snowdrop.gateway.news import NewsBox
from snowdrop.gateway.upstream.connection import BrokenError, UnconnectedError
from snowdrop.gateway.upstream.pool import Exchange, Upstreams
from snowdrop.policy.waiting import RETRY_AFTER_UNKNOWN_S
from snowdrop.wire.slots import Granted, Outcome

ATTEMPTS_MAX = 5
HTTP_FAILED = 500

# RFC 9110, section 7.6.1: connection-level headers that an intermediary does not pass on.
# Kept as `istr`, which is found in headers without being made lower case each time.
HOP_BY_HOP = frozenset(
    map(
        istr,
        (
            *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection"),
            *("te", "trailer", "transfer-encoding", "upgrade"),
        ),
    )
)
DROPPED_DOWN = HOP_BY_HOP | {istr(name) for name in ("content-length", "date", "server")}

T = TypeVar("T")
Finished = Callable[[Call, SnowdropError | None], None]
"""Told once at the end of each call, with the error it ended with. It runs in the path of requests."""


class Carrier:
    """One per worker process."""

    def __init__(
        self,
        broker: Broker,
        upstreams: Upstreams,
        *,
        finished: Finished | None = None,
        trace_sample_ratio: float = 0.0,
    ) -> None:
        self.broker = broker
        self.upstreams = upstreams
        self._finished = finished
        self._trace_sample_ratio = trace_sample_ratio
        self.bounds = Bounds()

    async def carry(self, call: Call, sink: Sink) -> None:
        """Carries a call to its end.

        Raises a typed error if the sink has not begun; otherwise the sink is told (`broken`). Cancelled, it gives
        up its place in the queue, or cancels the replica's work. The slot comes back in every case.
        """
        error: SnowdropError | None = None
        begin_call_trace(call, sample_ratio=self._trace_sample_ratio)
        try:
            error = await self.with_slot(call, lambda lease: _Exchange(self, call, sink, lease).run(), sink)
        except SnowdropError as raised:
            error = raised
            if not sink.begun:
                raise
            await sink.broken(raised)
        finally:
            if self._finished is not None:
                self._finished(call, error)

    async def attended(
        self, call: Call, attempt: Callable[[Lease], Awaitable[tuple[T, SnowdropError | None]]]
    ) -> T:
        """For what is no request with an answer: waits for a slot, runs `attempt` under its lease, reports it.

        `attempt` gives its result, and the error that it has told its caller by itself.
        """
        error: SnowdropError | None = None
        begin_call_trace(call, sample_ratio=self._trace_sample_ratio)
        try:
            result, error = await self.with_slot(call, attempt)
        except SnowdropError as raised:
            error = raised
            raise
        finally:
            if self._finished is not None:
                self._finished(call, error)
        return result

    async def with_slot(self, call: Call, attempt: Callable[[Lease], Awaitable[T]], sink: Sink | None = None) -> T:
        """Waits for a slot and runs `attempt` under its lease; the slot is given back when it ends.

        If `attempt` raises UnconnectedError, the replica is reported and another one is taken. With a `sink`,
        that is told while the call waits, if the call asked for it.
        """
        for number in range(ATTEMPTS_MAX):
            call.attempt = number
            lease = Lease(self.broker, await self._acquire(call, sink))
            call.granted = lease.granted
            try:
                return await attempt(lease)
            except UnconnectedError as error:
                # No connection, so the replica has seen nothing of it: another one may be asked.
                lease.unreachable(str(error))
            finally:
                lease.release()
        call.granted = None  # no replica has seen anything of it
        raise UnavailableError(
            f"no replica of {call.deployment!r} could be reached in {ATTEMPTS_MAX} attempts; nothing was started",
            where=f"deployment {call.deployment}",
            next_step="try again; `snowdrop describe` shows its replicas",
            retry_after_s=RETRY_AFTER_UNKNOWN_S,
        )

    async def _acquire(self, call: Call, sink: Sink | None) -> Granted:
        if sink is None or not call.wait.progress:
            return await self.broker.acquire(call)
        granted: Granted | None = None
        refused: SnowdropError | None = None
        box = NewsBox()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(box.tell, sink)
                try:
                    granted = await self.broker.acquire(call, box.put)
                except SnowdropError as error:
                    refused = error
                tasks.cancel_scope.cancel()
        except BaseException:
            # Cancelled between the grant and here: nobody else knows of the lease.
            if granted is not None:
                self.broker.release(granted)
            raise
        if granted is None:
            raise refused or AssertionError("neither granted nor refused")
        return granted


class Lease:
    """A granted slot, given back exactly once."""

    __slots__ = ("_broker", "_held", "granted", "outcome")

    def __init__(self, broker: Broker, granted: Granted) -> None:
        self._broker = broker
        self._held = True
        self.granted = granted
        self.outcome: Outcome | None = None

    def release(self) -> None:
        if self._held:
            self._held = False
            self._broker.release(self.granted, self.outcome)

    def unreachable(self, message: str) -> None:
        """Gives the slot back, and says that its replica does not answer."""
        if self._held:
            self._held = False
            self._broker.unreachable(self.granted, message, self.outcome)


class _Exchange:
    """One attempt at one replica, under one lease."""

    __slots__ = ("_call", "_carrier", "_granted", "_lease", "_sink")

    def __init__(self, carrier: Carrier, call: Call, sink: Sink, lease: Lease) -> None:
        self._carrier = carrier
        self._call = call
        self._sink = sink
        self._lease = lease
        self._granted = lease.granted

    async def run(self) -> SnowdropError | None:
        """Relays; raises UnconnectedError if no connection was made, a typed error before the sink had begun.

        Returns the error that was told inside the answer.
        """
        call, bound_s = self._call, self._bound_s()
        if bound_s <= 0:
            raise self._too_long(bound_s)  # its time is over: nothing is started that nobody waits for
        body = call.body
        try:
            with self._carrier.bounds.within(bound_s):
                async with self._carrier.upstreams.exchange(
                    self._granted.socket_path,
                    call.method,
                    call.target,
                    call.headers,
                    body.stream() if body.whole is None else body.whole,
                ) as response:
                    await self._download(response)
                    self._note(failed=response.status >= HTTP_FAILED)
                    return None
        except UnconnectedError:
            raise
        except TimeoutError as error:
            self._note(failed=bound_s >= self._granted.request_s_max)
            return await self._failed(self._too_long(bound_s), error)
        except BrokenError as error:
            if body.refused is not None:  # raised in the upload, which broke the connection off
                return await self._failed(body.refused, error)
            died = ReplicaDiedError(
                "the replica died while it worked on this request, which is therefore not sent again",
                where=f"replica {self._granted.replica}",
                next_step="send it again if that is safe; `snowdrop logs` shows the replica's last words",
            )
            self._note(failed=True)
            if body.whole is not None:  # otherwise the upload may have broken off, which says nothing of it
                # Its socket may still take connections while it dies: those who wait are not sent there now.
                self._lease.unreachable(str(error))
            return await self._failed(died, error)

    def _note(self, *, failed: bool) -> None:
        """What the revision is judged by; nothing is noted of a call whose client goes away."""
        first_unix_ns = self._call.first_byte_unix_ns
        first_byte_s = (first_unix_ns - self._granted.granted_unix_ns) / 1e9 if first_unix_ns else None
        self._lease.outcome = Outcome(failed, first_byte_s)

    def _bound_s(self) -> float:
        """The time for the answer starts now, when the request is handed over, however long it has waited."""
        bound_s = self._granted.request_s_max
        deadline_unix_s = self._call.deadline_unix_s
        now_unix_s = time.time()
        if deadline_unix_s is not None:
            bound_s = min(bound_s, deadline_unix_s - now_unix_s)
        # What the replica's own calls to other services go on with.
        self._call.headers[DEADLINE_HEADER] = f"{now_unix_s + bound_s:.3f}"
        self._call.headers[LEASE_HEADER] = str(self._granted.lease)
        return bound_s

    def _too_long(self, bound_s: float) -> TimedOutError:
        if bound_s < self._granted.request_s_max:
            return TimedOutError(
                "no full answer before the caller's own deadline",
                where="header snowdrop-timeout or snowdrop-deadline",
                next_step="allow it more time, or ask for less",
            )
        return TimedOutError(
            f"no full answer within {bound_s:g} s of the request's turn",
            where=f"queue.request_s_max={bound_s:g}",
            next_step="raise it in @sd.service(queue=...), or ask for less",
        )

    async def _download(self, response: Exchange) -> None:
        call, sink = self._call, self._sink
        call.first_byte_unix_ns = time.time_ns()
        call.status = response.status
        headers = without(response.headers, DROPPED_DOWN)
        headers["x-request-id"] = call.request_id
        if self._granted.receipt is not None:
            self._note_cold_start(headers)
        length = response.content_length
        if length is not None and length <= BODY_WHOLE_BYTES_MAX and call.method != hdrs.METH_HEAD:
            whole = await response.read()
            call.sent_bytes = len(whole)
            await sink.whole(response.status, headers, whole)
            return
        await sink.begin(response.status, headers, length)
        async for chunk in response:
            call.sent_bytes += len(chunk)
            await sink.write(chunk)
        await sink.end()

    def _note_cold_start(self, headers: CIMultiDict[str]) -> None:
        """Tells the caller what it waited for, and the receipt who waited."""
        granted, call = self._granted, self._call
        if granted.receipt is None:
            return
        caller = CallerTimes(
            request_id=call.request_id,
            arrived_unix_ns=call.arrived_unix_ns,
            admitted_unix_ns=granted.granted_unix_ns,
            first_byte_unix_ns=call.first_byte_unix_ns,
        )
        headers["snowdrop-receipt"] = granted.receipt
        spans = join_caller(
            granted.spans, caller, ordered_unix_ns=granted.ordered_unix_ns, ready_unix_ns=granted.ready_unix_ns
        )
        headers["server-timing"] = server_timing(spans)
        self._carrier.broker.served(granted.receipt, caller)

    async def _failed(self, error: SnowdropError, cause: BaseException) -> SnowdropError:
        """Before the answer has begun: raises, for a proper answer. After: the sink says it, or cuts."""
        if not self._sink.begun:
            raise error from cause
        await self._sink.broken(error)
        return error


def server_timing(spans: tuple[Span, ...]) -> str:
    """A Server-Timing header value (https://www.w3.org/TR/server-timing/), durations in milliseconds."""
    return ", ".join(f"{span.name};dur={span.duration_ns / 1e6:.1f}" for span in spans)


def without(headers: CIMultiDict[str] | CIMultiDictProxy[str], dropped: frozenset[str]) -> CIMultiDict[str]:
    """A copy less the dropped names and those that the Connection header lists."""
    listed = headers.get(hdrs.CONNECTION)
    if listed:
        dropped = dropped | {name.strip() for name in listed.split(",")}
    kept = CIMultiDict(headers)
    for name in dropped:
        if name in kept:
            del kept[name]
    return kept

"""How a relaying worker gets a slot: one port, two implementations.

`LocalBroker` lives in the owner's process and calls the queue directly; `RemoteBroker` speaks to the owner over
a unix socket. A worker does not know which one it has.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import anyio
import anyio.abc

from snowdrop.domain.errors import PlatformDownError, error_from_body
from snowdrop.domain.ids import DeploymentName, ReceiptId
from snowdrop.domain.receipt import CallerTimes
from snowdrop.gateway.call import Call
from snowdrop.gateway.owner import Owner
from snowdrop.wire.codec import PROTOCOL_VERSION, Message
from snowdrop.wire.counts import RequestSeries
from snowdrop.wire.pipe import MessagePipe
from snowdrop.wire.slots import (
    TO_WORKER,
    Acquire,
    AskSpeakers,
    CancelWait,
    Denied,
    Granted,
    Look,
    Looked,
    Outcome,
    ReleaseLease,
    ReportCounts,
    ReportServed,
    ReportUnreachable,
    Speaker,
    SpeakersTold,
    ToWorker,
    WaitNews,
    WorkerHello,
)

T = TypeVar("T")
ASK_S_MAX = 5.0
"""How long the owner may take for an answer that it has at hand."""

TakeNews = Callable[[WaitNews], None]


class Broker(Protocol):
    """Slots for requests. Every Granted must be given back with exactly one `release` or `unreachable`."""

    async def acquire(self, call: Call, news: TakeNews | None = None) -> Granted:
        """Waits for a slot; raises the typed error of a refusal. Cancelling gives up the place in the queue.

        `news` hears how it stands while the call waits, if the call wants progress.
        """
        ...

    async def look(self, key_sha256: str | None, deployment: DeploymentName, *, activate: bool) -> Looked:
        """How a deployment stands; wakes it if asked. Raises the typed error of an unknown one or a wrong key."""
        ...

    async def speakers(self, key_sha256: str | None) -> tuple[Speaker, ...]:
        """The deployments of the key's tenant that speak OpenAI's dialect. Raises UnauthorisedError."""
        ...

    def release(self, granted: Granted, outcome: Outcome | None = None) -> None: ...
    def unreachable(self, granted: Granted, message: str, outcome: Outcome | None = None) -> None: ...
    def served(self, receipt: ReceiptId, caller: CallerTimes) -> None: ...


class _Tickets:
    """Numbers requests and matches answers to them."""

    def __init__(self) -> None:
        self._next = 1
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._looking: dict[int, asyncio.Future[Looked]] = {}
        self._news: dict[int, TakeNews] = {}

    def number(self) -> int:
        ticket = self._next
        self._next += 1
        return ticket

    def open(self, ticket: int, news: TakeNews | None) -> asyncio.Future[Any]:
        """The future of a numbered request's answer; to be closed by whoever gives it up."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = future
        if news is not None:
            self._news[ticket] = news
        return future

    def answer(self, message: ToWorker) -> None:
        if isinstance(message, WaitNews):
            take = self._news.get(message.ticket)
            if take is not None:
                take(message)
            return
        self._news.pop(message.ticket, None)
        if isinstance(message, Looked):
            looking = self._looking.pop(message.ticket, None)
            if looking is not None and not looking.done():
                looking.set_result(message)
            return
        future = self._waiting.pop(message.ticket, None)
        if isinstance(message, Denied):
            error = error_from_body(message.error)
            _fail(future, error)
            _fail(self._looking.pop(message.ticket, None), error)
        elif future is not None and not future.done():
            future.set_result(message)

    def look(self, ticket: int) -> asyncio.Future[Looked]:
        """The future of an answer to a look."""
        future: asyncio.Future[Looked] = asyncio.get_running_loop().create_future()
        self._looking[ticket] = future
        return future

    def close(self, ticket: int) -> None:
        self._looking.pop(ticket, None)
        self._waiting.pop(ticket, None)
        self._news.pop(ticket, None)

    def fail_all(self, error: Exception) -> None:
        for waiting in self._waiting.values():
            _fail(waiting, error)
        for looking in self._looking.values():
            _fail(looking, error)
        self._waiting.clear()
        self._looking.clear()
        self._news.clear()


def _fail(future: asyncio.Future[T] | None, error: Exception) -> None:
    if future is not None and not future.done():
        future.set_exception(error)


def _asks(call: Call, ticket: int) -> Acquire:
    """The message for a call."""
    wait, deadline_unix_s = call.wait, call.deadline_unix_s
    return Acquire(
        ticket=ticket,
        key_sha256=call.caller.key_sha256,
        deployment=call.deployment,
        arrived_unix_ns=call.arrived_unix_ns,
        tenant=call.caller.tenant,
        label=call.caller.label,
        request_id=call.request_id,
        priority=wait.priority,
        wait_s_max=wait.wait_s_max,
        deadline_left_s=None if deadline_unix_s is None else max(0.0, deadline_unix_s - time.time()),
        progress=wait.progress,
        attempt=call.attempt,
        dialect=call.dialect,
        parent_lease=call.caller.parent_lease,
        from_replica=call.caller.replica,
        revision=call.revision,
    )


class LocalBroker:
    """A worker in the owner's own process."""

    def __init__(self, owner: Owner, worker: str) -> None:
        self._owner = owner
        self._worker = worker
        self._tickets = _Tickets()
        self._arriving = 0
        self._at_once: list[ToWorker] = []
        owner.attach(worker, self._answer)

    async def acquire(self, call: Call, news: TakeNews | None = None) -> Granted:
        ticket = self._tickets.number()
        self._arriving = ticket
        self._at_once.clear()
        self._owner.arrive(self._worker, _asks(call, ticket))
        self._arriving = 0
        answer: ToWorker | None = None
        for message in self._at_once:
            if not isinstance(message, WaitNews):
                answer = message
            elif news is not None:
                news(message)
        self._at_once.clear()
        if isinstance(answer, Granted):
            return answer
        if isinstance(answer, Denied):
            raise error_from_body(answer.error)
        future = self._tickets.open(ticket, news)
        try:
            granted: Granted = await future
        except asyncio.CancelledError:
            self._tickets.close(ticket)
            self._owner.cancel(self._worker, ticket)
            raise
        return granted

    async def speakers(self, key_sha256: str | None) -> tuple[Speaker, ...]:
        return self._owner.speakers(key_sha256)

    async def look(self, key_sha256: str | None, deployment: DeploymentName, *, activate: bool) -> Looked:
        ticket = self._tickets.number()
        future = self._tickets.look(ticket)
        self._owner.look(
            self._worker, Look(ticket=ticket, key_sha256=key_sha256, deployment=deployment, activate=activate)
        )
        return await future

    def _answer(self, message: ToWorker) -> None:
        if message.ticket == self._arriving:
            self._at_once.append(message)  # on the warm path: the slot is there before anybody waits
        else:
            self._tickets.answer(message)

    def release(self, granted: Granted, outcome: Outcome | None = None) -> None:
        self._owner.release(granted.lease, outcome)

    def unreachable(self, granted: Granted, message: str, outcome: Outcome | None = None) -> None:
        self._owner.unreachable(granted.lease, message, outcome)

    def served(self, receipt: ReceiptId, caller: CallerTimes) -> None:
        self._owner.served(receipt, caller)


class RemoteBroker:
    """A worker in a process of its own. `run` keeps the connection; when it breaks, the worker must end.

    A worker that outlived its owner would relay under leases that nobody counts.
    """

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self._tickets = _Tickets()
        self._pipe: MessagePipe[ToWorker] | None = None
        self._gone = anyio.Event()
        self.connected = False

    async def cancel_when_gone(self, scope: anyio.CancelScope) -> None:
        """Cancels `scope` when the owner is gone."""
        await self._gone.wait()
        scope.cancel()

    async def run(self, stream: anyio.abc.ByteStream, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        """Speaks to the owner until the connection ends."""
        pipe: MessagePipe[ToWorker] = MessagePipe(TO_WORKER)
        await pipe.open(stream)
        self._pipe = pipe
        pipe.send(WorkerHello(version=PROTOCOL_VERSION, worker=self._worker))
        try:
            self.connected = True
            task_status.started()
            await pipe.run(self._tickets.answer)
        finally:
            self.connected = False
            self._gone.set()
            self._tickets.fail_all(_owner_gone())
            pipe.close()

    async def acquire(self, call: Call, news: TakeNews | None = None) -> Granted:
        if self._gone.is_set():
            raise _owner_gone()
        ticket = self._tickets.number()
        self._say(_asks(call, ticket))  # what cannot be said raises, and nobody waits for its answer
        future = self._tickets.open(ticket, news)
        try:
            granted: Granted = await future
        except asyncio.CancelledError:
            self._tickets.close(ticket)
            self._say(CancelWait(ticket=ticket))
            raise
        return granted

    async def speakers(self, key_sha256: str | None) -> tuple[Speaker, ...]:
        if self._gone.is_set():
            raise _owner_gone()
        ticket = self._tickets.number()
        future = self._tickets.open(ticket, None)
        self._say(AskSpeakers(ticket=ticket, key_sha256=key_sha256))
        try:
            with anyio.fail_after(ASK_S_MAX):
                told: SpeakersTold = await future
        except TimeoutError as error:
            raise _owner_gone() from error
        finally:
            self._tickets.close(ticket)
        return told.speakers

    async def look(self, key_sha256: str | None, deployment: DeploymentName, *, activate: bool) -> Looked:
        if self._gone.is_set():
            raise _owner_gone()
        ticket = self._tickets.number()
        future = self._tickets.look(ticket)
        self._say(Look(ticket=ticket, key_sha256=key_sha256, deployment=deployment, activate=activate))
        try:
            return await future
        finally:
            self._tickets.close(ticket)

    def release(self, granted: Granted, outcome: Outcome | None = None) -> None:
        self._say(ReleaseLease(lease=granted.lease, outcome=outcome))

    def unreachable(self, granted: Granted, message: str, outcome: Outcome | None = None) -> None:
        self._say(ReportUnreachable(lease=granted.lease, message=message, outcome=outcome))

    def served(self, receipt: ReceiptId, caller: CallerTimes) -> None:
        self._say(ReportServed(receipt=receipt, caller=caller))

    def counted(self, series: tuple[RequestSeries, ...]) -> None:
        """Hands what this worker counted to the owner."""
        if series:
            self._say(ReportCounts(series=series))

    def _say(self, message: Message) -> None:
        # Once the owner is gone it has reclaimed all leases of this worker: there is nobody to tell.
        # One that does not read is cut off by the pipe, and then it is gone.
        if self._pipe is not None and not self._gone.is_set():
            self._pipe.send(message)


def _owner_gone() -> PlatformDownError:
    return PlatformDownError("the gateway's queue owner is gone", where="gateway", next_step="try again")

"""The owner of the queues: runs QueueCore for its workers, wherever they are, and tells control the load.

All of it runs on one event loop, so the core needs no lock. What must reach control goes through `outbox`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

import anyio
import anyio.abc

from snowdrop.domain.errors import ProtocolError, SnowdropError, UnavailableError
from snowdrop.domain.ids import ReceiptId
from snowdrop.domain.receipt import CallerTimes
from snowdrop.gateway.effects import DemandChanged, Effect, Grant, Idle, Now, deny
from snowdrop.gateway.openai.speaking import Speaking
from snowdrop.gateway.queue import QueueCore
from snowdrop.telemetry.requests import RequestCounts
from snowdrop.wire.codec import Message, check_version
from snowdrop.wire.control import (
    AskWaits,
    CallerServed,
    CallerStored,
    LoadReport,
    ReplicaIdle,
    ReplicaUnreachable,
    RouteChanged,
    Routes,
    ToGateway,
    WaitsTold,
)
from snowdrop.wire.pipe import MessagePipe
from snowdrop.wire.slots import (
    FROM_WORKER,
    Acquire,
    AskSpeakers,
    CancelWait,
    Denied,
    FromWorker,
    Look,
    Outcome,
    ReleaseLease,
    ReportCounts,
    ReportServed,
    ReportUnreachable,
    Speaker,
    SpeakersTold,
    ToWorker,
    WorkerHello,
)

CALLERS_MAX = 10_000
"""Receipts whose caller control has not confirmed; beyond it the oldest are given up."""
TICK_S = 0.25
HELLO_S_MAX = 5.0
log = logging.getLogger("snowdrop.gateway")


class Uplink(Protocol):
    """Where messages for control go. They may be dropped while control is away: loads are sent whole again."""

    def send_soon(self, message: Message) -> None: ...
    def load_changed(self) -> None:
        """The load should be reported now; many calls in a row make one report."""
        ...


class Owner:
    """Wraps the core with time, workers and control."""

    def __init__(self, core: QueueCore, gateway: str) -> None:
        self._core = core
        self._gateway = gateway
        self._workers: dict[str, Callable[[ToWorker], None]] = {}
        self._speaking = Speaking()
        self._uplink: Uplink | None = None
        self._callers: dict[ReceiptId, CallerTimes] = {}
        self._served: dict[ReceiptId, None] = {}
        self.counts = RequestCounts()

    # --- workers ------------------------------------------------------------------------------------------

    def attach(self, worker: str, answer: Callable[[ToWorker], None]) -> None:
        """A worker is there; its grants and denials go to `answer`."""
        self._workers[worker] = answer

    def detach(self, worker: str) -> None:
        """A worker is gone: its leases are reclaimed at once."""
        self._workers.pop(worker, None)
        self._carry_out(self._core.worker_gone(worker, _now()))

    def arrive(self, worker: str, request: Acquire) -> None:
        if request.dialect:
            try:
                tenant = request.tenant or self._core.tenant_of(request.key_sha256)
                self._speaking.check(tenant, request.deployment, request.dialect)
            except SnowdropError as error:
                self._carry_out([deny(worker, request.ticket, error)])
                return
        self._carry_out(self._core.arrive(worker, request, _now()))

    def look(self, worker: str, request: Look) -> None:
        self._carry_out(self._core.look(worker, request, _now()))

    def speakers(self, key_sha256: str | None) -> tuple[Speaker, ...]:
        """The deployments of the key's tenant that speak OpenAI's dialect. Raises UnauthorisedError."""
        tenant = self._core.tenant_of(key_sha256)
        if not self._core.connected:
            raise UnavailableError(
                "the gateway has not heard from control yet", where="gateway", retry_after_s=1.0
            )
        return self._speaking.of(tenant)

    def _tell_speakers(self, worker: str, request: AskSpeakers) -> None:
        answer = self._workers.get(worker)
        if answer is None:
            return
        try:
            answer(SpeakersTold(ticket=request.ticket, speakers=self.speakers(request.key_sha256)))
        except SnowdropError as error:
            answer(Denied(ticket=request.ticket, error=error.body()))

    def cancel(self, worker: str, ticket: int) -> None:
        self._carry_out(self._core.cancel(worker, ticket, _now()))

    def release(self, lease: int, outcome: Outcome | None = None) -> None:
        self._carry_out(self._core.release(lease, _now(), outcome))

    def unreachable(self, lease: int, message: str, outcome: Outcome | None = None) -> None:
        replica, effects = self._core.unreachable(lease, _now(), outcome)
        if replica is not None:
            self._say(ReplicaUnreachable(gateway=self._gateway, replica=replica, message=message))
        self._carry_out(effects)

    def served(self, receipt: ReceiptId, caller: CallerTimes) -> None:
        """The first caller that a new replica answered; those after it are not part of its receipt.

        Kept until control has stored it, so that a restart of control loses no receipt's caller.
        """
        if receipt in self._served:
            return
        self._served[receipt] = None
        while len(self._served) > CALLERS_MAX:
            del self._served[next(iter(self._served))]
        while len(self._callers) >= CALLERS_MAX:
            del self._callers[next(iter(self._callers))]
        self._callers[receipt] = caller
        self._say(CallerServed(receipt=receipt, caller=caller))

    async def serve_workers(self, listener: anyio.abc.SocketListener) -> None:
        """Accepts workers of other processes."""
        await listener.serve(self._serve_worker)

    async def _serve_worker(self, stream: anyio.abc.ByteStream) -> None:
        pipe: MessagePipe[FromWorker] = MessagePipe(FROM_WORKER)
        await pipe.open(stream)
        try:
            with anyio.fail_after(HELLO_S_MAX):
                hello = await pipe.first()
            if not isinstance(hello, WorkerHello):
                raise ProtocolError("a worker must say hello first", where="hello")
            check_version(hello.version, peer=f"gateway worker {hello.worker}")
        except (TimeoutError, ProtocolError, anyio.EndOfStream):
            pipe.close()
            return
        self.attach(hello.worker, pipe.send)
        try:
            await pipe.run(partial(self._handle, hello.worker))
        except ProtocolError as error:
            # One worker's broken frame must not end the others: it is cut off and started again.
            log.warning("worker %s is cut off: %s", hello.worker, error)
        finally:
            self.detach(hello.worker)
            pipe.close()

    def _handle(self, worker: str, message: FromWorker) -> None:
        if isinstance(message, Acquire):
            self.arrive(worker, message)
        elif isinstance(message, AskSpeakers):
            self._tell_speakers(worker, message)
        elif isinstance(message, ReleaseLease):
            self.release(message.lease, message.outcome)
        elif isinstance(message, CancelWait):
            self.cancel(worker, message.ticket)
        elif isinstance(message, Look):
            self.look(worker, message)
        elif isinstance(message, ReportUnreachable):
            self.unreachable(message.lease, message.message, message.outcome)
        elif isinstance(message, ReportServed):
            self.served(message.receipt, message.caller)
        elif isinstance(message, ReportCounts):
            self.counts.add(message.series)

    # --- control ------------------------------------------------------------------------------------------

    def connected(self, uplink: Uplink) -> None:
        """Control is there (again): says what it may have missed."""
        self._uplink = uplink
        self._load_changed()
        for receipt, caller in self._callers.items():
            self._say(CallerServed(receipt=receipt, caller=caller))

    def disconnected(self) -> None:
        self._uplink = None

    def from_control(self, message: ToGateway) -> None:
        """Applies one message of control."""
        if isinstance(message, Routes):
            self._speaking.set_routes(message.deployments)
            self._carry_out(self._core.set_routes(message.deployments, message.keys, _now()))
        elif isinstance(message, RouteChanged):
            key = (message.tenant, message.deployment)
            self._speaking.change(key, message.route)
            self._carry_out(self._core.change_route(key, message.route, _now()))
        elif isinstance(message, AskWaits):
            waits = self._core.waiting((message.tenant, message.deployment), message.request_id, _now())
            self._say(WaitsTold(ticket=message.ticket, waits=waits))
        elif isinstance(message, CallerStored):
            self._callers.pop(message.receipt, None)

    def load_report(self) -> LoadReport:
        return LoadReport(gateway=self._gateway, loads=self._core.loads(_now()), waits=self._core.waits.take())

    async def run(self, *, load_report_s: float) -> None:
        """Ends late waits and reports the load while there is any, and until its end has been reported."""
        next_report_s = 0.0
        while True:
            await anyio.sleep(min(TICK_S, load_report_s))
            self._carry_out(self._core.tick(_now()))
            if time.monotonic() < next_report_s:
                continue
            next_report_s = time.monotonic() + load_report_s
            if self._core.worth_reporting:
                self._load_changed()

    # --- inside -------------------------------------------------------------------------------------------

    def _carry_out(self, effects: list[Effect]) -> None:
        demand = False
        for effect in effects:
            if isinstance(effect, DemandChanged):
                demand = True
            elif isinstance(effect, Idle):
                self._say(ReplicaIdle(gateway=self._gateway, replica=effect.replica))
            else:
                answer = self._workers.get(effect.worker)
                if answer is not None:
                    answer(effect.message)
                elif isinstance(effect, Grant):
                    self._carry_out(self._core.release(effect.message.lease, _now()))
        if demand:
            self._load_changed()

    def _load_changed(self) -> None:
        if self._uplink is not None:
            self._uplink.load_changed()

    def _say(self, message: Message) -> None:
        if self._uplink is not None:
            self._uplink.send_soon(message)


def _now() -> Now:
    return Now(time.monotonic(), time.time_ns())

"""The shell around `stages`: imports the service, feeds events in, carries instructions out on one loop."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
from anyio.streams.memory import MemoryObjectReceiveStream

from snowdrop.domain.errors import TimedOutError
from snowdrop.domain.receipt import Span
from snowdrop.domain.secret import FILE_MARK, SECRETS_FOLDER
from snowdrop.domain.trace import TraceSpan
from snowdrop.replica.build import build_servable
from snowdrop.replica.calls import carrying_calls
from snowdrop.replica.link import AgentLink
from snowdrop.replica.servable import Servable
from snowdrop.replica.server import HttpServer
from snowdrop.replica.stages import (
    EXIT_OK,
    DrainAsked,
    Event,
    Exit,
    FinishRequests,
    ImportDone,
    Instruction,
    Lifecycle,
    RequestsDone,
    RunShutdown,
    RunStartup,
    ShutdownDone,
    StageRaised,
    StartupDone,
    TellDrained,
    TellFailed,
    TellImported,
    TellReady,
)
from snowdrop.replica.tracing import SpanTeller, Traced
from snowdrop.replica.userfault import UserRaised, stage_error
from snowdrop.wire.replica import Boot, Drain, Drained, Imported, ModelHandle, Ready, StageFailed

if TYPE_CHECKING:
    from snowdrop.weights.loaded import LoadedModel

EVENTS_MAX = 64
DRAIN_GRACE_S = 0.2
"""A request may have been on its way when the gateway learned of the drain; it is still accepted for this long."""

CUT_S_MAX = 3.0
"""How long calls that outlast the drain bound get to end once cancelled; the agent kills soon after."""


def apply_environment(boot: Boot) -> None:
    """Before the service's imports, which may read it."""
    os.environ.update(boot.env)
    folder = Path(f"{SECRETS_FOLDER}-{boot.key.replica}")
    for name, value in boot.secrets.items():
        if name.startswith(FILE_MARK):
            folder.mkdir(mode=0o700, exist_ok=True)
            path = folder / name.removeprefix(FILE_MARK)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
                file.write(value.text)
            os.environ["SNOWDROP_SECRETS"] = str(folder)
        else:
            os.environ[name] = value.text


def run(link: AgentLink, boot: Boot, fds: tuple[int, ...], booted_unix_ns: int) -> int:
    """Lives the replica's life from its imports on; returns the exit code. Takes the descriptors over."""
    try:
        return Runtime(link, boot, fds, booted_unix_ns).run()
    finally:
        # In a sandbox it goes with it; without one it would stay in the machine's memory.
        shutil.rmtree(f"{SECRETS_FOLDER}-{boot.key.replica}", ignore_errors=True)


class Runtime:
    """One replica. A span of its main line starts where the one before ended, so that nothing is unaccounted."""

    def __init__(self, link: AgentLink, boot: Boot, fds: tuple[int, ...], booted_unix_ns: int) -> None:
        self._link = link
        self._boot = boot
        self._fds = fds
        self._booted_unix_ns = booted_unix_ns
        self._imported_unix_ns = booted_unix_ns
        self._import_spans: tuple[Span, ...] = ()
        self._lifecycle = Lifecycle()
        self._exit_code = EXIT_OK
        self._loading: list[LoadedModel] = []

    def run(self) -> int:
        code_directory = Path(self._boot.code_directory)
        begun_unix_ns = time.time_ns()
        try:
            servable = build_servable(self._boot.spec, self._boot.key.deployment, code_directory)
        except BaseException as error:  # noqa: BLE001 -- SystemExit at import is a failed stage, too
            return self._import_failed(error)
        self._imported_unix_ns = time.time_ns()
        self._import_spans = (
            _span("import", self._booted_unix_ns, self._imported_unix_ns),
            _span("runtime", self._booted_unix_ns, begun_unix_ns, parent="import"),
            _span("service", begun_unix_ns, self._imported_unix_ns, parent="import"),
        )
        return anyio.run(self._live, servable, backend="asyncio", backend_options={"use_uvloop": True})

    def _import_failed(self, error: BaseException) -> int:
        for instruction in self._lifecycle.handle(self._stage_raised("import", error)):
            if isinstance(instruction, TellFailed):
                self._link.send(StageFailed(stage=instruction.stage, error=instruction.error))
            elif isinstance(instruction, Exit):
                self._exit_code = instruction.code
        return self._exit_code

    async def _live(self, servable: Servable) -> int:
        self._servable = servable
        self._server = HttpServer(Traced(servable, self._span_sink()))
        self._events, events = anyio.create_memory_object_stream[Event](EVENTS_MAX)
        async with carrying_calls(self._link, self._boot.spec):
            return await self._live_carried(events)

    async def _live_carried(self, events: MemoryObjectReceiveStream[Event]) -> int:
        with self._events, events:
            async with anyio.create_task_group() as self._group:
                self._events.send_nowait(ImportDone())
                self._link.call_on_drain(self._drain_poster())
                self._group.start_soon(self._live_beside)
                # No bound: this is the replica's life, and the agent ends it.
                async for event in events:
                    for instruction in self._lifecycle.handle(event):
                        await self._carry_out(instruction)
        return self._exit_code

    async def _live_beside(self) -> None:
        """A service that ends by itself takes the replica along: nobody would answer any more."""
        self._exit_code = await self._servable.live()
        self._group.cancel_scope.cancel()

    def _span_sink(self) -> Callable[[TraceSpan], None]:
        """Where the spans of sampled requests go: to the agent, or nowhere if the platform sends no traces."""
        if not self._boot.tracing:
            return lambda _span: None
        teller = SpanTeller(self._link.send)
        teller.start()
        return teller.add

    def _drain_poster(self) -> Callable[[Drain], None]:
        loop = asyncio.get_running_loop()

        def post(event: Event) -> None:
            # After the end there is nobody left to drain.
            with suppress(anyio.ClosedResourceError, anyio.BrokenResourceError):
                self._events.send_nowait(event)

        def on_drain(drain: Drain) -> None:
            with suppress(RuntimeError):  # the loop is closed: as above
                loop.call_soon_threadsafe(post, DrainAsked(drain_s_max=drain.drain_s_max))

        return on_drain

    async def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case TellImported():
                self._link.send(Imported(spans=self._import_spans))
            case RunStartup():
                self._group.start_soon(self._startup)
            case TellReady():
                span = _span("startup", self._imported_unix_ns, time.time_ns())
                self._link.send(Ready(spans=(span,)))
            case FinishRequests():
                self._group.start_soon(self._finish_requests, instruction.drain_s_max)
            case RunShutdown():
                self._group.start_soon(self._shutdown)
            case TellFailed():
                self._link.send(StageFailed(stage=instruction.stage, error=instruction.error))
            case TellDrained():
                self._link.send(Drained())
            case Exit():
                self._exit_code = instruction.code
                self._group.cancel_scope.cancel()

    async def _startup(self) -> None:
        try:
            await self._servable.start({handle.param: self._load(handle) for handle in self._boot.models})
            await anyio.to_thread.run_sync(self._wait_complete)
        except UserRaised as error:
            await self._events.send(self._stage_raised("startup", error))
            return
        self._group.start_soon(self._serve)
        await self._server.listening.wait()
        await self._events.send(StartupDone())

    async def _serve(self) -> None:
        await self._server.serve(sockets=[socket.socket(fileno=self._fds[0])])
        await self._events.send(RequestsDone())

    async def _finish_requests(self, drain_s_max: float) -> None:
        await anyio.sleep(DRAIN_GRACE_S)
        self._server.finish(drain_s_max=drain_s_max + CUT_S_MAX)
        await anyio.sleep(drain_s_max)  # ended by the exit, if all is answered before
        self._servable.cut(
            TimedOutError(
                "the replica is stopping and could not wait longer for the answer",
                where=f"drain_s_max={drain_s_max:g}",
                next_step="send it again, or raise the service's `drain_s_max`",
            )
        )

    async def _shutdown(self) -> None:
        try:
            await self._servable.shutdown()
        except UserRaised as error:
            await self._events.send(self._stage_raised("shutdown", error))
        else:
            await self._events.send(ShutdownDone())

    def _stage_raised(self, stage: str, error: BaseException) -> StageRaised:
        return StageRaised(error=stage_error(error, stage, Path(self._boot.code_directory)).body())

    def _load(self, handle: ModelHandle) -> LoadedModel:
        # Here, for a service without models starts sooner without what loads them.
        from snowdrop.weights.loaded import LoadedModel  # noqa: PLC0415

        s_max = self._boot.spec.startup_s_max
        model = LoadedModel.from_handle(
            handle,
            self._fds,
            wait_directory=partial(self._link.wait_directory, handle.name, s_max),
            renew=partial(self._link.renew_model, handle.name),
            wait_s_max=s_max,
        )
        if not handle.lazy:
            self._loading.append(model)
        return model

    def _wait_complete(self) -> None:
        """All tensors are on the node: no request may wait for the network, or find that they never come."""
        while self._loading:
            self._loading.pop().wait_complete(self._boot.spec.startup_s_max)


def _span(name: str, start_unix_ns: int, end_unix_ns: int, *, parent: str = "") -> Span:
    return Span(name=name, start_unix_ns=start_unix_ns, end_unix_ns=end_unix_ns, parent=parent)

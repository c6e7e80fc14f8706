"""Wires the gateway's processes: the owner (with a worker of its own, or several beside it), a relaying worker."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import msgspec
from aiohttp import web

from snowdrop.domain.errors import SnowdropError
from snowdrop.domain.layout import StateLayout
from snowdrop.domain.settings import GatewaySettings, Settings
from snowdrop.gateway.app import build_app
from snowdrop.gateway.broker import Broker, LocalBroker, RemoteBroker
from snowdrop.gateway.calls.door import serving_calls
from snowdrop.gateway.carrier import Carrier
from snowdrop.gateway.edge.gauges import QueueGauges
from snowdrop.gateway.edge.listen import kept_http2, listen_http2
from snowdrop.gateway.edge.metrics import MetricsApp, metrics_peers, serving_metrics
from snowdrop.gateway.edge.server import BACKLOG, EdgeServer, Listening, spare_collector
from snowdrop.gateway.edge.tls import Certificate, open_certificate
from snowdrop.gateway.finished import observer_of, reported_to
from snowdrop.gateway.link import ControlLink
from snowdrop.gateway.owner import Owner
from snowdrop.gateway.queue import QueueCore
from snowdrop.gateway.relay import Relay
from snowdrop.gateway.tasks.client import TaskControl
from snowdrop.gateway.tasks.dispatcher import Dispatcher
from snowdrop.gateway.tasks.edge import TaskEdge, task_edge
from snowdrop.gateway.upstream.pool import Upstreams
from snowdrop.gateway.workers import STOP_MARGIN_S, Keeper, Kept
from snowdrop.telemetry.metrics import process_registry
from snowdrop.telemetry.observing import Listener
from snowdrop.telemetry.requests import RequestCounts
from snowdrop.telemetry.tracing import open_tracing
from snowdrop.wire.calls import SOCKET_SUFFIX
from snowdrop.wire.processes import own_process

COUNTS_S = 1.0
"""How often a worker hands its counts to the owner: the most that its death can lose."""
FIXED = (
    *("host", "port", "workers", "keys_required", "load_report_s", "http2", "http2_port"),
    *("tls_certificate_file", "tls_key_file", "tls_version_min"),
)
"""Settings that a reload leaves as they were at the start."""
log = logging.getLogger("snowdrop.gateway")
UntilStopped = Callable[[anyio.CancelScope], Coroutine[Any, Any, None]]


class _Edge(msgspec.Struct, frozen=True, kw_only=True):
    """Where a gateway process listens, and what a reload reads again."""

    layout: StateLayout
    gateway: GatewaySettings
    listening: list[Listening]
    certificate: Certificate | None
    ready: Callable[[], None]
    beside: list[Keeper] = msgspec.field(default_factory=list)

    def server(self, relay: Relay, app: web.Application, gateway: GatewaySettings) -> EdgeServer:
        return EdgeServer(app, self.listening, shutdown_s_max=gateway.shutdown_s_max, cut=relay.cut)


class _Worker:
    """What relays in one process: its app can be made anew, over the same connections and the same broker."""

    def __init__(self, carrier: Carrier, *, ready: Callable[[], bool], tasks: TaskEdge) -> None:
        self._carrier = carrier
        self._ready = ready
        self._tasks = tasks

    def app(self, gateway: GatewaySettings) -> tuple[Relay, web.Application]:
        relay = Relay(
            self._carrier,
            request_bytes_max=gateway.request_bytes_max,
            websocket_idle_s_max=gateway.websocket_idle_s_max,
        )
        return relay, build_app(relay, ready=self._ready, tasks=self._tasks)


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


async def run_gateway(
    layout: StateLayout,
    settings: Settings,
    *,
    listen_fd: int,
    ready: Callable[[], None],
    until_stopped: UntilStopped,
) -> None:
    """The owner of the queues. With one worker it relays itself, with more it keeps them."""
    gateway = settings.gateway
    name = f"gateway-{os.getpid()}"
    for socket_path in layout.calls.glob(f"*{SOCKET_SUFFIX}"):
        socket_path.unlink(missing_ok=True)  # of workers that were killed: their owner is gone as well
    core = QueueCore(keys_required=gateway.keys_required)
    owner = Owner(core, name)
    link = ControlLink(str(layout.link_socket), name, owner)
    registry = process_registry()
    registry.register(owner.counts)
    registry.register(QueueGauges(core))
    certificate = open_certificate(gateway)
    with ExitStack() as sockets:
        listening = [
            Listening(
                socket=sockets.enter_context(socket.socket(fileno=listen_fd)),
                tls=certificate.context if certificate is not None else None,
            )
        ]
        if gateway.http2:
            listening.append(Listening(socket=sockets.enter_context(_edge_socket(layout.edge_socket))))
        edge = _Edge(layout=layout, gateway=gateway, listening=listening, certificate=certificate, ready=ready)
        async with (
            serving_metrics(MetricsApp(registry, metrics_peers(layout)), settings.metrics, layout.metrics_socket),
            anyio.create_task_group() as background,
        ):
            background.start_soon(link.run)
            background.start_soon(partial(owner.run, load_report_s=gateway.load_report_s))
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(until_stopped, tasks.cancel_scope)
                tasks.start_soon(partial(_dispatch, layout, settings, owner, holder=name))
                if certificate is not None:
                    tasks.start_soon(certificate.watch)
                if gateway.http2:
                    await _keep_http2(edge, sockets.enter_context(listen_http2(gateway)), tasks)
                if gateway.workers > 1:
                    background.start_soon(owner.serve_workers, await _listen_unix(layout.owner_socket))
                    await _keep_workers(edge, tasks)
                upstreams = Upstreams()
                tasks.start_soon(upstreams.run)
                broker = LocalBroker(owner, "worker-0")
                with carrying(broker, upstreams, settings, owner.counts.request_done) as carrier:
                    spare_collector()
                    async with task_edge(layout) as durable, calls_of(carrier, layout, gateway, "worker-0"):
                        worker = _Worker(carrier, ready=lambda: core.connected, tasks=durable)
                        await _serve_generations(edge, worker)
            background.cancel_scope.cancel()


async def run_worker(
    layout: StateLayout,
    settings: Settings,
    *,
    name: str,
    listen_fds: tuple[int, ...],
    ready: Callable[[], None],
    until_stopped: UntilStopped,
) -> None:
    """A relaying worker of an owner in another process. At SIGHUP it drains for its successor and ends."""
    gateway = settings.gateway
    broker, counts, upstreams = RemoteBroker(name), RequestCounts(), Upstreams()
    certificate = open_certificate(gateway)
    with ExitStack() as stack:
        listening = _inherited(stack, listen_fds, certificate)
        carrier = stack.enter_context(carrying(broker, upstreams, settings, counts.request_done))
        async with task_edge(layout) as durable, anyio.create_task_group() as background:
            stream = await anyio.connect_unix(layout.owner_socket)
            await background.start(broker.run, stream)
            background.start_soon(_hand_over, broker, counts)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(until_stopped, tasks.cancel_scope)
                tasks.start_soon(upstreams.run)
                tasks.start_soon(broker.cancel_when_gone, tasks.cancel_scope)
                if certificate is not None:
                    tasks.start_soon(certificate.watch)
                spare_collector()
                worker = _Worker(carrier, ready=lambda: broker.connected, tasks=durable)
                async with calls_of(carrier, layout, gateway, name):
                    await _serve_until_replaced(worker, gateway, listening, ready)
                tasks.cancel_scope.cancel()
            broker.counted(counts.taken())
            await anyio.lowlevel.checkpoint()
            background.cancel_scope.cancel()


async def _dispatch(layout: StateLayout, settings: Settings, owner: Owner, *, holder: str) -> None:
    """Carries tasks until it is cancelled; `holder` is the gateway's name on its link to control."""
    control, upstreams = TaskControl(str(layout.control_socket)), Upstreams()
    async with control.open(), anyio.create_task_group() as beside:
        beside.start_soon(upstreams.run)
        with carrying(LocalBroker(owner, "tasks"), upstreams, settings, owner.counts.request_done) as carrier:
            dispatcher = Dispatcher(control, carrier, settings.tasks, holder=holder, spool=layout.run / "tasks")
            await dispatcher.run(shutdown_s_max=settings.gateway.shutdown_s_max)


async def _serve_until_replaced(
    worker: _Worker, gateway: GatewaySettings, listening: list[Listening], ready: Callable[[], None]
) -> None:
    """Serves until SIGHUP says that a successor does; then ends what it has begun."""
    relay, app = worker.app(gateway)
    server = EdgeServer(app, listening, shutdown_s_max=gateway.shutdown_s_max, cut=relay.cut)
    await server.start()
    try:
        with anyio.open_signal_receiver(signal.SIGHUP) as signals:
            ready()
            async for _signal in signals:
                break
        relay.draining = True
        await server.drain(drain_s_max=gateway.reload_s_max)
    finally:
        await server.stop()


async def _hand_over(broker: RemoteBroker, counts: RequestCounts) -> None:
    while True:
        await anyio.sleep(COUNTS_S)
        broker.counted(counts.taken())


async def _serve_generations(edge: _Edge, worker: _Worker) -> None:
    """Serves in this process; at SIGHUP a new server takes over while the old one drains. Never returns."""
    gateway = edge.gateway
    relay, app = worker.app(gateway)
    server = edge.server(relay, app, gateway)
    await server.start()
    try:
        with anyio.open_signal_receiver(signal.SIGHUP) as signals:
            edge.ready()
            async with anyio.create_task_group() as draining:
                async for _signal in signals:
                    fresh = reloaded(edge, gateway)
                    if fresh is None:
                        continue
                    gateway = fresh
                    old_relay, old = relay, server
                    relay, app = worker.app(gateway)
                    server = edge.server(relay, app, gateway)
                    await server.start()
                    old_relay.draining = True
                    draining.start_soon(partial(old.drain, drain_s_max=gateway.reload_s_max))
    finally:
        await server.stop()


async def _keep_workers(edge: _Edge, tasks: anyio.abc.TaskGroup) -> None:
    """Keeps workers in processes of their own; at SIGHUP it replaces them, one after the other. Never returns."""
    fds = tuple(one.socket.fileno() for one in edge.listening)
    gateway = edge.gateway
    keepers = [Keeper(_kept_worker(edge.layout.root, gateway, number, fds)) for number in range(gateway.workers)]
    async with anyio.create_task_group() as starting:
        for keeper in keepers:
            starting.start_soon(tasks.start, keeper.run)
    with anyio.open_signal_receiver(signal.SIGHUP) as signals:
        edge.ready()
        async for _signal in signals:
            if reloaded(edge, gateway) is not None:
                for keeper in keepers:
                    keeper.replace()


async def _keep_http2(edge: _Edge, listener: socket.socket, tasks: anyio.abc.TaskGroup) -> None:
    keeper = Keeper(kept_http2(edge.layout.root, edge.gateway, listener.fileno()))
    await tasks.start(keeper.run)
    edge.beside.append(keeper)


def _kept_worker(state: Path, gateway: GatewaySettings, number: int, fds: tuple[int, ...]) -> Kept:
    def command(life: str, ready_fd: int) -> list[str]:
        made = [*own_process("snowdrop.main"), "gateway-worker", "--state", str(state)]
        made += ["--ready-fd", str(ready_fd), "--listen-fd", ",".join(map(str, fds)), "--worker", life]
        return made

    return Kept(
        name=f"worker-{number}",
        command=command,
        pass_fds=fds,
        stop_s_max=gateway.shutdown_s_max,
        replace_s_max=gateway.reload_s_max + gateway.shutdown_s_max + STOP_MARGIN_S,
    )


def reloaded(edge: _Edge, gateway: GatewaySettings) -> GatewaySettings | None:
    """The settings as they are on disk, the certificate loaded again; None, and a line in the log, if unusable."""
    certificate = edge.certificate
    try:
        fresh = msgspec.json.decode(edge.layout.settings.read_bytes(), type=Settings).gateway
        if certificate is not None:
            certificate.reload()
    except (OSError, msgspec.DecodeError, SnowdropError) as error:
        log.error("nothing is reloaded: %s", error)
        return None
    fixed = [name for name in FIXED if getattr(fresh, name) != getattr(gateway, name)]
    if fixed:
        log.warning(
            "%s: a change takes effect at the next `snowdrop up`", ", ".join(f"gateway.{n}" for n in fixed)
        )
    log.info("reloading: new workers take over")
    for keeper in edge.beside:
        keeper.tell(signal.SIGHUP)
    return msgspec.structs.replace(fresh, **{name: getattr(gateway, name) for name in FIXED})


def _inherited(sockets: ExitStack, fds: tuple[int, ...], certificate: Certificate | None) -> list[Listening]:
    """Sockets made by the owner; TLS is for those that strangers reach."""
    found: list[Listening] = []
    for fd in fds:
        inherited = sockets.enter_context(socket.socket(fileno=fd))
        tls = certificate.context if certificate is not None and inherited.family != socket.AF_UNIX else None
        found.append(Listening(socket=inherited, tls=tls))
    return found


def _edge_socket(path: Path) -> socket.socket:
    """Where the HTTP/2 listener brings its requests to whichever worker is free."""
    path.unlink(missing_ok=True)
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(path))
    path.chmod(0o600)
    made.listen(BACKLOG)
    return made


async def _listen_unix(path: Path) -> anyio.abc.SocketListener:
    path.unlink(missing_ok=True)
    return await anyio.create_unix_listener(path, mode=0o600)


def calls_of(
    carrier: Carrier, layout: StateLayout, settings: GatewaySettings, worker: str
) -> AbstractAsyncContextManager[None]:
    """Takes calls between services while inside; to be around the server of clients."""
    return serving_calls(
        carrier,
        layout.calls / f"{worker}{SOCKET_SUFFIX}",
        request_bytes_max=settings.request_bytes_max,
        shutdown_s_max=settings.shutdown_s_max,
    )

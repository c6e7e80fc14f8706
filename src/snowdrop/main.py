"""The only place where things are wired together: the four kinds of process, and the command line's entry.

`python -m snowdrop.main PROCESS --state DIR` runs one process of the platform; the supervisor starts them so.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc
import msgspec

from snowdrop.domain.errors import SnowdropError
from snowdrop.domain.layout import StateLayout
from snowdrop.domain.settings import Settings
from snowdrop.wire.processes import own_process

if TYPE_CHECKING:
    from snowdrop.wire.api import Info
from snowdrop.telemetry.logs import configure_logs

_PR_SET_PDEATHSIG = 1
FLUSH_S_MAX = 5.0
PROCESSES = ("supervise", "control", "agent", "gateway", "gateway-worker", "gateway-http2")


def cli() -> None:
    """Entry of the `snowdrop` command."""
    from snowdrop.cli.app import run

    run()


def main() -> int:
    """Entry of the platform's processes."""
    parser = argparse.ArgumentParser(prog="snowdrop.main")
    parser.add_argument(
        "process", choices=["supervise", "control", "agent", "gateway", "gateway-worker", "gateway-http2"]
    )
    parser.add_argument("--state", required=True)
    parser.add_argument("--ready-fd", type=int, required=True)
    parser.add_argument(
        "--listen-fd", type=_descriptors, default=(), dest="listen_fds", help="one, or several: 5,6"
    )
    parser.add_argument("--lock-fd", type=int, default=-1)
    parser.add_argument("--worker", default="worker-0")
    arguments = parser.parse_args()
    # A terminal's Ctrl-C is for `up` or the supervisor, which stop the others in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if arguments.process.startswith("gateway"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it means: reload; until somebody listens, nothing
    if arguments.process != "supervise":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if arguments.process in {"control", "agent"}:
        _keep_from_core_dumps()
    os.set_inheritable(arguments.ready_fd, False)
    layout = StateLayout(Path(arguments.state))
    settings = msgspec.json.decode(layout.settings.read_bytes(), type=Settings)
    configure_logs(settings.logs, arguments.process)
    run: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
        "supervise": lambda: _supervise(layout, settings, arguments),
        "control": lambda: _control(layout, settings, arguments),
        "agent": lambda: _agent(layout, settings, arguments),
        "gateway": lambda: _gateway(layout, settings, arguments),
        "gateway-worker": lambda: _gateway_worker(layout, settings, arguments),
        "gateway-http2": lambda: _gateway_http2(layout, settings, arguments),
    }
    failed: list[str] = []
    try:
        anyio.run(run[arguments.process], backend_options={"use_uvloop": True})
    except* SnowdropError as group:
        failed += [str(error) for error in _leaves(group)]
    for line in failed:
        print(f"{arguments.process}: {line}", file=sys.stderr, flush=True)
    return 1 if failed else 0


def _descriptors(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _keep_from_core_dumps() -> None:
    """Secrets pass through these processes: no page of theirs is written, to files or to pipes (core(5))."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with suppress(OSError):  # a kernel without it writes no core of a limit of 0 either, but to a pipe
        Path("/proc/self/coredump_filter").write_text("0")


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]


def _say_ready(arguments: argparse.Namespace) -> None:
    os.write(arguments.ready_fd, b"1")
    os.close(arguments.ready_fd)


async def _until_stopped(scope: anyio.CancelScope) -> None:
    """Cancels `scope` at SIGTERM."""
    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _signal in signals:
            scope.cancel()


async def _listen_unix(path: Path) -> anyio.abc.SocketListener:
    path.unlink(missing_ok=True)
    return await anyio.create_unix_listener(path, mode=0o600)


async def _supervise(layout: StateLayout, settings: Settings, arguments: argparse.Namespace) -> None:
    from snowdrop.agent.leftmounts import sweep_mounts
    from snowdrop.engine.local import Supervisor

    def command(name: str, ready_fd: int) -> list[str]:
        base = [*own_process("snowdrop.main"), name, "--state", str(layout.root)]
        return [*base, "--ready-fd", str(ready_fd), "--listen-fd", str(arguments.listen_fds[0])]

    os.set_inheritable(arguments.lock_fd, False)  # held to the end of this process, by nobody else
    layout.platform.unlink(missing_ok=True)  # of a platform that was killed
    with socket.socket(fileno=arguments.listen_fds[0]) as listener:
        supervisor = Supervisor(layout, settings, listener, command)
        try:
            await supervisor.run(lambda: _say_ready(arguments))
        finally:
            # An agent that was killed, or stopped while it started, has left its mounts, and no other comes.
            sweep_mounts(layout.mounts, layout.mounts_record)


def _info(layout: StateLayout, settings: Settings, listen_fd: int) -> Info:
    """What clients of control are told of the platform."""
    from snowdrop import __version__
    from snowdrop.wire.api import Info

    with socket.socket(fileno=listen_fd) as listener:
        host, port = listener.getsockname()[:2]
    return Info(
        version=__version__,
        state=str(layout.root),
        gateway_url=settings.gateway.url(host, port),
        origin_url=settings.content.origin_url,
        origin=settings.content.origin_options(),
        sandbox="",
        nodes=(),
        gateways=(),
    )


async def _control(layout: StateLayout, settings: Settings, arguments: argparse.Namespace) -> None:
    from snowdrop.content.origin import open_origin
    from snowdrop.content.signing import KeyStore
    from snowdrop.control.api import Api
    from snowdrop.control.loop import ControlLoop
    from snowdrop.control.metrics import ControlMetrics, UsageMetrics
    from snowdrop.control.origin_roots import OriginRoots, platform_id
    from snowdrop.control.peers import Peers
    from snowdrop.control.recorder import Recorder
    from snowdrop.control.secrets import Secrets
    from snowdrop.control.tasks.assembly import ControlTasks
    from snowdrop.control.volumes import Volumes
    from snowdrop.state.sqlite import SqliteState
    from snowdrop.telemetry.metrics import metrics_route, process_registry
    from snowdrop.wire.http import serving_unix

    info = _info(layout, settings, arguments.listen_fds[0])
    state = await SqliteState.open(layout.database)
    try:
        recorder = Recorder()
        loop = ControlLoop(state, recorder, tick_s=settings.control.tick_s)
        if settings.control.make_room:
            loop.world.make_room_idle_s = settings.control.make_room_idle_s
        peers = Peers(loop, settle_s_max=settings.control.settle_s_max)
        registry = process_registry()
        metrics = ControlMetrics(registry, loop.world)
        loop.replica_changed, peers.caller_served = metrics.replica_changed, metrics.caller_served
        loop.rollout_ended = metrics.rollout_ended
        loop.secrets = await Secrets.open(state, layout.secret_keys, loop.world)
        loop.volumes = volumes = Volumes(state, layout.volumes, settings.agent, loop.world)
        durable = ControlTasks(
            loop, peers, settings, registry, files=layout.tasks, webhook_keys=layout.keys / "webhooks"
        )
        for load in (loop.load, peers.load_keys, durable.load):
            await load()
        origin = open_origin(settings.content.origin_url, settings.content.origin_options())
        roots = OriginRoots(
            origin, KeyStore(layout.keys), state, loop.world, platform_id(layout.keys / "platform")
        )
        links = await _listen_unix(layout.link_socket)
        app = Api(loop, peers, info, roots).app()
        usage = UsageMetrics(registry, state, loop.world)
        app.router.add_routes([*durable.routes(), metrics_route(registry, look=usage.look)])
        api = serving_unix(app, layout.control_socket)
        async with links, api, anyio.create_task_group() as recording:
            recording.start_soon(recorder.run)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_until_stopped, tasks.cancel_scope)
                trim = partial(recorder.keep_trimmed, state, settings.control)
                for run in (partial(peers.serve, links), loop.run, durable.run, volumes.watch, trim):
                    tasks.start_soon(run)
                _say_ready(arguments)
            await recorder.flush(FLUSH_S_MAX)
            recording.cancel_scope.cancel()
    finally:
        layout.link_socket.unlink(missing_ok=True)
        await state.aclose()


async def _agent(layout: StateLayout, settings: Settings, arguments: argparse.Namespace) -> None:
    from snowdrop.agent.assembly import run_agent

    await run_agent(layout, settings, ready=lambda: _say_ready(arguments), until_stopped=_until_stopped)


async def _gateway(layout: StateLayout, settings: Settings, arguments: argparse.Namespace) -> None:
    from snowdrop.gateway.assembly import run_gateway

    await run_gateway(
        layout,
        settings,
        listen_fd=arguments.listen_fds[0],
        ready=lambda: _say_ready(arguments),
        until_stopped=_until_stopped,
    )


async def _gateway_worker(layout: StateLayout, settings: Settings, arguments: argparse.Namespace) -> None:
    from snowdrop.gateway.assembly import run_worker

    await run_worker(
        layout,
        settings,
        name=arguments.worker,
        listen_fds=arguments.listen_fds,
        ready=lambda: _say_ready(arguments),
        until_stopped=_until_stopped,
    )


async def _gateway_http2(layout: StateLayout, settings: Settings, arguments: argparse.Namespace) -> None:
    from snowdrop.gateway.edge.http2 import run_http2

    await run_http2(
        layout,
        settings,
        listen_fd=arguments.listen_fds[0],
        ready=lambda: _say_ready(arguments),
        until_stopped=_until_stopped,
    )


if __name__ == "__main__":
    sys.exit(main())

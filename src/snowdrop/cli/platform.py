"""`up`, `down`, `config`, `doctor`: the platform itself."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.text import Text

from snowdrop.agent.leftmounts import sweep_mounts
from snowdrop.agent.probe import Probe, probe_sandbox, run_all
from snowdrop.cli.output import Context, JsonFlag, console, context, errors, reported, say_json, table
from snowdrop.content.origin import open_origin
from snowdrop.content.signing import KeyStore
from snowdrop.domain.errors import PlatformDownError, SandboxError, SnowdropError, TimedOutError
from snowdrop.engine.local import PlatformRecord, is_running, read_record, take_lock
from snowdrop.wire.api import Info
from snowdrop.wire.processes import own_process

UP_S_MAX = 30.0
DOWN_S_MAX = 90.0
NODE_S_MAX = 20.0
BACKLOG = 1024


def up(
    port: Annotated[int | None, typer.Option(help="Port of the gateway; 0 takes a free one.")] = None,
    host: Annotated[str | None, typer.Option(help="Address of the gateway.")] = None,
    workers: Annotated[int | None, typer.Option(help="Gateway processes that relay.")] = None,
    unsafe_no_sandbox: Annotated[
        bool, typer.Option("--unsafe-no-sandbox", help="Run replicas as plain processes. Only for your own code.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Start the platform on this machine: gateway, control and one node agent."""
    with reported():
        flags: dict[str, Any] = {"gateway.port": port, "gateway.host": host, "gateway.workers": workers}
        if unsafe_no_sandbox:
            flags["agent.unsafe_no_sandbox"] = True
        ctx = context(json=json, flags=flags)
        started = _start(ctx)
        info = _wait_for_node(ctx)
        if ctx.json:
            say_json(info)
            return
        if not started and any(value is not None for value in flags.values()):
            errors.print("the options given have no effect on a platform that is up: `snowdrop down` first")
        verb = "is up" if started else "was up already"
        console.print(Text.assemble(("Snowdrop ", "bold"), verb, f" at {info.gateway_url}"))
        console.print(f"  state    {info.state}")
        console.print(f"  replicas {info.sandbox.split(';')[0]}")
        console.print("  next     snowdrop model push NAME DIRECTORY · snowdrop deploy service.py · snowdrop down")


def down(json: JsonFlag = False) -> None:
    """Stop the platform in order: requests end first, then replicas, then the records are written."""
    with reported():
        ctx = context(json=json)
        running = read_record(ctx.layout)
        if running is not None:
            os.kill(running.supervisor_pid, signal.SIGTERM)
            _wait_for_end(ctx, running)
        else:
            _clear_after_crash(ctx)
        if ctx.json:
            say_json({"stopped": running is not None})
        else:
            console.print("Snowdrop is down" if running else "Snowdrop was not running")


def config(json: JsonFlag = False) -> None:
    """Print every setting with its value and where it comes from."""
    with reported():
        ctx = context(json=json)
        if ctx.json:
            rows = ctx.resolved.rows()
            say_json([{"name": name, "value": value, "source": source} for name, value, source in rows])
            return
        shown = table("setting", "value", "source")
        for name, value, source in ctx.resolved.rows():
            shown.add_row(name, value, Text(source, style="dim" if source == "default" else ""))
        console.print(shown)
        console.print(Text(f"\nchange them in {ctx.layout.config}, or as SNOWDROP_GROUP_NAME", style="dim"))


def doctor(json: JsonFlag = False) -> None:
    """Try out what this machine can do, and say how to turn on what is off."""
    with reported():
        ctx = context(json=json)
        ctx.layout.make()
        probes: list[Probe] = []
        for probe in run_all(ctx.layout.root, ctx.resolved.settings.agent.bwrap):
            probes.append(probe)
            if not ctx.json:
                _print_probe(probe)
        if ctx.json:
            say_json(probes)


def _print_probe(probe: Probe) -> None:
    mark = ("ok   ", "green") if probe.ok else ("off  ", "yellow")
    console.print(Text.assemble(mark, (f"{probe.name:<18}", "bold"), probe.found or probe.missing))
    if not probe.ok:
        if probe.found and probe.missing:
            console.print(Text(f"{'':23}{probe.missing}"))
        if probe.turn_on:
            console.print(Text.assemble(f"{'':23}", ("turn on: ", "bold"), probe.turn_on))


def _start(ctx: Context) -> bool:
    """Starts the supervisor, detached, and waits until all processes are ready. False if a platform is up."""
    settings = ctx.resolved.settings
    ctx.layout.make()
    lock = take_lock(ctx.layout)
    if lock is None:
        return False
    try:
        open_origin(
            settings.content.origin_url, settings.content.origin_options()
        )  # refuses one that this version cannot read
        if not settings.agent.unsafe_no_sandbox:
            _require_sandbox(settings.agent.bwrap)
        KeyStore(ctx.layout.keys).signer()  # so that what is trusted is known before anything is pushed
        ctx.layout.settings.write_bytes(msgspec.json.encode(settings))
        with _listen(settings.gateway.host, settings.gateway.port) as listener:
            _spawn_supervisor(ctx, listener, lock)
    finally:
        os.close(lock)  # the supervisor has its own copy
    return True


def _spawn_supervisor(ctx: Context, listener: socket.socket, lock: int) -> None:
    reader, writer = os.pipe()
    log_path = ctx.layout.process_logs / "supervisor.log"
    with open(log_path, "ab") as output:
        command = [*own_process("snowdrop.main"), "supervise", "--state", str(ctx.layout.root)]
        command += ["--ready-fd", str(writer), "--listen-fd", str(listener.fileno()), "--lock-fd", str(lock)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(writer, listener.fileno(), lock),
            start_new_session=True,
        )
    os.close(writer)
    ready = os.read(reader, 1)  # ends at the latest when the supervisor's own bounds do
    os.close(reader)
    if not ready:
        process.wait(timeout=UP_S_MAX)
        raise PlatformDownError(
            f"the platform did not start: {_last_line(log_path)}",
            where=str(log_path),
            next_step="the files in that folder have the whole story",
        )


def _wait_for_end(ctx: Context, running: PlatformRecord) -> None:
    limit_s = time.monotonic() + DOWN_S_MAX
    while is_running(ctx.layout):
        if time.monotonic() > limit_s:
            raise TimedOutError(
                f"the platform (pid {running.supervisor_pid}) still runs",
                where=f"down_s_max={DOWN_S_MAX:g}",
                next_step=f"see {ctx.layout.process_logs}, or kill -9 {running.supervisor_pid}",
            )
        time.sleep(0.02)


def _clear_after_crash(ctx: Context) -> None:
    """Removes the mounts of a platform whose supervisor was killed too."""
    if not ctx.layout.lock.exists():
        return
    lock = take_lock(ctx.layout)
    if lock is None:
        return  # one is just starting
    try:
        sweep_mounts(ctx.layout.mounts, ctx.layout.mounts_record)
    finally:
        os.close(lock)


def _require_sandbox(bwrap: str) -> None:
    """Refuses to start where replicas could not be isolated, unless told to go without."""
    probe = probe_sandbox(bwrap)
    if not probe.ok:
        raise SandboxError(
            f"no sandbox can be made here: {probe.missing}",
            where="sandbox",
            next_step=f"{probe.turn_on}; or, for your own code only, `snowdrop up --unsafe-no-sandbox`",
        )


def _listen(host: str, port: int) -> socket.socket:
    """The gateway's listening socket. Made here, so that a port in use is said by the command that asked."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise SnowdropError(
            f"the gateway cannot listen: {getattr(error, 'strerror', None) or error}",
            where=f"gateway.host={host}, gateway.port={port}",
            next_step="choose another with --port (0 takes a free one), or stop what uses it",
        ) from error
    listener.listen(BACKLOG)
    return listener


def _wait_for_node(ctx: Context) -> Info:
    """The platform's description once its node has joined and its gateway knows the table."""
    limit_s = time.monotonic() + NODE_S_MAX
    while True:
        try:
            info = ctx.client.get(Info, "info")
            if info.nodes and info.gateways:
                return info
        except PlatformDownError:
            if time.monotonic() > limit_s:
                raise
        if time.monotonic() > limit_s:
            raise TimedOutError(
                "the node did not join", where=f"node_s_max={NODE_S_MAX:g}", next_step=_logs_step(ctx)
            )
        time.sleep(0.01)


def _logs_step(ctx: Context) -> str:
    return f"see the logs in {ctx.layout.process_logs}"


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"

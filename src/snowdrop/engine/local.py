"""The embedded engine: a supervisor that starts control, agent and gateway, and starts again what dies.

It holds no state. The gateway's listening socket is its own and inherited, so a gateway that is restarted
loses no connection that was not accepted yet, and the port stays. Processes end with the supervisor.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import anyio
import anyio.abc
import msgspec

from snowdrop.domain.errors import PlatformDownError, SnowdropError, TimedOutError
from snowdrop.domain.layout import StateLayout
from snowdrop.domain.secret import KEYS_VARIABLE
from snowdrop.domain.settings import Settings

READY_S_MAX = 15.0
RESTART_S_FIRST = 0.05
RESTART_S_MAX = 5.0
STOP_MARGIN_S = 5.0
"""What a process gets beyond its own bound for stopping before it is killed."""
STEADY_S = 10.0
"""A process that ran for so long is started again at once; the back-off begins anew."""
LOG_BYTES_MAX = 8 << 20
START_ORDER = (("control",), ("agent", "gateway"))
STOP_ORDER = ("gateway", "agent", "control")

log = logging.getLogger("snowdrop.supervisor")
Command = Callable[[str, int], list[str]]


class PlatformRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Written when the platform is up, removed when it is down."""

    supervisor_pid: int
    gateway_url: str
    pids: dict[str, int]
    started_unix_ns: int


def take_lock(layout: StateLayout) -> int | None:
    """The state folder's lock, or None if a platform holds it. Pass it on to the supervisor, then close it.

    A lock cannot be mistaken for another's, as the id of a process can after a restart of the machine.
    """
    fd = os.open(layout.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_running(layout: StateLayout) -> bool:
    """Whether a platform lives in this state folder."""
    if not layout.lock.exists():
        return False
    fd = take_lock(layout)
    if fd is None:
        return True
    os.close(fd)
    return False


def read_record(layout: StateLayout) -> PlatformRecord | None:
    """Who runs in this state folder; None if nobody does, or not yet."""
    if not is_running(layout):
        return None
    try:
        return msgspec.json.decode(layout.platform.read_bytes(), type=PlatformRecord)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


class Supervisor:
    """`command(name, ready_fd)` gives the argv of a process that writes a byte to `ready_fd` when it is ready."""

    def __init__(self, layout: StateLayout, settings: Settings, listener: socket.socket, command: Command) -> None:
        self._layout = layout
        self._settings = settings
        self._listener = listener
        self._command = command
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._started_unix_ns = time.time_ns()
        self._stopping = False
        host, port = listener.getsockname()[:2]
        self.gateway_url = settings.gateway.url(host, port)

    async def run(self, ready: Callable[[], None]) -> None:
        """Starts everything, calls `ready`, keeps it running until SIGTERM or SIGINT, stops it in order."""
        try:
            async with anyio.create_task_group() as tasks:
                for stage in START_ORDER:
                    async with anyio.create_task_group() as starting:
                        for name in stage:
                            starting.start_soon(self._start, name)
                for name in STOP_ORDER:
                    tasks.start_soon(self._keep, name)
                self._write_record()
                ready()
                with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                    async for _signal in signals:
                        break
                self._stopping = True
                await self._stop_all()
                tasks.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                self._stopping = True
                await self._stop_all()
            self._layout.platform.unlink(missing_ok=True)

    async def _start(self, name: str) -> None:
        """Starts a process and waits until it says that it is ready. Raises TimedOutError or PlatformDownError."""
        reader, writer = os.pipe()
        log_path = self._layout.process_logs / f"{name}.log"
        try:
            try:
                _rotate(log_path)
                said_bytes = _size_bytes(log_path)
                fds = (writer, self._listener.fileno())
                env = environment_of(name, os.environ)
                self._processes[name] = _spawn(self._command(name, writer), log_path, fds, env)
            except OSError as error:
                raise PlatformDownError(
                    f"{name} cannot be started: {error}",
                    where=str(error.filename or log_path),
                    next_step="free what is short (memory, processes, disk), or repair the installation",
                ) from error
            finally:
                os.close(writer)
            with anyio.fail_after(READY_S_MAX):
                await anyio.wait_readable(reader)
            if not os.read(reader, 1):
                raise PlatformDownError(
                    f"{name} ended while it started: {_last_line(log_path, said_bytes)}",
                    where=str(log_path),
                    next_step="the file has the whole story",
                )
        except TimeoutError as error:
            raise TimedOutError(f"{name} was not ready in time", where=f"ready_s_max={READY_S_MAX:g}") from error
        finally:
            os.close(reader)
        log.info("%s is ready, pid %d", name, self._processes[name].pid)

    async def _keep(self, name: str) -> None:
        """Starts the process again whenever it ends."""
        pause_s = RESTART_S_FIRST
        while True:
            started_s = time.monotonic()
            await _wait(self._processes[name])
            if self._stopping:
                return
            code = self._processes[name].returncode
            if time.monotonic() - started_s >= STEADY_S:
                pause_s = RESTART_S_FIRST
            log.warning("%s ended with %s; starting it again in %.2f s", name, code, pause_s)
            await anyio.sleep(pause_s)
            pause_s = min(pause_s * 2, RESTART_S_MAX)
            try:
                await self._start(name)
            except SnowdropError as error:
                log.error("%s", error)
                self._processes[name].kill()
            try:
                self._write_record()
            except OSError as error:  # a full disk must not end what runs
                log.error("cannot write %s: %s", self._layout.platform, error)

    async def _stop_all(self) -> None:
        """In order, so that requests end before replicas, and replicas before the one who records it."""
        bounds_s = {
            "gateway": self._settings.gateway.shutdown_s_max + STOP_MARGIN_S,
            "agent": self._settings.agent.stop_s_max + STOP_MARGIN_S,
            "control": 10.0,
        }
        for name in STOP_ORDER:
            process = self._processes.get(name)
            if process is None or process.returncode is not None:
                continue
            process.terminate()
            with anyio.move_on_after(bounds_s[name]):
                await _wait(process)
            if process.poll() is None:
                log.warning("%s did not stop in %g s and is killed", name, bounds_s[name])
                process.kill()
                await _wait(process)

    def _write_record(self) -> None:
        record = PlatformRecord(
            supervisor_pid=os.getpid(),
            gateway_url=self.gateway_url,
            pids={name: process.pid for name, process in self._processes.items()},
            started_unix_ns=self._started_unix_ns,
        )
        fresh = self._layout.platform.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(record))
        fresh.replace(self._layout.platform)


def environment_of(name: str, environ: Mapping[str, str]) -> dict[str, str]:
    """A process's environment: the platform's keys are for control alone, not for the agent and what it starts."""
    return {key: value for key, value in environ.items() if name == "control" or key != KEYS_VARIABLE}


def _spawn(
    command: list[str], log_path: Path, fds: tuple[int, ...], env: dict[str, str]
) -> subprocess.Popen[bytes]:
    with open(log_path, "ab") as output:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=fds, env=env
        )


async def _wait(process: subprocess.Popen[bytes]) -> None:
    """Waits for a child without a thread: a pidfd becomes readable when it ends."""
    if process.poll() is not None:
        return
    pidfd = os.pidfd_open(process.pid)
    try:
        await anyio.wait_readable(pidfd)
    finally:
        os.close(pidfd)
    process.wait()


def _rotate(path: Path) -> None:
    if path.exists() and path.stat().st_size > LOG_BYTES_MAX:
        path.replace(path.with_suffix(".log.1"))


def _size_bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _last_line(path: Path, from_bytes: int) -> str:
    """What was said last after the first `from_bytes` bytes, which are of earlier runs."""
    lines = path.read_bytes()[from_bytes:].decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"

"""A service that is a command: a server started as a child, waited for until it is ready, relayed to, stopped.

Its standard streams are the replica's, so what it prints is in the logs without passing through here. When it ends
while nobody asked it to, the replica ends with it: what was in flight is told so, and a new replica is started.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import anyio
import anyio.abc
import anyio.to_thread

from snowdrop.domain.errors import SnowdropError, TimedOutError, UserCodeError
from snowdrop.domain.servers import CommandSpec
from snowdrop.domain.service import ServiceSpec
from snowdrop.replica import command_entry
from snowdrop.replica.bounded import BoundedServable
from snowdrop.replica.forward import forward_http, forward_websocket, open_session
from snowdrop.replica.servable import Receive, Scope, Send

if TYPE_CHECKING:
    from snowdrop.weights.loaded import LoadedModel

HOST = "127.0.0.1"
PROBE_S_MAX = 10.0
PROBE_EVERY_S_MIN = 0.02
PROBE_EVERY_S_MAX = 0.25
KILLED_S_MAX = 5.0
SIGNAL_EXIT_BASE = 128


class CommandService(BoundedServable):
    """One command of one replica."""

    def __init__(self, spec: ServiceSpec, command: CommandSpec, deployment: str, code_directory: Path) -> None:
        super().__init__(spec)
        self._command = command
        self._deployment = deployment
        self._code_directory = code_directory
        self._child: anyio.abc.Process | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._ready = anyio.Event()
        self._is_stopping = False
        self._base = ""

    async def start(self, models: dict[str, LoadedModel]) -> None:
        """Starts the command and waits until it is ready. Raises UserCodeError, TimedOutError."""
        self.open_gate()
        # It may block until the files are complete, where nothing can be mounted.
        directories = {name: await anyio.to_thread.run_sync(_path, model) for name, model in models.items()}
        values = self._values(directories)
        argv = self._command.filled(values)
        socket_path = values["socket"] if self._command.wants_socket else None
        self._base = f"http://{HOST}" if socket_path else f"http://{HOST}:{values['port']}"
        self._session = open_session(socket_path)
        entry = [sys.executable, "-I", "-S", str(command_entry.__file__), str(os.getpid())]
        self._child = await anyio.open_process(
            [*entry, *argv],
            stdin=subprocess.DEVNULL,
            stdout=None,  # the replica's own: the log reads them
            stderr=None,
            cwd=self._code_directory,
            env=_environment(values, directories),
        )
        await self._wait_ready(self._child, argv[0])
        self._ready.set()

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        forward = forward_websocket if scope["type"] == "websocket" else forward_http
        await forward(self._session, self._base, scope, receive, send)

    async def live(self) -> int:
        """Waits until the command ends although nobody asked it to; the exit code for the replica."""
        await self._ready.wait()
        assert self._child is not None, "it is ready"
        status = await self._child.wait()
        if self._is_stopping:
            await anyio.sleep_forever()
        print(f"snowdrop: the service's command {_how(status)}", file=sys.stderr, flush=True)
        return SIGNAL_EXIT_BASE - status if status < 0 else status or 1

    async def shutdown(self) -> None:
        """SIGTERM, and SIGKILL after `stop_s_max`."""
        self._is_stopping = True
        child = self._child
        if child is not None and child.returncode is None:
            child.send_signal(signal.SIGTERM)
            with anyio.move_on_after(self._command.stop_s_max):
                await child.wait()
            if child.returncode is None:
                print(
                    f"snowdrop: the command did not end within {self._command.stop_s_max:g} s of SIGTERM: killed",
                    file=sys.stderr,
                    flush=True,
                )
                child.kill()
                with anyio.move_on_after(KILLED_S_MAX):
                    await child.wait()
        await self._session.close()
        if self._folder is not None:
            self._folder.cleanup()

    async def _wait_ready(self, child: anyio.abc.Process, program: str) -> None:
        bound_s = self._spec.startup_s_max
        failure: SnowdropError | None = None
        async with anyio.create_task_group() as group:

            async def fail_if_it_ends() -> None:
                nonlocal failure
                status = await child.wait()
                failure = UserCodeError(
                    f"the command {_how(status)} before it was ready",
                    where=program,
                    next_step="`snowdrop logs` shows what it printed; correct the command and deploy again",
                )
                group.cancel_scope.cancel()

            group.start_soon(fail_if_it_ends)
            with anyio.move_on_after(bound_s) as bound:
                await self._probe_until_ready()
            if bound.cancelled_caught:
                where = f"{self._command.ready} of the command" if self._command.ready else "the command's port"
                failure = TimedOutError(
                    f"the command was not ready in time: {where} did not answer",
                    where=f"startup_s_max={bound_s:g}",
                    next_step="raise it, or correct `ready=`; `snowdrop logs` shows what it printed",
                )
            group.cancel_scope.cancel()
        if failure is not None:
            self._is_stopping = True
            if child.returncode is None:
                child.kill()
            await self._session.close()
            raise failure

    async def _probe_until_ready(self) -> None:
        pause_s = PROBE_EVERY_S_MIN
        while not await self._is_ready():
            await anyio.sleep(pause_s)
            pause_s = min(PROBE_EVERY_S_MAX, pause_s * 1.5)

    async def _is_ready(self) -> bool:
        bound = aiohttp.ClientTimeout(total=PROBE_S_MAX)
        path = self._command.ready or "/"
        try:
            async with self._session.get(self._base + path, timeout=bound, allow_redirects=False) as response:
                return not self._command.ready or 200 <= response.status < 300
        except aiohttp.ClientConnectorError:
            return False
        except (aiohttp.ClientError, TimeoutError):
            return not self._command.ready  # it took the connection, whatever it thinks of the request

    def _values(self, directories: Mapping[str, Path]) -> dict[str, str]:
        command = self._command
        values = {
            "host": HOST,
            "python": sys.executable,
            "code": str(self._code_directory),
            "deployment": self._deployment,
        }
        if command.wants_socket:
            # In a folder of its own: a server may refuse a socket that is there, or one in a folder open to all.
            self._folder = tempfile.TemporaryDirectory(prefix="server-")
            values["socket"] = str(Path(self._folder.name, "http.sock"))
        else:
            values["port"] = str(command.port or _free_port())
        for model in self._spec.models:
            directory = str(directories[model.param])
            values[f"model:{model.param}"] = values[f"model:{model.name}"] = directory
            if len(self._spec.models) == 1:
                values["model"] = directory
        return values


def _path(model: LoadedModel) -> Path:
    return model.path


def _free_port() -> int:
    """A port that nobody listens on; in a sandbox, which has its own loopback, nobody else can take it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _environment(values: Mapping[str, str], directories: Mapping[str, Path]) -> dict[str, str]:
    """The replica's environment, with what programs are told that take no placeholders."""
    own = dict(os.environ)
    folder = str(Path(sys.executable).parent)
    own["PATH"] = os.pathsep.join([folder, own.get("PATH", os.defpath)])
    own.setdefault("PYTHONUNBUFFERED", "1")  # logs are read while it runs
    if "port" in values:
        own.setdefault("PORT", values["port"])
    for name, directory in directories.items():
        own[f"SNOWDROP_MODEL_{name.upper()}"] = str(directory)
    own["SNOWDROP_DEPLOYMENT"] = values["deployment"]
    return own


def _how(status: int) -> str:
    if status < 0:
        names = {number.value: number.name for number in signal.Signals}
        return f"was ended by {names.get(-status, f'signal {-status}')}"
    return f"ended with exit code {status}"

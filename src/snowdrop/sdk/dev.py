"""A service on a loopback port without the platform, for debugging: no sandbox, no queue, no scaling.

The process that watches the files never imports user code: it holds the listening socket and starts a child
(`python -m snowdrop.sdk.dev ...`) that serves on it, again after every change. So the address stays, and calls
made during a restart wait in the socket's backlog. A service that does not start answers every call with why.
"""

import argparse
import errno
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import anyio
import msgspec
import uvicorn
import watchfiles

from snowdrop.domain.errors import ConflictError, InvalidInputError, SnowdropError, UserCodeError
from snowdrop.domain.service import ServiceSpec
from snowdrop.replica.app import build_service
from snowdrop.replica.asgi import AsgiService
from snowdrop.replica.callclient import carrying_to
from snowdrop.replica.command import CommandService
from snowdrop.replica.servable import Servable
from snowdrop.sdk.example import curl_command
from snowdrop.sdk.load import USER_RAISED, Declared, check_file, load_service, place_of, split_target
from snowdrop.sdk.servers import ServedApp
from snowdrop.weights.loaded import LoadedModel

STOP_S_MAX = 10.0
"""Longest time that requests in flight hold up a restart; then they are cut."""
BACKLOG_MAX = 128
WATCH_TICK_MS = 1_000

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Message, Receive, Send], Awaitable[None]]


def run_dev(  # noqa: PLR0917 -- the options of `snowdrop dev`
    file: Path,
    class_name: str | None,
    host: str,
    port: int,
    models: dict[str, Path],
    reload: bool,
    refs: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Serves the service in `file` until interrupted; `models` are directories by model name, port 0 any free one;
    `refs` are addresses of the services that it calls, by name.

    With `reload`, errors of the service are shown and the next change of a file in its folder tries again.
    Raises NotFoundError or InvalidInputError for a wrong file or model directory, ConflictError for a port in use,
    and without `reload` UserCodeError when the service does not start.
    """
    path = check_file(file)
    for name, directory in models.items():
        if not directory.is_dir():
            raise InvalidInputError(
                f"{directory} is not a directory", where=f"model {name}", next_step="give it as NAME=DIRECTORY"
            )
    with _listen(host, port) as listener:
        child = _Child(path, class_name, listener, models, refs, stays=reload)
        try:
            _watch(path.parent, child) if reload else _serve_once(child)
        except KeyboardInterrupt:
            return
        finally:
            child.stop()


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), backlog=BACKLOG_MAX)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConflictError(
                f"port {port} is in use", where=f"{host}:{port}", next_step="choose another, or 0 for any free one"
            ) from error
        raise InvalidInputError(
            f"cannot listen: {error.strerror or error}", where=f"{host}:{port}", next_step="choose another address"
        ) from error


class _Child:
    """The process that serves; it ends with its parent, whose end of a pipe it watches."""

    def __init__(
        self,
        path: Path,
        class_name: str | None,
        listener: socket.socket,
        models: dict[str, Path],
        refs: Mapping[str, str],
        *,
        stays: bool,
    ) -> None:
        target = f"{path}:{class_name}" if class_name else str(path)
        # -P keeps this folder off the module path, -B keeps byte code out of the service's folder.
        self._command = [sys.executable, "-P", "-B", "-m", "snowdrop.sdk.dev", target]
        self._command += [f"--model={name}={directory.absolute()}" for name, directory in models.items()]
        self._command += [f"--ref={name}={url}" for name, url in refs.items()]
        self._command += [f"--listen-fd={listener.fileno()}", *(["--stays"] if stays else [])]
        self._folder = path.parent
        self._listen_fd = listener.fileno()
        self._process: subprocess.Popen[bytes] | None = None
        self._alive_fd = -1

    def start(self) -> None:
        watched_fd, self._alive_fd = os.pipe()
        try:
            self._process = subprocess.Popen(
                [*self._command, f"--parent-fd={watched_fd}"],
                pass_fds=(self._listen_fd, watched_fd),
                cwd=self._folder,
                # A group of its own: an interrupt reaches the parent alone, which then stops the child in order.
                process_group=0,
            )
        finally:
            os.close(watched_fd)

    def wait(self) -> int:
        """The exit status, once it has ended."""
        assert self._process is not None, "started before"
        return self._process.wait()

    def ended(self) -> int | None:
        return None if self._process is None else self._process.poll()

    def stop(self) -> None:
        """Ends it in order: what is in flight is answered within STOP_S_MAX. One that is starting ends at once."""
        if self._process is None:
            return
        self._process.terminate()
        os.close(self._alive_fd)
        try:
            self._process.wait(2 * STOP_S_MAX)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(STOP_S_MAX)
        self._process = None


def _serve_once(child: _Child) -> None:
    child.start()
    status = child.wait()
    if status:
        raise UserCodeError(
            "the service did not start or ended early",
            where=f"exit status {status}",
            next_step="its output above says why",
        )


def _watch(folder: Path, child: _Child) -> None:
    child.start()
    is_reported = False
    changes = watchfiles.watch(folder, rust_timeout=WATCH_TICK_MS, yield_on_timeout=True, raise_interrupt=True)
    for changed in changes:
        if changed:
            names = sorted({Path(path).name for _, path in changed})
            _say(f"changed: {', '.join(names[:5])}; restarting")
            child.stop()
            child.start()
            is_reported = False
        elif not is_reported and (status := child.ended()) is not None:
            _say(f"the service ended with status {status}; change a file to start it again")
            is_reported = True


def _say(text: str) -> None:
    print(text, flush=True)


class _Options(argparse.Namespace):
    target: str
    model: list[str]
    ref: list[str]
    listen_fd: int
    parent_fd: int
    stays: bool


def main(arguments: list[str]) -> int:
    """The child: serves on the inherited socket until the parent's end of the pipe closes."""
    parser = argparse.ArgumentParser(prog="python -m snowdrop.sdk.dev", description="used by `snowdrop dev`")
    parser.add_argument("target", metavar="FILE[:Class]")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=DIRECTORY")
    parser.add_argument("--ref", action="append", default=[], metavar="NAME=URL")
    parser.add_argument("--listen-fd", type=int, required=True)
    parser.add_argument("--parent-fd", type=int, required=True)
    parser.add_argument("--stays", action="store_true")
    options = parser.parse_args(arguments, _Options())
    with socket.socket(fileno=options.listen_fd) as listener:
        return anyio.run(_live, options, listener)


async def _live(options: _Options, listener: socket.socket) -> int:
    file, class_name = split_target(options.target)
    path = file.absolute()
    directories = dict(each.split("=", 1) for each in options.model)
    failure: SnowdropError | None = None
    code = 0
    refs = dict(each.split("=", 1) for each in options.ref)
    async with carrying_to(refs), anyio.create_task_group() as group:
        try:
            declared, spec = load_service(path, class_name)
            service = _build(declared, spec, path.parent)

            async def live() -> None:
                nonlocal code
                code = await service.live()
                group.cancel_scope.cancel()  # it has ended by itself

            group.start_soon(live)
            await service.start(_open_models(spec, directories))
        except USER_RAISED as error:
            failure = _show_failure(error, path)
        else:
            _announce(spec, listener)
            await _serve(service.asgi, listener, options.parent_fd)
            try:
                await service.shutdown()
            except USER_RAISED as error:
                _show_failure(error, path)
                code = 1
        group.cancel_scope.cancel()
    if failure is None:
        return code
    if not options.stays:
        return 1
    await _serve(_Failed(failure), listener, options.parent_fd)
    return 0


def _build(declared: Declared, spec: ServiceSpec, folder: Path) -> Servable:
    if spec.command is not None:
        return CommandService(spec, spec.command, spec.class_name, folder)
    if isinstance(declared, ServedApp):
        assert spec.asgi is not None, "a service without a command that is no class is an app"
        assert declared.app is not None, "an app has one"
        return AsgiService(spec, spec.asgi, declared.app)
    return build_service(declared, spec)


def _open_models(spec: ServiceSpec, directories: dict[str, str]) -> dict[str, LoadedModel]:
    names = [model.name for model in spec.models]
    for name in directories:
        if name not in names:
            raise InvalidInputError(
                f"{spec.class_name} has no model {name!r}",
                where=f"model {name}",
                next_step=f"it has: {', '.join(names) or 'none'}",
            )
    for name in names:
        if name not in directories:
            raise InvalidInputError(
                f"{spec.class_name} needs the model {name!r}",
                where=f"model {name}",
                next_step=f"give its directory: --model {name}=DIRECTORY",
            )
    return {
        model.param: LoadedModel.from_directory(directories[model.name], name=model.name) for model in spec.models
    }


def _show_failure(error: BaseException, path: Path) -> SnowdropError:
    """Prints what went wrong, for the user's own errors with the traceback."""
    if isinstance(error, SnowdropError):
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error
    traceback.print_exception(error)
    failure = UserCodeError(
        f"{type(error).__name__}: {error}".removesuffix(": "),
        where=place_of(error, path.parent),
        next_step="correct it: the service starts again when a file changes",
    )
    print(f"error: {failure}", file=sys.stderr, flush=True)
    return failure


def _announce(spec: ServiceSpec, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{port}"
    lines = [f"{spec.class_name} at {url}"]
    lines += [f"  POST {each.path}  {each.doc.partition(chr(10))[0]}".rstrip() for each in spec.endpoints]
    lines += [f"  POST {path}  (OpenAI)" for path in spec.openai]
    if spec.endpoints:
        lines += ["try:", f"  {curl_command(spec.endpoints[0], url)}"]
    _say("\n".join(lines))


class _Failed:
    """An app that answers every call with why the service did not start."""

    def __init__(self, failure: SnowdropError) -> None:
        self._status = max(failure.http_status, 500)
        self._body = msgspec.json.encode({"error": failure.body()})

    async def __call__(self, _scope: Message, _receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(self._body)).encode())]
        await send({"type": "http.response.start", "status": self._status, "headers": headers})
        await send({"type": "http.response.body", "body": self._body})


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the parent orders the end, see `_serve`


async def _serve(app: Asgi, listener: socket.socket, parent_fd: int) -> None:
    config = uvicorn.Config(
        app,
        loop="none",
        lifespan="off",
        interface="asgi3",
        log_level="warning",
        workers=1,
        timeout_graceful_shutdown=int(STOP_S_MAX),
    )
    server = _Server(config)
    async with anyio.create_task_group() as group:

        async def end_with_parent() -> None:
            await anyio.wait_readable(parent_fd)  # nothing is ever written: readable means closed
            server.should_exit = True

        async def end_when_told() -> None:
            with anyio.open_signal_receiver(signal.SIGTERM) as received:
                async for _ in received:
                    server.should_exit = True

        group.start_soon(end_with_parent)
        group.start_soon(end_when_told)
        await server.serve(sockets=[listener])
        group.cancel_scope.cancel()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

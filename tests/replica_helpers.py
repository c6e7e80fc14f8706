"""A service in process over bare ASGI, and a real replica process over a packet pair."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import msgspec

from snowdrop.domain.ids import DEFAULT_TENANT, DeploymentName, ReplicaId, RevisionId
from snowdrop.domain.replica import ReplicaKey
from snowdrop.domain.service import SERVICE_ATTRIBUTE, ServiceSpec
from snowdrop.replica.app import ServiceApp, build_service
from snowdrop.wire.codec import PROTOCOL_VERSION
from snowdrop.wire.packet import PacketChannel, packet_pair
from snowdrop.wire.replica import FROM_REPLICA, Boot, FromReplica, ModelHandle

WAIT_S_MAX = 20


def spec_of(cls: type, **changes: Any) -> ServiceSpec:
    return msgspec.structs.replace(getattr(cls, SERVICE_ATTRIBUTE), **changes)


class Answer:
    """An answer as its ASGI messages make it."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.chunks: list[bytes] = []
        self.is_complete = False

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    def json(self) -> Any:
        return json.loads(self.body)


class Caller:
    """One request; `leave` makes its client disconnect."""

    def __init__(self, app: ServiceApp) -> None:
        self._app = app
        self._left = anyio.Event()
        self.chunk_seen = anyio.Event()
        self.answer = Answer()

    def leave(self) -> None:
        self._left.set()

    async def send(
        self,
        path: str,
        body: object = None,
        *,
        method: str = "POST",
        query: str = "",
        headers: dict[str, str] | None = None,
        parts: list[bytes] | None = None,
    ) -> Answer:
        pending = [json.dumps({} if body is None else body).encode()] if parts is None else list(parts)
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query.encode(),
            "headers": [(k.encode(), v.encode()) for k, v in (headers or {}).items()],
        }

        async def receive() -> dict[str, Any]:
            if pending:
                part = pending.pop(0)
                return {"type": "http.request", "body": part, "more_body": bool(pending)}
            await self._left.wait()
            return {"type": "http.disconnect"}

        async def take(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.answer.status = message["status"]
                self.answer.headers = {k.decode(): v.decode() for k, v in message["headers"]}
                return
            if message["body"]:
                self.answer.chunks.append(message["body"])
                self.chunk_seen.set()
            self.answer.is_complete = not message["more_body"]

        with anyio.fail_after(WAIT_S_MAX):
            await self._app.asgi(scope, receive, take)
        return self.answer


@contextlib.asynccontextmanager
async def started(cls: type, **changes: Any) -> AsyncIterator[ServiceApp]:
    app = build_service(cls, spec_of(cls, **changes))
    await app.start({})
    yield app
    await app.shutdown()


async def post(app: ServiceApp, path: str, body: object = None, **options: Any) -> Answer:
    return await Caller(app).send(path, body, **options)


class ReplicaProcess:
    """`python -m snowdrop.replica`, and the agent's end of its channel."""

    def __init__(self, process: subprocess.Popen[str], sock: socket.socket, socket_path: Path) -> None:
        self.process = process
        self._sock = sock
        self.channel: PacketChannel[FromReplica] = PacketChannel(sock, FROM_REPLICA)
        self.socket_path = socket_path

    def receive(self) -> FromReplica:
        # The channel makes its socket blocking, which takes away any timeout set on it.
        readable, _, _ = select.select([self._sock], [], [], WAIT_S_MAX)
        assert readable, f"the replica has said nothing for {WAIT_S_MAX} s"
        message, fds = self.channel.receive_blocking()
        assert not fds
        return message

    def until(self, kind: type) -> Any:
        while not isinstance(message := self.receive(), kind):
            pass
        return message

    def wait(self) -> tuple[int, str]:
        """Exit code and stderr."""
        _, stderr = self.process.communicate(timeout=WAIT_S_MAX)
        return self.process.returncode, stderr

    def session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            "http://replica",
            connector=aiohttp.UnixConnector(str(self.socket_path)),
            timeout=aiohttp.ClientTimeout(total=WAIT_S_MAX),
        )


@contextlib.contextmanager
def replica_process(
    folder: Path,
    code: str,
    spec: ServiceSpec,
    *,
    models: tuple[ModelHandle, ...] = (),
    env: dict[str, str] | None = None,
) -> Iterator[ReplicaProcess]:
    """A replica of the service in `code`, to which Boot has been sent."""
    code_directory = folder / "code"
    code_directory.mkdir()
    (code_directory / "service.py").write_text(code)
    socket_path = folder / "replica.sock"
    ours, theirs = packet_pair()
    with ours, theirs, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(socket_path))
        listener.listen(64)
        process = subprocess.Popen(
            [sys.executable, "-m", "snowdrop.replica", "--fd", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=dict(os.environ),
        )
        theirs.close()
        replica = ReplicaProcess(process, ours, socket_path)
        key = ReplicaKey(
            tenant=DEFAULT_TENANT,
            deployment=DeploymentName("demo"),
            revision=RevisionId("rev-1"),
            replica=ReplicaId("rep-1"),
        )
        boot = Boot(
            version=PROTOCOL_VERSION,
            key=key,
            spec=spec,
            code_directory=str(code_directory),
            models=models,
            env=env or {},
        )
        try:
            replica.channel.send_blocking(boot, (listener.fileno(),))
            listener.close()
            yield replica
        finally:
            process.kill()
            process.communicate(timeout=WAIT_S_MAX)

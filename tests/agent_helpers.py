"""A node without processes: a launcher, replicas and a data plane that the test plays itself."""

from __future__ import annotations

import os
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import msgspec

from platform_helpers import NODE, artefact, replica_key, revision
from snowdrop.agent.context import NodeContext
from snowdrop.agent.dataplane.client import EnsuredArea, EnsuredContent
from snowdrop.agent.mounts import ModelMounts
from snowdrop.agent.runner import ReplicaRunner
from snowdrop.agent.sandbox.launcher import ExitStatus, LaunchSpec, Mount
from snowdrop.agent.turns import Turns
from snowdrop.domain.deployment import BoundModel
from snowdrop.domain.errors import PlatformDownError
from snowdrop.domain.ids import Digest, ModelName, TenantId
from snowdrop.domain.manifest import ArtefactRef
from snowdrop.domain.receipt import ContentBytes, Span
from snowdrop.domain.replica import ReplicaReport, ReplicaState
from snowdrop.domain.settings import AgentSettings
from snowdrop.wire.control import StartReplica
from snowdrop.wire.dataplane import Filled
from snowdrop.wire.packet import PacketChannel
from snowdrop.wire.replica import TO_REPLICA, Boot, FromReplica, Imported, Ready, ToReplica

WAIT_S_MAX = 10.0
"""Bound of every wait of a test on the agent; reached only when something is broken."""
CODE = artefact("a").manifest
MODEL = artefact("b").manifest


def order(replica: str = "rep-1", *, name: str = "embed", model: bool = True, **spec: object) -> StartReplica:
    """An order for a replica of one code artefact and, unless told otherwise, one model called minilm."""
    bound = BoundModel(
        name=ModelName("minilm"),
        param="model",
        artefact=ArtefactRef(manifest=MODEL, kind="model", total_bytes=10, file_count=1),
    )
    models = (bound,) if model else ()
    return StartReplica(
        key=replica_key(replica, name=name),
        revision=msgspec.structs.replace(revision(name=name, **spec), models=models),
        ordered_unix_ns=1,
    )


def open_fds() -> dict[int, str]:
    """This process's descriptors and what they are."""
    found = {}
    for fd in Path("/proc/self/fd").iterdir():
        try:
            found[int(fd.name)] = str(fd.readlink())
        except FileNotFoundError:
            continue  # the listing's own
    return found


class FakeReplica:
    """A launched replica, also the handle of its sandbox: `say`, `hear` and `end` are the replica's side."""

    def __init__(self, spec: LaunchSpec) -> None:
        self.spec = spec
        self.pid = 0
        self.describe = "made up for a test"
        self.kills = 0
        self.closes = 0
        self.dies_when_killed = True
        self.close_error: Exception | None = None
        self.close_hangs = False
        self.close_released = anyio.Event()
        self.fds: tuple[int, ...] = ()
        (lifecycle,) = spec.descriptors
        self.sock = socket.socket(fileno=os.dup(lifecycle.fd))
        self.channel = PacketChannel(self.sock, TO_REPLICA)
        self.stdout_fd = os.dup(spec.output.stdout_fd)
        self.stderr_fd = os.dup(spec.output.stderr_fd)
        self._status: ExitStatus | None = None
        self._ended = anyio.Event()

    # --- the replica ---

    async def boot(self) -> Boot:
        with anyio.fail_after(WAIT_S_MAX):
            message, self.fds = await self.channel.receive()
        assert isinstance(message, Boot)
        return message

    async def hear(self) -> ToReplica:
        with anyio.fail_after(WAIT_S_MAX):
            message, fds = await self.channel.receive()
        assert fds == ()
        return message

    async def say(self, *messages: FromReplica) -> None:
        for message in messages:
            with anyio.fail_after(WAIT_S_MAX):
                await self.channel.send(message)

    async def become(self, state: ReplicaState) -> None:
        """Says what a healthy replica says until it is in `state`."""
        await self.boot()
        if state in {ReplicaState.LOADING, ReplicaState.READY}:
            await self.say(Imported(spans=(Span(name="import", start_unix_ns=1, end_unix_ns=2),)))
        if state is ReplicaState.READY:
            await self.say(Ready(spans=(Span(name="startup", start_unix_ns=2, end_unix_ns=3),)))

    def end(self, code: int | None = 0, *, by_signal: int | None = None, oom_killed: bool = False) -> None:
        """The process is gone, with everything it held."""
        if self._status is not None:
            return
        self._status = ExitStatus(
            code=code if by_signal is None else None, signal=by_signal, oom_killed=oom_killed
        )
        self.channel.close()
        for fd in (self.stdout_fd, self.stderr_fd, *self.fds):
            os.close(fd)
        self._ended.set()

    # --- its handle ---

    async def wait(self) -> ExitStatus:
        await self._ended.wait()
        assert self._status is not None
        return self._status

    def kill(self) -> None:
        self.kills += 1
        if self.dies_when_killed:
            self.end(by_signal=signal.SIGKILL)

    async def close(self) -> None:
        self.closes += 1
        self.end(by_signal=signal.SIGKILL)
        if self.close_hangs:
            await self.close_released.wait()
        if self.close_error is not None:
            raise self.close_error


class FakeLauncher:
    """`error` is raised instead of launching; nothing is launched before `gate` opens."""

    describe = "made up for a test"

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.gate: anyio.Event | None = None
        self.asked = anyio.Event()
        self.replicas: dict[str, FakeReplica] = {}
        self._news = anyio.Event()

    def visible_path(self, mount: Mount) -> str:
        return mount.target

    async def launch(self, spec: LaunchSpec) -> FakeReplica:
        self.asked.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        replica = self.replicas[spec.replica] = FakeReplica(spec)
        self._news.set()
        return replica

    async def launched(self, replica: str = "rep-1") -> FakeReplica:
        with anyio.fail_after(WAIT_S_MAX):
            while replica not in self.replicas:
                self._news = anyio.Event()
                await self._news.wait()
        return self.replicas[replica]


class FakeDataPlane:
    """Has every artefact. `errors`, `deaths` (how many calls find it gone) and `gates` are by manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.errors: dict[Digest, Exception] = {}
        self.deaths: Counter[Digest] = Counter()
        self.gates: dict[Digest, anyio.Event] = {}
        self.directory_error: Exception | None = None
        self.filled_errors: list[Exception] = []
        self.filled_content = ContentBytes()
        self.filled_gate: anyio.Event | None = None
        self.ensured: list[tuple[Digest, str, bool]] = []
        self.released: list[str] = []
        self.after_ensure: Callable[[], None] = lambda: None

    async def ensure(
        self,
        tenant: TenantId,
        manifest: Digest,
        holder: str,
        *,
        map_tensors: bool,
        lazy: bool = False,
        key_domain: str = "public",
    ) -> EnsuredContent:
        self.ensured.append((manifest, holder, map_tensors))
        await anyio.lowlevel.checkpoint()
        if manifest in self.gates:
            await self.gates[manifest].wait()
        if self.deaths[manifest] > 0:
            self.deaths[manifest] -= 1
            raise PlatformDownError("the node's data plane is gone")
        if manifest in self.errors:
            raise self.errors[manifest]
        self.after_ensure()
        return EnsuredContent(
            directory=self.folder,
            area=EnsuredArea(
                slab_fds=(os.memfd_create("area"),),
                slab_bytes=(4096,),
                area_bytes=4096,
                files=(),
                progress_fd=os.memfd_create("progress"),
                wake_fd=os.memfd_create("wake"),
            )
            if map_tensors
            else None,
            content=ContentBytes(disk=100) if map_tensors else ContentBytes(origin=10),
            spans=(Span(name="fetch", start_unix_ns=1, end_unix_ns=2),),
        )

    async def wait_filled(self, manifest: Digest, holder: str) -> Filled:
        await anyio.lowlevel.checkpoint()
        if self.filled_gate is not None:
            await self.filled_gate.wait()
        if self.filled_errors:
            raise self.filled_errors.pop(0)
        span = Span(name="fetch", start_unix_ns=1, end_unix_ns=2, parent="startup")
        return Filled(request=0, content=self.filled_content, spans=(span,))

    async def wait_directory(self, manifest: Digest) -> None:
        await anyio.lowlevel.checkpoint()
        if self.directory_error is not None:
            raise self.directory_error

    async def release(self, holder: str) -> None:
        await anyio.lowlevel.checkpoint()
        self.released.append(holder)


class Bench:
    """What a node's replicas share, made up. `reports` has all that was told, in order."""

    def __init__(self, folder: Path, **settings: float) -> None:
        self.launcher = FakeLauncher()
        self.plane = FakeDataPlane(folder / "content")
        self.reports: list[ReplicaReport] = []
        self.on_change: Callable[[ReplicaReport], None] = lambda _report: None
        self._news = anyio.Event()
        for name in ("content", "s", "logs"):
            (folder / name).mkdir()
        self.mounts = ModelMounts(folder / "mounts", folder / "mounts.json", self._data_plane)
        self.mounts.is_possible = False
        self.context = NodeContext(
            node=NODE,
            python="python3",
            launcher=self.launcher,
            data_plane=self._data_plane,
            mounts=self.mounts,
            sockets=folder / "s",
            calls=folder / "c",
            logs=folder / "logs",
            volumes=folder / "volumes",
            settings=AgentSettings(**settings),
            on_change=self._changed,
            turns=Turns(64),
        )

    async def _data_plane(self) -> FakeDataPlane:
        return self.plane

    def _changed(self, report: ReplicaReport) -> None:
        self.reports.append(report)
        self._news.set()
        self.on_change(report)

    def states(self, replica: str = "rep-1") -> list[ReplicaState]:
        return [report.state for report in self.reports if report.key.replica == replica]

    async def until(self, state: ReplicaState, replica: str = "rep-1") -> ReplicaReport:
        with anyio.fail_after(WAIT_S_MAX):
            while state not in self.states(replica):
                self._news = anyio.Event()
                await self._news.wait()
        return next(r for r in reversed(self.reports) if r.key.replica == replica)

    @asynccontextmanager
    async def living(self, start: StartReplica | None = None) -> AsyncIterator[ReplicaRunner]:
        """A runner inside; afterwards it has ended by itself and nothing of it is left."""
        before = open_fds()
        runner = ReplicaRunner(start or order(), self.context)
        done = anyio.Event()

        async def run() -> None:
            await runner.run()
            done.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            yield runner
            with anyio.fail_after(WAIT_S_MAX):
                await done.wait()
        self.nothing_left(runner.order.key.replica, before)

    def nothing_left(self, replica: str, before: dict[int, str]) -> None:
        assert open_fds() == before
        assert not (self.context.sockets / f"{replica}.sock").exists()
        launched = self.launcher.replicas.get(replica)
        is_stuck = launched is not None and (launched.close_error is not None or launched.close_hangs)
        # Memory that a process may still map goes to nobody else.
        assert self.plane.released == ([] if is_stuck else [replica])
        assert launched is None or launched.closes == 1

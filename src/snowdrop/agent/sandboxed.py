"""What one replica holds on the node: its content, listening socket, channel, log and sandbox.

Owns descriptors and gives every one of them back in `close`, in whatever state it is called.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import suppress

import anyio
import anyio.lowlevel
import msgspec

from snowdrop.agent.context import NodeContext
from snowdrop.agent.dataplane.client import EnsuredContent
from snowdrop.agent.handing import (
    Landed,
    content_mounts,
    either,
    forked_or_launched,
    is_lazy,
    listen_at,
    model_handle,
    open_log,
    wants_tensors,
    with_all_files,
)
from snowdrop.agent.logs import LogSink
from snowdrop.agent.sandbox.launcher import (
    CODE_TARGET,
    LIFECYCLE,
    MODELS_TARGET,
    Descriptor,
    ExitStatus,
    LaunchSpec,
    Mount,
    Output,
    SandboxHandle,
    replica_entry,
)
from snowdrop.agent.volumes import opened
from snowdrop.domain.deployment import BoundModel
from snowdrop.domain.errors import (
    ErrorBody,
    NotFoundError,
    PlatformDownError,
    ProtocolError,
    SandboxError,
    SnowdropError,
)
from snowdrop.domain.receipt import ContentBytes, Span
from snowdrop.wire.codec import PROTOCOL_VERSION, Message
from snowdrop.wire.control import StartReplica
from snowdrop.wire.packet import PacketChannel, packet_pair
from snowdrop.wire.replica import (
    FROM_REPLICA,
    Boot,
    DirectoryReady,
    Drain,
    FromReplica,
    ModelHandle,
    ModelRenewed,
)

LAST_WORDS_S_MAX = 1.0
"""How long after its process is gone a replica's last messages may take to be read."""
CLOSE_S_MAX = 10.0
"""How long a sandbox may take to be taken down, and how long the data plane to hear of it."""
TELL_S_MAX = 2.0
"""A replica that takes no message for so long is told nothing more; whatever it waits for is bounded there."""
ENSURE_AGAIN_MAX, ENSURE_AGAIN_S = 2, 0.05
MESSAGES_MAX, MESSAGES_PER_S_MAX = 1_000, 500
"""What a replica may say: at once, and all the time. A healthy one starts, asks for connections, tells spans."""

log = logging.getLogger("snowdrop.agent")


class Sandboxed:
    """See the module. Order of use: content, `launch`, then `keep_log`, `messages` and `wait` side by side."""

    def __init__(self, order: StartReplica, context: NodeContext) -> None:
        self._order = order
        self._context = context
        self._code: EnsuredContent | None = None
        self._models: dict[str, EnsuredContent] = {}
        self._listener: socket.socket | None = None
        self._channel: PacketChannel[FromReplica] | None = None
        self._log: LogSink | None = None
        self._volumes_env: dict[str, str] = {}
        self._handle: SandboxHandle | None = None
        self._heard_all = anyio.Event()
        self._kill_wanted = False
        self._is_gone = False
        self._renewed = anyio.Event()
        self._telling = anyio.Lock()
        self._is_deaf = False

    @property
    def describe(self) -> str:
        return self._handle.describe if self._handle is not None else ""

    def set_code(self, content: EnsuredContent) -> None:
        self._code = content

    def add_model(self, name: str, content: EnsuredContent) -> None:
        self._models[name] = content

    async def launch(self) -> None:
        """Starts the sandbox and sends Boot. Raises SandboxError or StorageFullError; `close` cleans up."""
        key, spec = self._order.key, self._order.revision.spec
        try:
            self._log = open_log(self._order, self._context)
            self._listener = listen_at(self._context.socket_path(key))
        except OSError as error:
            raise SandboxError(f"cannot prepare the replica: {error}", where=str(error.filename)) from error
        ours, theirs = packet_pair()
        self._channel = PacketChannel(ours, FROM_REPLICA)
        try:
            with opened(spec.volumes, key.tenant, self._context.volumes, self._context.settings) as volumes:
                self._volumes_env = volumes.variables(spec.volumes, self._context.launcher.visible_path)
                launch = LaunchSpec(
                    replica=key.replica,
                    entry=replica_entry(self._context.python),
                    output=Output(stdout_fd=self._log.stdout_fd, stderr_fd=self._log.stderr_fd),
                    mounts=(*content_mounts(self._code, self._models), *volumes.mounts),
                    descriptors=(Descriptor(role=LIFECYCLE, fd=theirs.fileno()),),
                    resources=spec.resources,
                    uid=volumes.uid,
                )
                self._handle = await forked_or_launched(self._order, launch, self._context)
        finally:
            theirs.close()
            self._log.close_writers()
        if self._kill_wanted:
            self._handle.kill()
        await self._send_boot()

    async def keep_log(self) -> None:
        if self._log is not None:
            await self._log.run()

    async def messages(self) -> AsyncIterator[FromReplica]:
        """What the replica says, until its end of the channel is closed. Raises ProtocolError for nonsense."""
        heard, began_s = 0, anyio.current_time()
        try:
            while self._channel is not None:
                message, fds = await self._channel.receive()
                for fd in fds:
                    os.close(fd)  # a replica has nothing to hand us
                heard += 1
                if heard > MESSAGES_MAX + MESSAGES_PER_S_MAX * (anyio.current_time() - began_s):
                    raise ProtocolError("the replica floods the agent", where=f"messages_max={MESSAGES_MAX}")
                yield message
                await anyio.lowlevel.checkpoint()  # one that always has more to say must not hold up the others
        except (EOFError, OSError, anyio.ClosedResourceError):
            return
        finally:
            self._heard_all.set()

    async def wait(self) -> ExitStatus:
        """How the process ended, once its last words have been heard."""
        if self._handle is None:
            raise SandboxError("not launched", where=str(self._order.key.replica))
        status = await self._handle.wait()
        with anyio.move_on_after(LAST_WORDS_S_MAX):
            await self._heard_all.wait()
        return status

    async def send_drain(self, drain_s_max: float) -> None:
        await self.tell(Drain(drain_s_max=drain_s_max))

    async def answer_renewal(self, model: str) -> None:
        """Gives the replica its model again, from the data plane that lives now, or tells it why not."""
        try:
            bound = self._bound(model)
            content = await self._ensure_model(bound)
        except SnowdropError as failed:
            await self.tell(ModelRenewed(model=model, error=failed.body()))
            return
        try:
            handle, fds = model_handle(bound, str(content.directory), content, first_fd=0)
            await self.tell(ModelRenewed(model=model, handle=handle), fds)
        finally:
            content.close()
        self._renewed.set()

    async def filled(self, is_over: anyio.Event) -> Landed:
        """Where the bytes of the models' areas came from, once they are filled.

        A data plane that dies meanwhile is asked again when the replica has renewed its models, or not at all once
        `is_over`: what came until then is not known. Raises why an area cannot be filled.
        """
        landed = Landed(content=ContentBytes(), spans=())
        models = sorted(self._order.revision.models, key=lambda bound: bound.lazy)
        pending = {bound.artefact.manifest: bound for bound in models}
        while pending:
            manifest, bound = next(iter(pending.items()))
            if bound.lazy:
                await is_over.wait()  # it asks for its bytes in startup: before, none are known
            renewed = self._renewed
            try:
                data_plane = await self._context.data_plane()
                filled = await data_plane.wait_filled(manifest, self._order.key.replica)
            except (PlatformDownError, NotFoundError):
                if is_over.is_set():
                    break
                await either(renewed, is_over)
                self._renewed = anyio.Event()
                continue
            del pending[manifest]
            spans = tuple(msgspec.structs.replace(span, note=bound.name) for span in filled.spans)
            landed = Landed(content=landed.content + filled.content, spans=landed.spans + spans)
        return landed

    async def answer_directory(self, model: str) -> None:
        """Waits until the model's directory is complete and tells the replica, or tells it why not."""
        error: ErrorBody | None = None
        try:
            bound = self._bound(model)
            data_plane = await self._context.data_plane()
            await data_plane.wait_directory(bound.artefact.manifest)
        except SnowdropError as failed:
            error = failed.body()
        await self.tell(DirectoryReady(model=model, error=error))

    def kill(self) -> None:
        self._kill_wanted = True
        if self._handle is not None:
            self._handle.kill()

    async def close(self) -> None:
        """Ends what still runs, gives back everything. Each part is bounded and none prevents the next."""
        try:
            with anyio.move_on_after(CLOSE_S_MAX, shield=True):
                await self._close_sandbox()
        except Exception:  # a process stuck in the kernel, a group that stays: the others live on
            log.exception("the sandbox of %s cannot be closed", self._order.key.replica)
        finally:
            self._close_sockets()
            self._close_areas()
            await self._close_log()
            await self._release()

    def _bound(self, model: str) -> BoundModel:
        for bound in self._order.revision.models:
            if bound.name == model:
                return bound
        raise NotFoundError(f"this revision has no model {model!r}", where="model")

    async def _ensure_model(self, bound: BoundModel) -> EnsuredContent:
        """Asks again if the data plane dies meanwhile: for a moment one that is gone still counts as there."""
        for _ in range(ENSURE_AGAIN_MAX):
            with suppress(PlatformDownError):
                return await self._ensure_once(bound)
            await anyio.sleep(ENSURE_AGAIN_S)
        return await self._ensure_once(bound)

    async def _ensure_once(self, bound: BoundModel) -> EnsuredContent:
        data_plane = await self._context.data_plane()
        return await data_plane.ensure(
            self._order.key.tenant,
            bound.artefact.manifest,
            self._order.key.replica,
            map_tensors=wants_tensors(self._order),
            lazy=bound.lazy,
            key_domain=bound.artefact.key_domain,
        )

    async def _close_sandbox(self) -> None:
        if self._handle is not None:
            await self._handle.close()
        self._is_gone = True

    async def _release(self) -> None:
        """Only when none of its processes is left: the memory that they map goes to others afterwards."""
        if not self._is_gone:
            log.error(
                "the sandbox of %s is not gone: its content stays pinned until the data plane ends",
                self._order.key.replica,
            )
            return
        with anyio.move_on_after(CLOSE_S_MAX, shield=True), suppress(SnowdropError):
            await self._context.mounts.release(self._order.key.replica)
        # In a time of its own: a mount that cannot be removed must not keep memory pinned.
        with anyio.move_on_after(CLOSE_S_MAX, shield=True), suppress(SnowdropError):
            # A data plane that is gone holds no pins.
            data_plane = await self._context.data_plane()
            await data_plane.release(self._order.key.replica)

    def _close_sockets(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._listener is not None:
            self._listener.close()
            self._context.socket_path(self._order.key).unlink(missing_ok=True)

    async def _close_log(self) -> None:
        if self._log is None:
            return
        self._log.close_writers()
        try:
            with anyio.move_on_after(LAST_WORDS_S_MAX, shield=True):
                await self._log.run()  # what is still in the pipes
        finally:
            self._log.close()

    async def _send_boot(self) -> None:
        if self._listener is None or self._channel is None or self._code is None:
            raise SandboxError("not prepared", where=str(self._order.key.replica))
        revision = self._order.revision
        visible = self._context.launcher.visible_path
        fds = [self._listener.fileno()]
        handles: list[ModelHandle] = []
        for bound in revision.models:
            content = self._models[bound.name]
            directory = visible(Mount(source=content.directory, target=f"{MODELS_TARGET}/{bound.name}"))
            handle, more = model_handle(bound, directory, content, first_fd=len(fds))
            handles, fds = [*handles, handle], [*fds, *more]
        boot = Boot(
            version=PROTOCOL_VERSION,
            key=self._order.key,
            spec=revision.spec,
            code_directory=visible(Mount(source=self._code.directory, target=CODE_TARGET)),
            models=tuple(handles),
            env=self._volumes_env | revision.spec.env,
            secrets=self._order.secrets,
            tracing=self._context.is_tracing,
        )
        with suppress(OSError):  # it died already: its exit says so
            await self._channel.send(boot, tuple(fds))
        # The replica has its own copies now. Ours would keep accepting connections after its death.
        self._listener.close()
        self._close_areas()

    def _close_areas(self) -> None:
        for name, content in self._models.items():
            content.close()
            self._models[name] = msgspec.structs.replace(content, area=None)

    async def tell(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        async with self._telling:
            if self._channel is None or self._is_deaf:
                return
            with suppress(OSError), anyio.move_on_after(TELL_S_MAX):  # it is gone: its exit says so
                await self._channel.send(message, fds)
                return
            self._is_deaf = True


async def replica_content(order: StartReplica, context: NodeContext, sandboxed: Sandboxed) -> Landed:
    """Brings code and models to the node, all at once, pinned for the replica."""
    spans: list[Span] = []
    total = ContentBytes()
    failed: list[SnowdropError] = []

    async def bring_or_stop(name: str | None) -> None:
        try:
            await bring(name)
        except SnowdropError as error:
            failed.append(error)
            tasks.cancel_scope.cancel()  # one that fails is enough: the rest is not worth fetching

    async def bring(name: str | None) -> None:
        nonlocal total
        bound = next((b for b in order.revision.models if b.name == name), None)
        artefact = order.revision.code if bound is None else bound.artefact
        data_plane = await context.data_plane()
        content = await data_plane.ensure(
            order.key.tenant,
            artefact.manifest,
            order.key.replica,
            map_tensors=bound is not None and wants_tensors(order),
            lazy=bound is not None and is_lazy(bound, order, context.mounts),
            key_domain=artefact.key_domain,
        )
        if bound is None:
            sandboxed.set_code(content)
        else:
            sandboxed.add_model(bound.name, content)  # before anything can go wrong: it closes the descriptors
            content = await with_all_files(content, bound.artefact, order.key, context.mounts)
            sandboxed.add_model(bound.name, content)
        total += content.content
        spans.extend(
            msgspec.structs.replace(span, parent="mount", note=bound.name if bound else "code")
            for span in content.spans
        )

    async with anyio.create_task_group() as tasks:
        for name in (None, *(bound.name for bound in order.revision.models)):
            tasks.start_soon(bring_or_stop, name)
    if failed:
        raise failed[0]
    return Landed(content=total, spans=tuple(spans))

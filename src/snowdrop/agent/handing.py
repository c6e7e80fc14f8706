"""What a replica is handed of a model: its handle, and the descriptors that go with it."""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from pathlib import Path

import anyio
import msgspec

from snowdrop.agent.context import NodeContext
from snowdrop.agent.dataplane.client import EnsuredContent
from snowdrop.agent.logs import LogLimits, LogSink
from snowdrop.agent.mounts import ModelMounts
from snowdrop.agent.sandbox.launcher import CODE_TARGET, MODELS_TARGET, LaunchSpec, Mount, SandboxHandle
from snowdrop.domain.deployment import BoundModel
from snowdrop.domain.errors import ErrorBody, SnowdropError
from snowdrop.domain.manifest import ArtefactRef
from snowdrop.domain.receipt import ContentBytes, Span
from snowdrop.domain.replica import ReplicaKey
from snowdrop.domain.secret import Redactor
from snowdrop.wire.control import StartReplica
from snowdrop.wire.replica import ModelHandle, SlabHandle

LISTEN_BACKLOG = 1024

log = logging.getLogger("snowdrop.agent")


class Landed(msgspec.Struct, frozen=True, kw_only=True):
    """What bringing a replica's content cost."""

    content: ContentBytes
    spans: tuple[Span, ...]


def wants_tensors(order: StartReplica) -> bool:
    """A command reads files and would never look at tensors in memory."""
    return order.revision.spec.command is None


def is_lazy(bound: BoundModel, order: StartReplica, mounts: ModelMounts) -> bool:
    """A command's files are fetched as it reads them, if that can be; else all of them before it starts."""
    return bound.lazy and (wants_tensors(order) or mounts.is_possible)


async def with_all_files(
    content: EnsuredContent, artefact: ArtefactRef, key: ReplicaKey, mounts: ModelMounts
) -> EnsuredContent:
    """`content` with a directory in which all files are there, if one can be mounted.

    Otherwise as it was: its small files are there, the others are waited for.
    """
    if content.has_all_files or not mounts.is_possible:
        return content
    try:
        directory = await mounts.mount(key.tenant, artefact, key.replica)
    except SnowdropError as error:
        log.warning("%s gets the files of its model when they are complete: %s", key.replica, error)
        return content
    return msgspec.structs.replace(content, directory=directory, has_all_files=True)


def model_handle(
    bound: BoundModel, directory: str, content: EnsuredContent, *, first_fd: int
) -> tuple[ModelHandle, tuple[int, ...]]:
    """The handle, and its descriptors as they follow `first_fd` others in the message; they stay the caller's."""
    area = content.area
    if area is None:
        handle = ModelHandle(
            name=bound.name,
            param=bound.param,
            directory=directory,
            lazy=bound.lazy,
            has_all_files=content.has_all_files,
        )
        return handle, ()
    slabs = tuple(SlabHandle(first_fd + index, size) for index, size in enumerate(area.slab_bytes))
    handle = ModelHandle(
        name=bound.name,
        param=bound.param,
        directory=directory,
        area_bytes=area.area_bytes,
        area_files=area.files,
        slabs=slabs,
        progress_fd=first_fd + len(slabs),
        wake_fd=first_fd + len(slabs) + 1,
        has_all_files=content.has_all_files,
        lazy=bound.lazy,
    )
    return handle, area.fds


async def either(one: anyio.Event, other: anyio.Event) -> None:
    """Returns when one of them is set."""

    async def wait(event: anyio.Event) -> None:
        await event.wait()
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait, one)
        tasks.start_soon(wait, other)


def content_mounts(code: EnsuredContent | None, models: Mapping[str, EnsuredContent]) -> tuple[Mount, ...]:
    """A revision's code and models as its replica sees them."""
    first = () if code is None else (Mount(source=code.directory, target=CODE_TARGET),)
    return (
        *first,
        *(Mount(source=each.directory, target=f"{MODELS_TARGET}/{name}") for name, each in models.items()),
    )


def listen_at(path: Path) -> socket.socket:
    """The socket that gateways connect to. The replica gets it open, so it needs no writable folder."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        listener.listen(LISTEN_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def open_log(order: StartReplica, context: NodeContext) -> LogSink:
    """The replica's log, in which none of its secrets is written. Raises OSError."""
    limits = LogLimits(log_bytes_max=context.settings.log_bytes_max)
    return LogSink(context.log_path(order.key), limits, redactor=redactor_of(order))


def redactor_of(order: StartReplica) -> Redactor:
    """Strikes the replica's secrets out."""
    return Redactor(tuple(value.text for value in order.secrets.values()))


def redacted(error: ErrorBody, redactor: Redactor) -> ErrorBody:
    """What user code says of itself, without its secrets: it is stored and shown."""
    if not redactor:
        return error
    return msgspec.structs.replace(
        error,
        message=redactor.text(error.message),
        where=redactor.text(error.where),
        next_step=redactor.text(error.next_step),
        fields=[],
    )


async def forked_or_launched(order: StartReplica, spec: LaunchSpec, context: NodeContext) -> SandboxHandle:
    """A fork of a warm parent where there is one for the replica, else a sandbox as the launcher makes it."""
    forked = None if context.warm is None else await context.warm.launch(order, spec)
    return await context.launcher.launch(spec) if forked is None else forked

"""The agent's side: calls to the data plane, and starting its process."""

from __future__ import annotations

import logging
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

import anyio
import anyio.abc
import msgspec

from snowdrop.content.settings import DataPlaneSettings
from snowdrop.domain.errors import PlatformDownError, ProtocolError, SnowdropError, error_from_body
from snowdrop.domain.ids import Digest, TenantId
from snowdrop.domain.receipt import ContentBytes, Span
from snowdrop.wire.codec import Message
from snowdrop.wire.dataplane import (
    FROM_DATA_PLANE,
    BeginStart,
    Cancel,
    Completed,
    Ensure,
    Ensured,
    Filled,
    FromDataPlane,
    Refused,
    Release,
    ServeMount,
    WaitDirectory,
    WaitFilled,
)
from snowdrop.wire.packet import PacketChannel, packet_pair
from snowdrop.wire.processes import own_process
from snowdrop.wire.replica import AreaFile

SEND_S_MAX = 10.0
"""A data plane that takes no message for so long is treated as gone."""

log = logging.getLogger("snowdrop.agent")

Answer = TypeVar("Answer", bound=Message)


class EnsuredArea(msgspec.Struct, frozen=True, kw_only=True):
    """A landing area that is being filled. `slab_fds` go with `slab_bytes`; all descriptors are the caller's."""

    slab_fds: tuple[int, ...]
    slab_bytes: tuple[int, ...]
    area_bytes: int
    files: tuple[AreaFile, ...]
    progress_fd: int
    wake_fd: int

    @property
    def fds(self) -> tuple[int, ...]:
        return (*self.slab_fds, self.progress_fd, self.wake_fd)


class EnsuredContent(msgspec.Struct, frozen=True, kw_only=True):
    """An artefact on this node. The descriptors of `area` belong to the caller, who calls `close`."""

    directory: Path
    has_all_files: bool = False
    area: EnsuredArea | None
    content: ContentBytes
    spans: tuple[Span, ...]

    def close(self) -> None:
        """Closes the area's descriptors; mappings made from them stay. To be called once."""
        for fd in self.area.fds if self.area is not None else ():
            os.close(fd)


class _Pending:
    def __init__(self) -> None:
        self.done = anyio.Event()
        self.answer: Message | None = None
        self.error: SnowdropError | None = None
        self.fds: tuple[int, ...] = ()


class DataPlane:
    """One connection. `run` must be running for calls to be answered; calls may be made by many tasks.

    Every call raises PlatformDownError once the data plane is gone, and what the content path raises otherwise.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._channel = PacketChannel(sock, FROM_DATA_PLANE)
        self._pending: dict[int, _Pending] = {}
        self._next_request = 1
        self._sending = anyio.Lock()
        self._is_down = False

    async def run(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Reads answers; returns when the data plane is gone, after every pending call has been told."""
        task_status.started()
        try:
            while True:
                message, fds = await self._channel.receive()
                self._settle(message, fds)
        except (EOFError, anyio.ClosedResourceError):
            return
        except ProtocolError as error:
            # It hears of it by the end of its channel, and ends.
            log.error("the data plane is given up: %s", error)
        finally:
            self._is_down = True
            for pending in self._pending.values():
                pending.error = _down()
                pending.done.set()
            self._channel.close()

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
        """Brings an artefact to this node, pinned for `holder` until `release(holder)`.

        Its area, if it has one, is filled from now on: see `wait_filled`. A caller that is cancelled, or that
        fails after this, releases the holder.
        """
        request = self._take_number()
        message = Ensure(
            request=request,
            tenant=tenant,
            manifest=manifest,
            holder=holder,
            map_tensors=map_tensors,
            lazy=lazy,
            key_domain=key_domain,
        )
        answer, fds = await self._call(message, request, Ensured)
        return EnsuredContent(
            directory=Path(answer.directory),
            has_all_files=answer.directory_complete,
            area=_area(answer, fds),
            content=answer.content,
            spans=answer.spans,
        )

    async def wait_filled(self, manifest: Digest, holder: str) -> Filled:
        """Returns once the area that `holder` was given is filled, with its bytes by tier and its spans.

        For a lazy holder at once, with what has come so far. Raises why the area cannot be filled.
        """
        request = self._take_number()
        message = WaitFilled(request=request, manifest=manifest, holder=holder)
        answer, _ = await self._call(message, request, Filled)
        return answer

    async def wait_directory(self, manifest: Digest) -> None:
        """Returns once the artefact's directory holds every file, verified and durable."""
        request = self._take_number()
        await self._call(WaitDirectory(request=request, manifest=manifest), request, Completed)

    async def serve_mount(
        self,
        manifest: Digest,
        device_fd: int,
        journal_fd: int,
        *,
        view: Literal["files", "data", "tree"] = "files",
    ) -> None:
        """Returns once a mount of an ensured artefact is served. The descriptors stay the caller's."""
        request = self._take_number()
        message = ServeMount(request=request, manifest=manifest, view=view)
        await self._call(message, request, Completed, (device_fd, journal_fd))

    async def begin_start(
        self, tenant: TenantId, manifest: Digest, pin: str, holder: str, start: str, *, record: bool
    ) -> None:
        """What an earlier start of this name has read of an ensured image is fetched from now on."""
        request = self._take_number()
        message = BeginStart(
            request=request,
            tenant=tenant,
            manifest=manifest,
            pin=pin,
            holder=holder,
            start=start,
            record=record,
        )
        await self._call(message, request, Completed)

    async def ask(self, make: Callable[..., Message], wanted: type[Answer]) -> Answer:
        """Sends the message that `make(request=N)` gives, and returns its answer."""
        request = self._take_number()
        answer, _ = await self._call(make(request=request), request, wanted)
        return answer

    async def release(self, holder: str) -> None:
        """Gives up everything that `holder` has. Does nothing if the data plane is gone: so are its pins."""
        try:
            await self._send(Release(holder=holder))
        except PlatformDownError:
            return

    def _take_number(self) -> int:
        self._next_request += 1
        return self._next_request

    async def _call(
        self, message: Message, request: int, wanted: type[Answer], given: tuple[int, ...] = ()
    ) -> tuple[Answer, tuple[int, ...]]:
        pending = self._pending[request] = _Pending()
        try:
            await self._send(message, given)
            await pending.done.wait()
            if pending.error is not None:
                raise pending.error
            if not isinstance(pending.answer, wanted):
                raise ProtocolError(
                    f"{type(message).__name__} was not answered by {wanted.__name__}", where="data plane"
                )
            fds, pending.fds = pending.fds, ()
            return pending.answer, fds
        finally:
            del self._pending[request]
            for fd in pending.fds:
                os.close(fd)
            if not pending.done.is_set() and not self._is_down:
                with anyio.move_on_after(SEND_S_MAX, shield=True):
                    await self._cancel(request)

    async def _cancel(self, request: int) -> None:
        try:
            await self._send(Cancel(request=request))
        except PlatformDownError:
            return

    def _settle(self, message: FromDataPlane, fds: tuple[int, ...]) -> None:
        pending = self._pending.get(message.request)
        if pending is None or pending.done.is_set():
            # Its caller has given up meanwhile.
            for fd in fds:
                os.close(fd)
            return
        if isinstance(message, Refused):
            pending.error = error_from_body(message.error)
        else:
            pending.answer = message
        pending.fds = fds
        pending.done.set()

    async def _send(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        if self._is_down:
            raise _down()
        async with self._sending:
            try:
                with anyio.fail_after(SEND_S_MAX):
                    await self._channel.send(message, fds)
            except (OSError, anyio.ClosedResourceError) as error:
                raise _down() from error


def _area(answer: Ensured, fds: tuple[int, ...]) -> EnsuredArea | None:
    if not answer.slab_bytes:
        return None
    if len(fds) != len(answer.slab_bytes) + 2:
        for fd in fds:
            os.close(fd)
        raise ProtocolError(f"{len(fds)} descriptors for {len(answer.slab_bytes)} slabs", where="data plane")
    return EnsuredArea(
        slab_fds=fds[:-2],
        slab_bytes=answer.slab_bytes,
        area_bytes=answer.area_bytes,
        files=answer.area_files,
        progress_fd=fds[-2],
        wake_fd=fds[-1],
    )


def _down() -> PlatformDownError:
    return PlatformDownError(
        "the node's data plane is gone", where="data plane", next_step="the agent restarts it; try again"
    )


def raise_descriptor_limit() -> None:
    """Large models take a descriptor per slab, in this process and on their way: as many as the system allows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def start_process(settings: DataPlaneSettings) -> tuple[anyio.abc.Process, DataPlane]:
    """Starts the data plane's process, which ends with this one; its stderr is ours.

    The caller runs `DataPlane.run` in a task group and, when that returns, waits for the process. Call it from
    the main thread: the kernel ties the child's life to the thread that made it.
    """
    ours, theirs = packet_pair()
    try:
        process = await anyio.open_process(
            [
                *own_process("snowdrop.agent.dataplane"),
                "--fd",
                str(theirs.fileno()),
                "--settings",
                msgspec.json.encode(settings).decode(),
            ],
            stdin=None,
            stdout=None,
            stderr=None,
            pass_fds=(theirs.fileno(),),
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return process, DataPlane(ours)

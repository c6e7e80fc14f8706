"""The data plane's side of its channel: requests in, content out, pins per holder."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

import anyio

from snowdrop.agent.dataplane.mounts import MountServer
from snowdrop.agent.dataplane.starts import STARTS_MESSAGES, Starts
from snowdrop.agent.dataplane.upkeep import UPKEEP_MESSAGES, answer_upkeep
from snowdrop.content.settings import DataPlaneSettings
from snowdrop.content.store import ContentStore, open_store
from snowdrop.content.upkeep import Upkeep
from snowdrop.domain.errors import SnowdropError, UnavailableError
from snowdrop.wire.codec import Message
from snowdrop.wire.dataplane import (
    TO_DATA_PLANE,
    Cancel,
    Completed,
    Ensure,
    Ensured,
    Filled,
    Refused,
    Release,
    ServeMount,
    ToDataPlane,
    ToStarts,
    WaitDirectory,
    WaitFilled,
)
from snowdrop.wire.packet import PacketChannel
from snowdrop.wire.upkeep import ToUpkeep

REQUESTS_MAX = 256
"""Under way at once; more are refused. They wait for threads, which are far fewer."""

log = logging.getLogger("snowdrop.content")


async def serve(sock: socket.socket, settings: DataPlaneSettings) -> None:
    """Serves one agent until it closes its end; then everything that it holds is given up.

    Raises what opening the store raises: InvalidInputError, ConflictError, UnavailableError.
    """
    async with open_store(settings) as store:
        upkeep = Upkeep(store, Path(settings.cache_directory))
        await upkeep.open()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(upkeep.run)
            await serve_store(sock, store, upkeep)
            tasks.cancel_scope.cancel()


async def serve_store(sock: socket.socket, store: ContentStore, upkeep: Upkeep | None = None) -> None:
    """As `serve`, over a store that is open already."""
    session = _Session(PacketChannel(sock, TO_DATA_PLANE), store, upkeep)
    try:
        await session.run()
    finally:
        session.release_all()


class _Session:
    def __init__(self, channel: PacketChannel[ToDataPlane], store: ContentStore, upkeep: Upkeep | None) -> None:
        self._channel = channel
        self._store = store
        self._upkeep = upkeep
        self._scopes: dict[int, anyio.CancelScope] = {}
        self._sending = anyio.Lock()
        self._holders: set[str] = set()

    async def run(self) -> None:
        async with anyio.create_task_group() as requests:
            starts = Starts(self._store.parts, requests)
            mounts = MountServer(self._store, requests, starts.recorder)
            while True:
                try:
                    message, fds = await self._channel.receive()
                except EOFError:
                    break
                if not isinstance(message, ServeMount):
                    for fd in fds:
                        os.close(fd)
                if isinstance(message, Release):
                    starts.forget(message.holder)
                    self._store.release(message.holder)
                    self._holders.discard(message.holder)
                elif isinstance(message, Cancel):
                    self._cancel(message.request)
                elif isinstance(message, ServeMount):
                    # Not cancelled by its number: the descriptors are either served or closed.
                    requests.start_soon(self._serve_mount, mounts, message, fds)
                elif len(self._scopes) >= REQUESTS_MAX:
                    await self._send(_too_many(message.request))
                else:
                    # Registered here, not in the task: a Cancel may be the very next message.
                    scope = self._scopes[message.request] = anyio.CancelScope()
                    requests.start_soon(self._answer, message, scope, starts)
            requests.cancel_scope.cancel()

    def release_all(self) -> None:
        for holder in self._holders:
            self._store.release(holder)

    def _cancel(self, request: int) -> None:
        scope = self._scopes.get(request)
        if scope is not None:
            scope.cancel()

    async def _answer(
        self,
        message: Ensure | WaitFilled | WaitDirectory | ToStarts | ToUpkeep,
        scope: anyio.CancelScope,
        starts: Starts,
    ) -> None:
        try:
            with scope:
                try:
                    if isinstance(message, Ensure):
                        await self._ensure(message)
                    elif isinstance(message, WaitFilled):
                        filled = await self._store.wait_filled(message.manifest, message.holder)
                        await self._send(
                            Filled(request=message.request, content=filled.content, spans=filled.spans)
                        )
                    elif isinstance(message, STARTS_MESSAGES):
                        await self._send(await starts.answer(message))
                    elif isinstance(message, UPKEEP_MESSAGES):
                        await self._send(await answer_upkeep(self._upkeep, message))
                    else:
                        await self._store.wait_directory(message.manifest)
                        await self._send(Completed(request=message.request))
                except Exception as error:  # noqa: BLE001 -- what one request meets must not end the loads of all
                    await self._send(Refused(request=message.request, error=_refusal(error).body()))
        finally:
            del self._scopes[message.request]

    async def _serve_mount(self, mounts: MountServer, message: ServeMount, fds: tuple[int, ...]) -> None:
        try:
            await mounts.serve(message.manifest, fds, message.view)
            await self._send(Completed(request=message.request))
        except Exception as error:  # noqa: BLE001 -- as above
            await self._send(Refused(request=message.request, error=_refusal(error).body()))

    async def _ensure(self, message: Ensure) -> None:
        landed = await self._store.ensure(
            message.tenant,
            message.manifest,
            message.holder,
            map_tensors=message.map_tensors,
            lazy=message.lazy,
            key_domain=message.key_domain,
        )
        self._holders.add(message.holder)
        area = landed.area
        # Descriptors of its own: a Release while the answer waits to be sent must not close them.
        fds: list[int] = []
        answered = False
        try:
            if area is not None and landed.wake is not None:
                sources = (*(slab.fd for slab in area.slabs), area.progress.fileno(), landed.wake.fileno())
                # One by one: those that were made before one fails are closed, too.
                fds.extend(os.dup(fd) for fd in sources)
            await self._send(
                Ensured(
                    request=message.request,
                    directory=str(landed.directory),
                    directory_complete=landed.is_complete,
                    slab_bytes=tuple(slab.size for slab in area.slabs) if area is not None else (),
                    area_bytes=area.layout.size if area is not None else 0,
                    area_files=area.layout.files if area is not None else (),
                    content=landed.content,
                    spans=landed.spans,
                ),
                tuple(fds),
            )
            answered = True
        finally:
            for fd in fds:
                os.close(fd)
            if landed.wake is not None:
                landed.wake.close()
            if not answered:
                self._store.drop(message.holder, message.manifest)

    async def _send(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        async with self._sending:
            try:
                await self._channel.send(message, fds)
            except ConnectionError:
                # The agent is gone; the reader finds the end of the channel and ends the session.
                return


def _refusal(error: Exception) -> SnowdropError:
    if isinstance(error, SnowdropError):
        return error
    log.error("a request failed in an unforeseen way", exc_info=error)
    if isinstance(error, OSError):
        return UnavailableError(
            f"the node's system does not let its data plane go on: {error.strerror or error}",
            where="data plane",
            next_step="raise the limit that it names (open files: `ulimit -Hn`), or scale another deployment down",
        )
    return SnowdropError(
        f"internal error of the data plane: {type(error).__name__}: {error}",
        where="data plane",
        next_step="please report it with the agent's log",
    )


def _too_many(request: int) -> Refused:
    error = UnavailableError(
        "the data plane has too many requests", where=f"requests_max={REQUESTS_MAX}", next_step="try again"
    )
    return Refused(request=request, error=error.body())

"""How a replica calls other services: who carries its calls, as long as it lives.

A sandbox has no network. The replica asks its agent for a connection to the gateway, over the channel that it has
anyhow, and gets it as an open descriptor: which replica calls is known from the channel, whatever the call says.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol, TypeVar

import anyio

from snowdrop.domain.calling import OutgoingCall, Reply, set_transport
from snowdrop.domain.errors import ErrorBody, ForbiddenError, PlatformDownError, error_from_body
from snowdrop.domain.service import ServiceSpec

OPEN_S_MAX = 10.0
"""How long the agent may take to open a connection to the gateway."""

T = TypeVar("T")
Opened = Callable[[ErrorBody | None, tuple[int, ...]], None]


class Link(Protocol):
    """What is needed of the channel to the agent."""

    def open_call(self, opened: Opened) -> None:
        """Asks for a connection; `opened` is called in another thread, with a descriptor that is then its own."""


class NoCalls:
    """Carries nothing: the service declares no call to another one."""

    def send(self, call: OutgoingCall) -> AbstractAsyncContextManager[Reply]:
        raise ForbiddenError(
            f"this service does not declare that it calls {call.deployment!r}",
            where="service(calls)",
            next_step=f"keep `sd.ref({call.deployment!r})` in its class or module, or add "
            f"`calls=[{call.deployment!r}]` to `@sd.service`, and deploy again",
        )

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        failed: Future[T] = Future()
        try:
            work.send(None)  # it ends with the refusal of `send`, before it waits for anything
        except Exception as error:  # noqa: BLE001 -- handed to the thread that waits
            failed.set_exception(error)
        return failed


@asynccontextmanager
async def carrying_calls(link: Link, spec: ServiceSpec) -> AsyncIterator[None]:
    """Calls of this process are carried while inside, if `spec` declares any."""
    if not spec.calls:
        set_transport(NoCalls())
        yield
        return
    from snowdrop.replica.callclient import gateway_transport  # noqa: PLC0415 -- heavy, and most services call nobody

    async with gateway_transport(AgentConnections(link).open) as transport:
        set_transport(transport)
        try:
            yield
        finally:
            set_transport(None)


class AgentConnections:
    """Connections to the gateway, from the agent."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def open(self) -> int:
        """The descriptor of a new connection, the caller's. Raises the agent's error, or PlatformDownError."""
        loop = asyncio.get_running_loop()
        got: asyncio.Future[int] = loop.create_future()

        def settle(error: ErrorBody | None, fds: tuple[int, ...]) -> None:
            if got.done():
                _close(fds)
            elif fds:
                got.set_result(fds[0])
            else:
                reason = error or PlatformDownError("the agent gave no connection", where="agent").body()
                got.set_exception(error_from_body(reason))

        def opened(error: ErrorBody | None, fds: tuple[int, ...]) -> None:
            try:
                loop.call_soon_threadsafe(settle, error, fds)
            except RuntimeError:  # the loop is closed: the replica has ended
                _close(fds)

        self._link.open_call(opened)
        try:
            with anyio.fail_after(OPEN_S_MAX):
                return await got
        except TimeoutError as error:
            raise PlatformDownError(
                "the agent does not open a connection to the gateway",
                where=f"open_s_max={OPEN_S_MAX:g}",
                next_step="try again; the agent's log is in the state folder",
            ) from error


def _close(fds: tuple[int, ...]) -> None:
    for fd in fds:
        os.close(fd)

"""The gateway's way to control for tasks: HTTP over control's unix socket, one session for the process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

import aiohttp
import msgspec

from snowdrop.domain.errors import PlatformDownError, SnowdropError, error_from_body
from snowdrop.wire.api import ApiError
from snowdrop.wire.tasks import (
    END_HEADER,
    POLL_S_MAX,
    KeepLeases,
    LeaseAnswer,
    LeaseName,
    LeasesLost,
    LeaseWish,
    TaskEnd,
)

CONNECT_S_MAX = 5.0
CALL_S_MAX = 30.0
READ_BYTES = 256 << 10
CONNECTIONS_MAX = 1_000
"""At once to control, those that wait for a task's end included; further ones wait for one of them."""
DOWN_S = 1.0
"""When to come back if control is away: its supervisor starts it again at once."""
T = TypeVar("T")


class TaskControl:
    """Use within `open`. Every method raises PlatformDownError while control is away, else what it answers."""

    def __init__(self, socket_path: str) -> None:
        self._socket_path = socket_path
        self._session: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Keeps the session."""
        async with aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(path=self._socket_path, limit=CONNECTIONS_MAX),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S_MAX),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        ) as session:
            self._session = session
            try:
                yield
            finally:
                self._session = None

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise PlatformDownError("the gateway is stopping", where="gateway", retry_after_s=DOWN_S)
        return self._session

    async def lease(self, holder: str, room: int) -> LeaseAnswer:
        """Waits up to POLL_S_MAX for tasks."""
        wish = LeaseWish(holder=holder, room=room)
        return await self._packed("POST", wish, LeaseAnswer, s_max=POLL_S_MAX + CALL_S_MAX)

    async def keep(self, holder: str, leases: tuple[LeaseName, ...]) -> tuple[LeaseName, ...]:
        """Says that these leases are held; answers with those that are not."""
        answer = await self._packed("PUT", KeepLeases(holder=holder, leases=leases), LeasesLost, s_max=CALL_S_MAX)
        return answer.lost

    async def body(self, name: LeaseName) -> AsyncIterator[bytes]:
        """A task's request body, as it comes."""
        try:
            async with self.session.get(_url(name)) as answer:
                await _check(answer)
                async for chunk in answer.content.iter_chunked(READ_BYTES):
                    yield chunk
        except aiohttp.ClientError as error:
            raise control_away(error) from error

    async def finish(self, name: LeaseName, end: TaskEnd, body: AsyncIterator[bytes] | None) -> None:
        """Reports an attempt. ConflictError if the lease has ended."""
        headers = {END_HEADER: msgspec.json.encode(end).decode()}
        try:
            async with self.session.post(_url(name), headers=headers, data=body) as answer:
                await _check(answer)
        except aiohttp.ClientError as error:
            raise control_away(error) from error

    async def _packed(self, method: str, body: msgspec.Struct, kind: type[T], *, s_max: float) -> T:
        data, timeout = msgspec.msgpack.encode(body), aiohttp.ClientTimeout(total=s_max)
        try:
            async with self.session.request(
                method, "http://control/v1/task-leases", data=data, timeout=timeout
            ) as answer:
                await _check(answer)
                return msgspec.msgpack.decode(await answer.read(), type=kind)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise control_away(error) from error


def control_away(error: Exception) -> PlatformDownError:
    return PlatformDownError(
        f"control does not answer: {str(error) or type(error).__name__}",
        where="tasks",
        next_step="it is started again; try again, with the same Idempotency-Key if it was a submission",
        retry_after_s=DOWN_S,
    )


async def _check(answer: aiohttp.ClientResponse) -> None:
    if answer.status < 400:
        return
    data = await answer.read()
    try:
        error: SnowdropError = error_from_body(msgspec.json.decode(data, type=ApiError).error)
    except msgspec.DecodeError:
        error = SnowdropError(f"control answered {answer.status}", where="tasks")
    raise error


def _url(name: LeaseName) -> str:
    return f"http://control/v1/task-leases/{name.tenant}/{name.task}/{name.generation}"

"""Calls to other services over HTTP: on connections that the agent opens, or to addresses, for `snowdrop dev`."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import aiohttp
import anyio
from aiohttp.client_proto import ResponseHandler
from yarl import URL

from snowdrop.domain.calling import OutgoingCall, set_transport
from snowdrop.domain.errors import (
    NotFoundError,
    PlatformDownError,
    ReplicaDiedError,
    SnowdropError,
    TimedOutError,
)
from snowdrop.wire.bodies import gathered

if TYPE_CHECKING:
    from aiohttp import ClientTimeout
    from aiohttp.client_reqrep import ClientRequest
    from aiohttp.tracing import Trace

CONNECTIONS_MAX = 256
"""Calls under way at a time in one replica; more wait for one of them to end."""
KEEPALIVE_S = 30.0
"""Below the gateway's own bound, so that it never closes a connection under a call."""
RECONNECT_S_MAX = 15.0
"""How long a call tries to get a connection while the gateway is being started again."""
RECONNECT_PAUSE_S = 0.05
KEY_VARIABLE = "SNOWDROP_KEY"
RECONNECT_PAUSE_S_MAX = 1.0

T = TypeVar("T")
OpenConnection = Callable[[], Awaitable[int]]


class HttpReply:
    """An answer over HTTP. Implements Reply."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status

    @property
    def headers(self) -> dict[str, str]:
        return {name.lower(): value for name, value in self._response.headers.items()}

    async def read(self, bytes_max: int) -> bytes:
        return await gathered(
            self.chunks(),
            bytes_max,
            what="the answer",
            bound="answer_bytes_max",
            next_step="ask for less, or read it as a stream",
        )

    def chunks(self) -> AsyncIterator[bytes]:
        return self._response.content.iter_any()


class HttpTransport:
    """Implements Transport. `address` gives the address of a deployment and headers for it."""

    def __init__(
        self, session: aiohttp.ClientSession, address: Callable[[str], tuple[str, Mapping[str, str]]]
    ) -> None:
        self._session = session
        self._address = address
        self._loop = asyncio.get_running_loop()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    @asynccontextmanager
    async def send(self, call: OutgoingCall) -> AsyncIterator[HttpReply]:
        ends_s = None if call.timeout_s is None else time.monotonic() + call.timeout_s
        try:
            response = await self._connected(call, ends_s)
            try:
                yield HttpReply(response)
            finally:
                # Closed, not given back: of a call that is left early nothing more may run or be read. One whose
                # answer was read to its end has given its connection back already.
                response.close()
        except TimeoutError as error:
            raise TimedOutError(
                "no full answer in time",
                where="" if call.timeout_s is None else f"timeout_s={call.timeout_s:.3g}",
                next_step="allow the request more time, or ask for less",
            ) from error
        except aiohttp.ClientError as error:
            raise ReplicaDiedError(
                "the connection broke while the call was under way, which is therefore not made again",
                next_step="call it again if that is safe",
            ) from error

    async def _connected(self, call: OutgoingCall, ends_s: float | None) -> aiohttp.ClientResponse:
        """The begun answer. Tries again only while no connection could be made: nothing was sent then."""
        base, headers = self._address(call.deployment)
        url = URL(f"{base}{call.path}", encoded=True)
        give_up_s = time.monotonic() + RECONNECT_S_MAX
        pause_s = RECONNECT_PAUSE_S
        while True:
            left_s = None if ends_s is None else max(0.001, ends_s - time.monotonic())
            try:
                return await self._session.request(
                    call.method,
                    url,
                    headers={**call.headers, **headers},
                    data=call.body,
                    allow_redirects=False,
                    timeout=aiohttp.ClientTimeout(total=left_s),
                )
            except aiohttp.ClientConnectorError as error:
                if time.monotonic() + pause_s > (give_up_s if ends_s is None else min(give_up_s, ends_s)):
                    raise PlatformDownError(
                        f"no connection could be made: {error.os_error}",
                        where=base,
                        next_step="try again; is the platform being started?",
                        retry_after_s=1.0,
                    ) from error
            await anyio.sleep(pause_s)
            pause_s = min(pause_s * 2, RECONNECT_PAUSE_S_MAX)


class _HandedConnector(aiohttp.BaseConnector):
    """Connections come from whoever may make them, as open descriptors."""

    def __init__(self, open_connection: OpenConnection) -> None:
        super().__init__(limit=CONNECTIONS_MAX, keepalive_timeout=KEEPALIVE_S)
        self._open_connection = open_connection

    async def _create_connection(
        self, req: ClientRequest, traces: list[Trace], timeout: ClientTimeout
    ) -> ResponseHandler:
        try:
            fd = await self._open_connection()
        except SnowdropError as error:
            raise aiohttp.ClientConnectorError(req.connection_key, OSError(str(error))) from error
        loop = asyncio.get_running_loop()
        sock = socket.socket(fileno=fd)
        try:
            _transport, protocol = await loop.create_connection(lambda: ResponseHandler(loop=loop), sock=sock)
        except BaseException:
            sock.close()
            raise
        return protocol


def _session(connector: aiohttp.BaseConnector) -> aiohttp.ClientSession:
    session = aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
        read_bufsize=1 << 20,
    )
    # aiohttp sends idempotent requests again when a kept connection breaks, which could run one twice.
    session._retry_connection = False  # noqa: SLF001 -- no public switch exists
    return session


@asynccontextmanager
async def gateway_transport(open_connection: OpenConnection) -> AsyncIterator[HttpTransport]:
    """Carries calls to the gateway at the other end of the connections."""
    async with _session(_HandedConnector(open_connection)) as session:
        yield HttpTransport(session, lambda deployment: (f"http://gateway/{deployment}", {}))


@asynccontextmanager
async def address_transport(addresses: Mapping[str, str], key: str | None) -> AsyncIterator[HttpTransport]:
    """Carries calls to the addresses of deployments by name, with an API key."""

    def address(deployment: str) -> tuple[str, Mapping[str, str]]:
        if deployment not in addresses:
            raise NotFoundError(
                f"it is not known where {deployment!r} is",
                where=f"ref({deployment!r})",
                next_step=f"say it: `snowdrop dev ... --ref {deployment}=http://HOST:PORT/{deployment}`",
            )
        return addresses[deployment].rstrip("/"), {} if key is None else {"authorization": f"Bearer {key}"}

    async with _session(aiohttp.TCPConnector(limit=CONNECTIONS_MAX, keepalive_timeout=KEEPALIVE_S)) as session:
        yield HttpTransport(session, address)


@asynccontextmanager
async def carrying_to(addresses: Mapping[str, str]) -> AsyncIterator[None]:
    """Calls of this process go to these addresses while inside; the API key is that of the environment."""
    async with address_transport(addresses, os.environ.get(KEY_VARIABLE)) as transport:
        set_transport(transport)
        try:
            yield
        finally:
            set_transport(None)

"""Carries one request or websocket from the replica's socket to a command's server, streaming both ways."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

import aiohttp
import anyio
from multidict import CIMultiDict
from yarl import URL

from snowdrop.domain.errors import ReplicaDiedError
from snowdrop.replica.servable import Receive, Scope, Send

CONNECT_S_MAX = 10.0
WEBSOCKET_MESSAGE_BYTES_MAX = 16 << 20
CLOSE_REASON_BYTES_MAX = 120
GOING_AWAY = 1001

# RFC 9110, section 7.6.1, and what the two HTTP ends settle between themselves.
HOP_BY_HOP = frozenset(
    {
        *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection"),
        *(b"te", b"trailer", b"transfer-encoding", b"upgrade", b"expect"),
    }
)
_HANDSHAKE = (
    b"sec-websocket-key",
    b"sec-websocket-version",
    b"sec-websocket-extensions",
    b"sec-websocket-protocol",
)


def open_session(socket_path: str | None) -> aiohttp.ClientSession:
    """A client that changes nothing: no cookies, no decompression, no headers of its own, no second attempt."""
    connector = (
        aiohttp.TCPConnector(limit=0) if socket_path is None else aiohttp.UnixConnector(socket_path, limit=0)
    )
    session = aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S_MAX),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
    )
    # aiohttp sends idempotent requests again when a kept connection breaks, which could run one twice.
    session._retry_connection = False  # noqa: SLF001 -- no public switch exists
    return session


async def forward_http(
    session: aiohttp.ClientSession, base: str, scope: Scope, receive: Receive, send: Send
) -> None:
    """One request. A caller that goes away ends it at the server, too. Raises ReplicaDiedError."""
    body = _Body(scope, receive)
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            await body.read.wait()
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(watch)
        failure: aiohttp.ClientError | None = None
        try:
            async with session.request(
                scope["method"],
                _url(base, scope),
                headers=_headers_up(scope["headers"]),
                data=body.stream() if body.is_there else None,
                allow_redirects=False,
            ) as response:
                await _answer(response, send)
        except aiohttp.ClientError as error:
            failure = error
        group.cancel_scope.cancel()
    if failure is not None and not body.is_cut:
        raise ReplicaDiedError(
            f"the service's server broke off: {str(failure) or type(failure).__name__}",
            where=scope["path"],
            next_step="`snowdrop logs` shows what it printed",
        ) from failure


async def _answer(response: aiohttp.ClientResponse, send: Send) -> None:
    headers = [(name.lower(), value) for name, value in response.raw_headers if name.lower() not in HOP_BY_HOP]
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    async for chunk in response.content.iter_any():
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Body:
    """A request's body as ASGI hands it over. `read` is set once nothing more of it will be asked for."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        named = {name.lower(): value for name, value in scope["headers"]}
        self.is_there = named.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in named
        self.is_cut = False
        self.read = anyio.Event()
        self._receive = receive
        if not self.is_there:
            self.read.set()

    async def stream(self) -> AsyncIterator[bytes]:
        try:
            while True:
                message = await self._receive()
                if message["type"] == "http.disconnect":
                    self.is_cut = True
                    raise aiohttp.ClientConnectionError("the caller went away")
                if message.get("body"):
                    yield message["body"]
                if not message.get("more_body", False):
                    return
        finally:
            self.read.set()


async def forward_websocket(
    session: aiohttp.ClientSession, base: str, scope: Scope, receive: Receive, send: Send
) -> None:
    """One websocket, until either side closes. One that the server refuses is refused here."""
    await receive()  # websocket.connect
    headers = _headers_up(pair for pair in scope["headers"] if pair[0].lower() not in _HANDSHAKE)
    try:
        upstream = await session.ws_connect(
            _url(base, scope),
            headers=headers,
            protocols=scope.get("subprotocols", ()),
            max_msg_size=WEBSOCKET_MESSAGE_BYTES_MAX,
        )
    except aiohttp.ClientError as error:
        reason = str(error).encode()[:CLOSE_REASON_BYTES_MAX].decode("utf-8", "ignore")
        await send({"type": "websocket.close", "code": 1011, "reason": reason})
        return
    async with upstream:
        await send({"type": "websocket.accept", "subprotocol": upstream.protocol})
        async with anyio.create_task_group() as group:

            async def up() -> None:
                await _up(upstream, receive)
                group.cancel_scope.cancel()

            group.start_soon(up)
            await _down(upstream, send)
            group.cancel_scope.cancel()


async def _up(upstream: aiohttp.ClientWebSocketResponse, receive: Receive) -> None:
    while True:
        message = await receive()
        if message["type"] == "websocket.disconnect":
            await upstream.close(code=message.get("code") or GOING_AWAY)
            return
        if message.get("text") is not None:
            await upstream.send_str(message["text"])
        elif message.get("bytes") is not None:
            await upstream.send_bytes(message["bytes"])


async def _down(upstream: aiohttp.ClientWebSocketResponse, send: Send) -> None:
    reason = ""
    while True:
        message = await upstream.receive()
        if message.type is aiohttp.WSMsgType.TEXT:
            await send({"type": "websocket.send", "text": message.data})
        elif message.type is aiohttp.WSMsgType.BINARY:
            await send({"type": "websocket.send", "bytes": message.data})
        else:
            if message.type is aiohttp.WSMsgType.CLOSE:
                reason = message.extra or ""
            break
    code = upstream.close_code or 1011
    # 1005 and 1006 say that no code came; they must not be sent.
    await send({"type": "websocket.close", "code": 1011 if code in {1005, 1006} else code, "reason": reason})


def _headers_up(headers: Iterable[tuple[bytes, bytes]]) -> CIMultiDict[str]:
    pairs = list(headers)
    listed = b",".join(value for name, value in pairs if name.lower() == b"connection")
    dropped = HOP_BY_HOP | {name.strip().lower() for name in listed.split(b",")}
    return CIMultiDict(
        (name.decode("latin-1"), value.decode("latin-1")) for name, value in pairs if name.lower() not in dropped
    )


def _url(base: str, scope: Scope) -> URL:
    path = scope.get("raw_path") or scope["path"].encode()
    query = scope["query_string"]
    target = path + b"?" + query if query else path
    return URL(base + target.decode("latin-1"), encoded=True)

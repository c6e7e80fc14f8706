"""Small answers sent in one write say what the server's own answers say, to every kind of client."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable

import anyio
import pytest
from aiohttp import web
from multidict import CIMultiDict

from snowdrop.gateway.edge.answer import WholeAnswer, whole_answer

pytestmark = pytest.mark.anyio
WAIT_S_MAX = 5.0
HEADERS = CIMultiDict([("x-a", "1"), ("set-cookie", "a=1"), ("set-cookie", "b=2"), ("content-type", "text/plain")])
Make = Callable[[web.Request, int, CIMultiDict[str], bytes], web.StreamResponse]
Ask = Callable[[bytes], Awaitable[list[bytes]]]


def by_the_server(request: web.Request, status: int, headers: CIMultiDict[str], body: bytes) -> web.Response:
    return web.Response(status=status, headers=headers, body=body)


def closing(request: web.Request, status: int, headers: CIMultiDict[str], body: bytes) -> web.StreamResponse:
    answer = whole_answer(request, status, headers, body)
    answer.force_close()
    return answer


@pytest.fixture
async def ask() -> AsyncIterator[Ask]:
    """Sends requests in one piece to both ways of answering; all that each says until it closes."""

    def handler(make: Make) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            typed = request.query.get("typed", "1") == "1"
            headers = CIMultiDict(HEADERS) if typed else CIMultiDict({"x-a": "1"})
            return make(request, int(request.query["status"]), headers, request.query.get("body", "").encode())

        return handle

    ports: list[int] = []
    runners: list[web.AppRunner] = []
    makes: tuple[Make, ...] = (by_the_server, whole_answer, closing)
    for make in makes:
        app = web.Application()
        app.router.add_route("*", "/", handler(make))
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        runners.append(runner)
        ports.append(runner.addresses[0][1])

    async def say(requests: bytes) -> list[bytes]:
        return [await said(port, requests) for port in ports]

    yield say
    for runner in runners:
        await runner.cleanup()


async def said(port: int, requests: bytes) -> bytes:
    heard = b""
    with anyio.fail_after(WAIT_S_MAX):
        async with await anyio.connect_tcp("127.0.0.1", port) as stream:
            await stream.send(requests)
            try:
                while True:
                    heard += await stream.receive()
            except anyio.EndOfStream:
                return heard


def request(query: str, *, method: str = "GET", version: str = "1.1", last: bool = True) -> bytes:
    close = "connection: close\r\n" if last else ""
    return f"{method} /?{query} HTTP/{version}\r\nhost: x\r\n{close}\r\n".encode()


def comparable(answer: bytes) -> list[bytes]:
    """Its lines, the order of headers and the second of the day aside."""
    lines = re.sub(rb"(?i)date: [A-Z][a-z]{2}, .{20} GMT", b"date: now", answer).split(b"\r\n")
    return [lines[0], *sorted(line.lower() for line in lines[1:])]


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(request("status=200&body=hello"), id="body"),
        pytest.param(request("status=200&body=hello&typed=0"), id="no content type"),
        pytest.param(request("status=200"), id="empty"),
        pytest.param(request("status=404&body=no"), id="error"),
        pytest.param(request("status=299&body=odd"), id="unknown status"),
        pytest.param(request("status=204"), id="no content"),
        pytest.param(request("status=304"), id="not modified"),
        pytest.param(request("status=200&body=hello", method="HEAD"), id="head"),
        pytest.param(request("status=200&body=hello", version="1.0", last=False), id="http 1.0"),
        pytest.param(
            request("status=200&body=one", last=False) + request("status=500&body=two"), id="kept alive, pipelined"
        ),
    ],
)
async def test_it_says_what_the_server_says(ask: Ask, sent: bytes) -> None:
    expected, ours, _ = await ask(sent)
    assert comparable(ours) == comparable(expected)
    assert b"date: " in ours.lower()


async def test_one_that_is_told_to_close_says_so_and_does(ask: Ask) -> None:
    open_request = request("status=200&body=one", last=False)
    expected, _, closed = await ask(open_request + request("status=200&body=two"))
    assert expected.count(b"HTTP/1.1 200") == 2
    assert closed.count(b"HTTP/1.1 200") == 1
    assert b"connection: close" in closed.lower()


async def test_nothing_is_sent_twice() -> None:
    made = WholeAnswer(200, CIMultiDict(), b"x")
    sent: list[bytes] = []

    class Writer:
        async def write_headers(self, line: str, headers: CIMultiDict[str]) -> None:
            sent.append(line.encode())

        async def write_eof(self, body: bytes) -> None:
            sent.append(body)

    class Request:
        keep_alive = True
        writer = Writer()

    await made.prepare(Request())  # type: ignore[arg-type]
    await made.prepare(Request())  # type: ignore[arg-type]
    await made.write_eof()
    assert sent == [b"HTTP/1.1 200 OK", b"x"]
    assert made.keep_alive is True

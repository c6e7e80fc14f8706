"""Servers that origins are tested against: S3 stand-ins, a WebDAV folder, and one that fails as it is told."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote
from xml.sax.saxutils import escape

START_S_MAX = 60.0
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def serving(command: Sequence[str], port: int, env: dict[str, str]) -> Iterator[str]:
    """The URL of a server process that listens on `port`."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    try:
        until = time.monotonic() + START_S_MAX
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, f"{command[0]} did not start"
                assert time.monotonic() < until, f"{command[0]} does not listen"
                time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


class WebDav(BaseHTTPRequestHandler):
    """Objects in the server's dictionary, with ranges and as much of WebDAV as listing takes."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]

    def _key(self) -> str:
        return unquote(self.path).strip("/")

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        body = self.objects.get(self._key())
        if body is None:
            self._answer(404)
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None or self.command == "HEAD":
            self._answer(200, body, Content_Length=str(len(body)), Last_Modified="Tue, 24 Nov 2026 10:00:00 GMT")
            return
        first, last = int(asked[1]), min(int(asked[2]), len(body) - 1)
        if first > last:
            self._answer(416, Content_Range=f"bytes */{len(body)}")
            return
        self._answer(206, body[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(body)}")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        self.objects[self._key()] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(201)

    def do_DELETE(self) -> None:
        self._answer(204 if self.objects.pop(self._key(), None) is not None else 404)

    def do_PROPFIND(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        prefix = self._key()
        found = [key for key in self.objects if not prefix or key.startswith(prefix + "/")]
        if prefix and not found:
            self._answer(404)
            return
        items = "".join(
            f"<D:response><D:href>/{escape(key)}</D:href><D:propstat><D:prop>"
            f"<D:getlastmodified>Tue, 24 Nov 2026 10:00:00 GMT</D:getlastmodified>"
            f"<D:getcontentlength>{len(self.objects[key])}</D:getcontentlength><D:resourcetype/>"
            f"</D:prop><D:status>HTTP/1.1 200 OK</D:status></D:propstat></D:response>"
            for key in found
        )
        body = f'<?xml version="1.0"?><D:multistatus xmlns:D="DAV:">{items}</D:multistatus>'
        self._answer(207, body.encode(), Content_Type="application/xml")

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def webdav() -> Iterator[str]:
    """The URL of a WebDAV server of its own, with nothing in it."""
    handler = type("Handler", (WebDav,), {"objects": {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@dataclass(frozen=True)
class Fault:
    """What is wrong with one answer. The body's first `after` bytes are as they should be."""

    status: int = 0
    headers: tuple[str, ...] = ()
    head: bytes = b""
    """Instead of the whole answer; the connection stays open after it."""
    head_again: bytes = b""
    """Sent again and again after `head`, until the client has had enough."""
    after: int | None = None
    end: str = ""
    """After `after` bytes: "stall", "reset" or "close"."""
    gate: threading.Event | None = None
    """After `after` bytes the rest comes once this is set."""
    flip: bool = False
    shift: int = 0
    """Of Content-Range, against what is sent."""
    whole: bool = False
    """The range is ignored: all of the object, 200."""
    chunked: bool = False
    closes: bool = False
    drops: bool = False
    """No answer at all: the connection is closed."""


@dataclass(frozen=True)
class Asked:
    """A GET as it came. `count` is how many came before it for the same range's key."""

    index: int
    key: str
    first: int
    last: int
    authorization: str


Plan = Callable[[Asked], Fault | None]


@dataclass
class FaultyServer:
    """Serves `objects` with ranges, each GET as `plan` says. `asked` is every GET that came."""

    objects: dict[str, bytes]
    plan: Plan = lambda asked: None
    asked: list[Asked] = field(default_factory=list)
    connections: int = 0
    url: str = ""
    tls: ssl.SSLContext | None = None
    put_status: int = 201

    @contextmanager
    def running(self) -> Iterator[FaultyServer]:
        loop = asyncio.new_event_loop()
        started, stop = threading.Event(), asyncio.Event()

        async def main() -> None:
            tasks: set[asyncio.Task[None]] = set()

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                task = asyncio.current_task()
                assert task is not None
                tasks.add(task)
                try:
                    await self._connection(reader, writer)
                except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                    pass
                finally:
                    tasks.discard(task)
                    writer.transport.abort()

            server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=self.tls)
            scheme = "https" if self.tls else "http"
            self.url = f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            started.set()
            await stop.wait()
            server.close()
            for task in list(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0)

        thread = threading.Thread(target=lambda: (loop.run_until_complete(main()), loop.close()))
        thread.start()
        started.wait(START_S_MAX)
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            method, path, _ = head.split("\r\n")[0].split(" ")
            key = unquote(path.partition("?")[0]).strip("/")
            if method == "PUT":
                length = re.search(r"(?im)^content-length: (\d+)", head)
                await reader.readexactly(int(length[1]) if length else 0)
                writer.write(f"HTTP/1.1 {self.put_status} X\r\nContent-Length: 0\r\n\r\n".encode())
                continue
            body = self.objects.get(key)
            if body is None:
                writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                continue
            if method == "HEAD":
                line = "Last-Modified: Tue, 24 Nov 2026 10:00:00 GMT"
                writer.write(f"HTTP/1.1 200 OK\r\n{line}\r\nContent-Length: {len(body)}\r\n\r\n".encode())
                continue
            found = re.search(r"(?im)^range: bytes=(\d+)-(\d+)", head)
            assert found is not None
            authorization = re.search(r"(?im)^authorization: (.*?)\r$", head)
            last = min(int(found[2]), len(body) - 1)
            asked = Asked(len(self.asked), key, int(found[1]), last, authorization[1] if authorization else "")
            self.asked.append(asked)
            if asked.first > last:
                writer.write(f"HTTP/1.1 416 X\r\nContent-Range: bytes */{len(body)}\r\n".encode())
                writer.write(b"Content-Length: 0\r\n\r\n")
                continue
            if not await self._answer(writer, asked, body, self.plan(asked) or Fault()):
                return

    async def _answer(self, writer: asyncio.StreamWriter, asked: Asked, whole: bytes, fault: Fault) -> bool:
        """Whether the connection goes on."""
        if fault.drops:
            return False
        if fault.head:
            writer.write(fault.head)
            while fault.head_again:
                writer.write(fault.head_again)
                await writer.drain()
            await asyncio.sleep(3_600)
        if fault.status:
            lines = [f"HTTP/1.1 {fault.status} Fault", "Content-Length: 5", *fault.headers]
            writer.write("\r\n".join(lines).encode() + b"\r\n\r\nfault")
            return True
        piece = whole if fault.whole else whole[asked.first : asked.last + 1]
        if fault.flip:
            piece = bytes([piece[0] ^ 1]) + piece[1:]
        lines = [f"HTTP/1.1 {200 if fault.whole else 206} Fine", *fault.headers]
        if not fault.whole:
            first, last = asked.first + fault.shift, asked.last + fault.shift
            lines.append(f"Content-Range: bytes {first}-{last}/{len(whole)}")
        lines.append("Transfer-Encoding: chunked" if fault.chunked else f"Content-Length: {len(piece)}")
        if fault.closes:
            lines.append("Connection: close")
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n")
        if fault.chunked:
            writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n0\r\n\r\n")
            return True
        writer.write(piece if fault.after is None else piece[: fault.after])
        await writer.drain()
        if fault.gate is not None:
            while not fault.gate.is_set():
                await asyncio.sleep(0.005)
            writer.write(piece[fault.after :])
        if fault.end == "stall":
            await asyncio.sleep(3_600)
        if fault.end == "reset":
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return not fault.end and not fault.closes

"""A registry that does as it is told: who may in, and what goes wrong."""

import base64
import json
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from image_helpers import Layout, digest

TOKEN = "a.token-of_ours"
USER, PASSWORD = "me", "secret:with:colons"
BASIC = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


class Registry(ThreadingHTTPServer):
    """`faults` are by kind of request (manifests, blobs, token) what goes wrong with the next ones, in order:
    a status, `cut`, `stall`, `wrong`, `whole` (ranges are not known), `shifted` (another range), a URL to go to.
    `login` is "", "basic" or "bearer". `asked` has what was asked: kind, name, range, authorization.
    """

    daemon_threads = True

    def __init__(self, layout: Layout, login: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.layout = layout
        self.login = login
        self.faults: dict[str, list[Any]] = {}
        self.asked: list[tuple[str, str, str, str]] = []
        self.documents = {"latest": layout.manifest_bytes}
        self.released = threading.Event()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that go away are what is tested


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Registry

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.do_GET()

    def do_GET(self) -> None:
        given = self.headers.get("authorization", "")
        found = re.fullmatch(r"/v2/team/app/(manifests|blobs)/(.+)", self.path)
        kind, name = (found[1], found[2]) if found else ("token", self.path)
        ranged = self.headers.get("range", "")
        self.server.asked.append((kind, name, ranged, given))
        faults = self.server.faults.get(kind, [])
        fault = faults.pop(0) if faults else None
        if isinstance(fault, tuple):
            self.answer(fault[0], b"no", **fault[1])
        elif isinstance(fault, str) and fault.startswith("http"):
            self.answer(307, b"", location=fault)
        elif kind == "token":
            self.token(given)
        elif not self.may_in(given):
            pass
        else:
            self.content(kind, name, ranged, fault)

    def token(self, given: str) -> None:
        if given not in {"", BASIC}:
            self.answer(401, b"")
        else:
            self.answer(200, json.dumps({"token": TOKEN}).encode())

    def may_in(self, given: str) -> bool:
        login = self.server.login
        if login == "basic" and given != BASIC:
            self.answer(401, b"", **{"www-authenticate": 'Basic realm="here"'})
            return False
        if login == "bearer" and given != f"Bearer {TOKEN}":
            realm = f'Bearer realm="http://{self.server.host}/token",service="s",scope="repository:team/app:pull"'
            self.answer(401, b"", **{"www-authenticate": realm})
            return False
        return True

    def content(self, kind: str, name: str, ranged: str, fault: Any) -> None:
        data = self.server.layout.blobs.get(name) or self.server.documents.get(name)
        if data is None or (kind == "blobs" and not name.startswith("sha256:")):
            self.answer(404, b"")
            return
        begin = int(ranged.removeprefix("bytes=").removesuffix("-")) if ranged and fault != "whole" else 0
        body, headers = data[begin:], {}
        status = 200
        if ranged and fault != "whole":
            status, said = 206, begin + (1 if fault == "shifted" else 0)
            headers["content-range"] = f"bytes {said}-{len(data) - 1}/{len(data)}"
        if fault == "wrong":
            body = bytes([body[0] ^ 1]) + body[1:]
        if fault in {"cut", "stall"}:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if fault == "stall":
                self.server.released.wait(30)
            self.close_connection = True
            return
        self.answer(status, body, **headers)

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def registry(layout: Layout, login: str = "", *, tls: ssl.SSLContext | None = None) -> Iterator[Registry]:
    server = Registry(layout, login)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


def with_index(server: Registry, other: Layout) -> None:
    """`latest` becomes an index: the registry's image for amd64, `other` for arm64."""
    entries = [
        {**server.layout.manifest, "platform": {"os": "linux", "architecture": "amd64"}},
        {**other.manifest, "platform": {"os": "linux", "architecture": "arm64"}},
    ]
    data = json.dumps({"schemaVersion": 2, "manifests": entries}).encode()
    server.layout.blobs |= other.blobs
    server.documents["latest"] = data
    server.layout.blobs[digest(data)] = data

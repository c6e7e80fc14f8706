"""Stand-ins on loopback for what a push reads from: a model hub, an S3 service, a web server with ranges."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

from snowdrop.content.ingest.remote import Attempts

COMMIT = "c" * 40


class Answer(NamedTuple):
    """`sent` is how many bytes of the body are really sent before the connection ends; None means all."""

    status: int
    headers: Mapping[str, str] = MappingProxyType({})
    body: bytes = b""
    sent: int | None = None


class Request(NamedTuple):
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Mapping[str, str]


class Loopback:
    """An HTTP server. Each of `faults` is given once in place of the right answer, to a path that it matches."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.faults: list[tuple[str, Callable[[Request, Answer], Answer]]] = []
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                parts = urlsplit(self.path)
                request = Request(self.command, unquote(parts.path), parse_qs(parts.query), self.headers)
                answer = outer.answer(request)
                self.send_response(answer.status)
                for name, value in {"content-length": str(len(answer.body)), **answer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body[: answer.sent])
                if answer.sent is not None:
                    self.close_connection = True

            do_GET = do_HEAD = handle_any  # noqa: N815 (as http.server wants them)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, request: Request) -> Answer:
        right = self.respond(request)
        with self._lock:
            self.requests.append(request)
            fault = next((fault for fault in self.faults if re.search(fault[0], request.path)), None)
            if fault is not None:
                self.faults.remove(fault)
        return fault[1](request, right) if fault is not None else right

    def respond(self, request: Request) -> Answer:
        raise NotImplementedError

    def counted(self, pattern: str) -> Counter[str]:
        return Counter(request.path for request in self.requests if re.search(pattern, request.path))


def ranged(request: Request, data: bytes, headers: dict[str, str]) -> Answer:
    """The whole of `data`, or the range that was asked for."""
    found = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
    headers = {"accept-ranges": "bytes", "last-modified": "Tue, 01 Sep 2026 00:00:00 GMT", **headers}
    if found is None:
        return Answer(200, headers, data)
    begin, end = int(found[1]), min(int(found[2]), len(data) - 1)
    return Answer(206, {**headers, "content-range": f"bytes {begin}-{end}/{len(data)}"}, data[begin : end + 1])


def etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


class WebServer(Loopback):
    """Files under `/models/`."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        super().__init__()

    def respond(self, request: Request) -> Answer:
        data = self.files.get(request.path.removeprefix("/models/"))
        return Answer(404) if data is None else ranged(request, data, {"etag": etag(data)})


class S3(Loopback):
    """One bucket, `/bucket/`; answers to anybody."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects
        super().__init__()

    def respond(self, request: Request) -> Answer:
        key = request.path.removeprefix("/bucket").removeprefix("/")
        if not key:
            return self._listing(request)
        data = self.objects.get(key)
        return Answer(404) if data is None else ranged(request, data, {"etag": etag(data)})

    def _listing(self, request: Request) -> Answer:
        prefix = request.query.get("prefix", [""])[0]
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-09-01T00:00:00.000Z</LastModified>"
            f"<ETag>{escape(etag(data))}</ETag><Size>{len(data)}</Size></Contents>"
            for key, data in sorted(self.objects.items())
            if key.startswith(prefix)
        )
        body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
        return Answer(200, {"content-type": "application/xml"}, body.encode())


class Hub(Loopback):
    """A hub with one repository, `org/model`, and its storage at another address, as the real one has."""

    def __init__(self, files: dict[str, bytes], *, token: str = "", large_bytes: int = 100_000) -> None:
        self.files = files
        self.token = token
        self.large_bytes = large_bytes
        self.storage = Storage(self)
        self.listed: list[dict[str, object]] | None = None
        self.signature = 1
        super().__init__()

    def close(self) -> None:
        super().close()
        self.storage.close()

    def entries(self) -> list[dict[str, object]]:
        return [self._entry(path, data) for path, data in self.files.items()]

    def _entry(self, path: str, data: bytes) -> dict[str, object]:
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, object] = {"type": "file", "path": path, "size": len(data), "oid": blob}
        if len(data) >= self.large_bytes:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            entry["oid"] = "9" * 40
        return entry

    def respond(self, request: Request) -> Answer:
        if self.token and request.headers.get("authorization") != f"Bearer {self.token}":
            return Answer(401, {"x-error-message": "Invalid username or password."})
        if request.path.startswith("/api/models/org/model/"):
            return self._api(request)
        found = re.fullmatch(rf"/org/model/resolve/{COMMIT}/(.*)", request.path)
        data = self.files.get(found[1]) if found else None
        if found is None or data is None:
            return Answer(404, {"x-error-code": "EntryNotFound" if found else "RepoNotFound"})
        headers = {"x-repo-commit": COMMIT, "etag": etag(data)}
        if len(data) < self.large_bytes:
            return ranged(request, data, headers)
        location = f"{self.storage.url}/blob/{quote(found[1])}?signature={self.signature}"
        return Answer(302, {**headers, "location": location})

    def _api(self, request: Request) -> Answer:
        kind, _, revision = request.path.removeprefix("/api/models/org/model/").partition("/")
        if revision not in {"main", "v1.0", COMMIT}:
            return Answer(404, {"x-error-code": "RevisionNotFound"})
        if kind == "revision":
            body = json.dumps({"id": "org/model", "sha": COMMIT, "siblings": []})
            return Answer(200, {"content-type": "application/json"}, body.encode())
        entries = self.entries() if self.listed is None else self.listed
        start = int(request.query.get("cursor", ["0"])[0])
        headers = {"content-type": "application/json"}
        if start + 2 < len(entries):
            headers["link"] = f'<{self.url}{quote(request.path)}?recursive=true&cursor={start + 2}>; rel="next"'
        return Answer(200, headers, json.dumps(entries[start : start + 2]).encode())


class Storage(Loopback):
    """Where a hub keeps large files: signed for a while, and not to be shown the hub's token."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        super().__init__()

    def respond(self, request: Request) -> Answer:
        if "authorization" in request.headers:
            return Answer(400, {}, b"only one authentication is allowed")
        if request.query.get("signature") != [str(self._hub.signature)]:
            return Answer(403, {}, b"expired")
        data = self._hub.files.get(request.path.removeprefix("/blob/"))
        return Answer(404) if data is None else ranged(request, data, {"etag": etag(data)})


@contextmanager
def serving(*servers: Loopback) -> Iterator[None]:
    try:
        yield
    finally:
        for server in servers:
            server.close()


def cut_after(count: int) -> Callable[[Request, Answer], Answer]:
    """The right answer, of which only `count` bytes come before the connection ends."""
    return lambda _, right: right._replace(sent=count)


def instead(status: int, **headers: str) -> Callable[[Request, Answer], Answer]:
    return lambda _request, _right: Answer(
        status, {name.replace("_", "-"): value for name, value in headers.items()}
    )


class Pauses:
    """Attempts that do not sleep; `taken_s` is what they would have slept."""

    def __init__(self) -> None:
        self.taken_s: list[float] = []
        self.attempts = Attempts(pause=self.taken_s.append, clock_s=lambda: sum(self.taken_s), draw=lambda: 0.5)

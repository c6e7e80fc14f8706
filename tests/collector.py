"""A stand-in for an OpenTelemetry collector: takes OTLP over HTTP and keeps what it was sent."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector:
    """`endpoint` is its base address; `requests` grows as batches come."""

    def __init__(self, endpoint: str, requests: list[ExportTraceServiceRequest]) -> None:
        self.endpoint = endpoint
        self.requests = requests

    def spans(self) -> list[tuple[str, Span]]:
        """All spans so far, each with the name of its service."""
        found = []
        for request in list(self.requests):
            for resource in request.resource_spans:
                names = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
                for scope in resource.scope_spans:
                    found += [(names["service.name"], span) for span in scope.spans]
        return found


class _Handler(BaseHTTPRequestHandler):
    received: list[ExportTraceServiceRequest]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        if self.path == "/v1/traces":
            type(self).received.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200 if self.path == "/v1/traces" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the library's name
        return


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on loopback while inside."""
    handler = type("Handler", (_Handler,), {"received": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield Collector(f"http://127.0.0.1:{server.server_port}", handler.received)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

"""A closed-loop HTTP/1.1 load generator in one process: `python -m benchmarks.load --help`.

Each connection sends the next request when the answer to the last is complete. It reads just enough of an answer
to know its status and its end, so that one core of it loads more than one core of what it measures. Prints one
JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from typing import cast

import msgspec
import uvloop

GRACE_S_MAX = 10.0
"""How long answers may take after the measured time is over."""
LAST_CHUNK = b"0\r\n\r\n"


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured. Latencies in milliseconds, from the request's write to its answer's last byte."""

    requests: int
    failed: int
    elapsed_s: float
    rps: float
    p50_ms: float
    p99_ms: float


class _Client(asyncio.Protocol):
    """One connection."""

    def __init__(self, request: bytes, run: _Run) -> None:
        self._request = request
        self._run = run
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._sent_ns = 0
        # Bytes of the answer that is being read: -1 if the head is not there yet, -2 if chunked.
        self._expected = -1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._next()

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        if self._expected == -1 and not self._head():
            return
        if self._expected == -2:
            # Good enough for bodies that this benchmark's own service makes.
            complete = self._buffer.endswith(LAST_CHUNK)
        else:
            complete = len(self._buffer) >= self._expected
        if complete:
            self._run.done(time.perf_counter_ns() - self._sent_ns)
            self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._sent_ns:
            self._run.failed += 1
        self._run.closed()

    def _next(self) -> None:
        assert self._transport is not None
        self._buffer, self._expected, self._sent_ns = b"", -1, 0
        now_ns = time.perf_counter_ns()
        if now_ns >= self._run.until_ns:
            self._transport.close()
            return
        self._sent_ns = now_ns
        self._transport.write(self._request)

    def _head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = self._buffer[:end].lower()
        if not head.startswith(b"http/1.1 200"):
            self._run.refuse(self._buffer[:500])
        at = head.find(b"\r\ncontent-length:")
        if at >= 0:
            stop = head.find(b"\r\n", at + 2)
            self._expected = end + 4 + int(head[at + 17 : stop if stop >= 0 else end])
        else:
            self._expected = -2
        return True


class _Run:
    """What the connections share."""

    def __init__(self, connections: int, seconds: float) -> None:
        self.until_ns = time.perf_counter_ns() + int(seconds * 1e9)
        self.latencies_ns: list[int] = []
        self.failed = 0
        self.refusal = b""
        self._open = connections
        self.over = asyncio.Event()

    def done(self, latency_ns: int) -> None:
        self.latencies_ns.append(latency_ns)

    def refuse(self, answer: bytes) -> None:
        self.failed += 1
        self.refusal = self.refusal or answer

    def closed(self) -> None:
        self._open -= 1
        if self._open == 0:
            self.over.set()


async def run(target: str, request: bytes, *, connections: int, seconds: float) -> Load:
    """Loads `target` (`HOST:PORT` or `unix:PATH`) for `seconds`. Raises RuntimeError if an answer is not a 200."""
    state = _Run(connections, seconds)
    loop = asyncio.get_running_loop()
    started_ns = time.perf_counter_ns()
    for _number in range(connections):
        if target.startswith("unix:"):
            await loop.create_unix_connection(lambda: _Client(request, state), target.removeprefix("unix:"))
        else:
            host, _, port = target.rpartition(":")
            await loop.create_connection(lambda: _Client(request, state), host, int(port))
    async with asyncio.timeout(seconds + GRACE_S_MAX):
        await state.over.wait()
    elapsed_s = (time.perf_counter_ns() - started_ns) / 1e9
    if state.refusal:
        raise RuntimeError(f"{target} answered {state.refusal!r}")
    taken = sorted(state.latencies_ns)
    if not taken:
        raise RuntimeError(f"{target} answered nothing in {seconds:g} s")
    return Load(
        requests=len(taken),
        failed=state.failed,
        elapsed_s=elapsed_s,
        rps=len(taken) / elapsed_s,
        p50_ms=taken[len(taken) // 2] / 1e6,
        p99_ms=taken[min(len(taken) - 1, len(taken) * 99 // 100)] / 1e6,
    )


def request_bytes(path: str, body: str, key: str = "") -> bytes:
    """A POST of JSON, as a small client would send it."""
    octets = body.encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: benchmark\r\nAccept: */*\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(octets)}\r\n"
    )
    head += f"Authorization: Bearer {key}\r\n\r\n" if key else "\r\n"
    return head.encode() + octets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", help="HOST:PORT or unix:PATH")
    parser.add_argument("path")
    parser.add_argument("body", help="JSON")
    parser.add_argument("--key", default="", help="an API key to send")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=2.0)
    chosen = parser.parse_args()
    request = request_bytes(chosen.path, chosen.body, chosen.key)
    load = uvloop.run(run(chosen.target, request, connections=chosen.connections, seconds=chosen.seconds))
    sys.stdout.write(msgspec.json.encode(load).decode() + "\n")


if __name__ == "__main__":
    main()

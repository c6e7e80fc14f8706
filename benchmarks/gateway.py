"""The warm path: Snowdrop's gateway beside a bare aiohttp reverse proxy, both to the same replica's unix socket.

Requests/s in a closed loop at 32 and 128 connections, latency at one connection, the CPU time that the proxy or
the gateway used per request (the steadiest figure on a busy machine), and events/s of server-sent streams.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from benchmarks import harness
from benchmarks.harness import Bar, Contestant, Metric, Options, Results, Round
from benchmarks.load import Load
from benchmarks.running import Platform, cpu_ns, running_platform

SERVICE = Path(__file__).resolve().parent / "services" / "echo" / "service.py"
ECHO = '{"text": "a flower in the snow"}'
EVENTS = 100
STREAMS = 16
LOAD_S_MAX = 60.0
STOP_S_MAX = 10.0

DIRECT, BARE, ONE, TWO = "direct", "bare-aiohttp", "gateway", "gateway-2-workers"
NOTES = {
    DIRECT: "the replica's unix socket",
    BARE: "aiohttp reverse proxy, one process",
    ONE: "snowdrop, one worker",
    TWO: "snowdrop, two workers and an owner",
}
METRICS = (
    Metric(name="rps_32", better="higher", digits=0),
    Metric(name="rps_128", better="higher", digits=0),
    Metric(name="p50_ms", better="lower"),
    Metric(name="p99_ms", better="lower"),
    Metric(name="cpu_us", better="lower", digits=0),
    Metric(name="events_per_s", better="higher", digits=0),
)
RPS_RATIO_MIN = 0.6
P50_OVERHEAD_MS_MAX = 1.0


class _Way:
    """One way to the replica: where to send requests, and whose CPU time they cost."""

    def __init__(self, target: str, prefix: str, pids: Sequence[int], seconds: float) -> None:
        self._target = target
        self._prefix = prefix
        self._pids = list(pids)
        self._seconds = seconds

    def round(self) -> Round:
        taken: dict[str, float] = {}
        before_ns = cpu_ns(self._pids)
        busy = self._load("/echo", ECHO, 32)
        if self._pids:
            taken["cpu_us"] = (cpu_ns(self._pids) - before_ns) / busy.requests / 1e3
        taken["rps_32"] = busy.rps
        taken["rps_128"] = self._load("/echo", ECHO, 128).rps
        alone = self._load("/echo", ECHO, 1)
        taken["p50_ms"], taken["p99_ms"] = alone.p50_ms, alone.p99_ms
        taken["events_per_s"] = self._load("/events", f'{{"count": {EVENTS}}}', STREAMS).rps * EVENTS
        return taken

    def _load(self, path: str, body: str, connections: int) -> Load:
        command = [sys.executable, "-m", "benchmarks.load", self._target, self._prefix + path, body]
        command += ["--connections", str(connections), "--seconds", str(self._seconds)]
        done = subprocess.run(
            command, cwd=harness.ROOT, capture_output=True, timeout=self._seconds + LOAD_S_MAX, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(
                f"load on {self._target}{path} failed: {done.stderr.decode(errors='replace')[-2000:]}"
            )
        load = msgspec.json.decode(done.stdout, type=Load)
        if load.failed:
            raise RuntimeError(f"{load.failed} requests to {self._target}{path} failed")
        return load


@contextmanager
def bare_proxy(socket: Path) -> Iterator[tuple[str, int]]:
    """The proxy's address and process id while inside."""
    command = [sys.executable, "-m", "benchmarks.peers.bare_proxy", str(socket)]
    with subprocess.Popen(command, cwd=harness.ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            if not port:
                raise RuntimeError("the bare proxy did not start")
            yield f"127.0.0.1:{port}", process.pid
        finally:
            process.terminate()
            process.wait(timeout=STOP_S_MAX)


def gateway_way(platform: Platform, name: str, seconds: float) -> _Way:
    return _Way(platform.gateway, f"/{name}", platform.gateway_pids(), seconds)


def bars(results: Results) -> list[Bar]:
    """The ratio is that of the worse of both loads."""
    ratios = [results.ratio(ONE, BARE, metric) for metric in ("rps_32", "rps_128")]
    known = [ratio for ratio in ratios if ratio is not None]
    return [
        Bar(name="gateway.rps_ratio", value=min(known, default=None), limit=RPS_RATIO_MIN, better="higher"),
        Bar(
            name="gateway.p50_overhead_ms",
            value=results.difference(ONE, DIRECT, "p50_ms"),
            limit=P50_OVERHEAD_MS_MAX,
            better="lower",
        ),
    ]


def run(chosen: Options) -> None:
    seconds: float = chosen.own.seconds
    with ExitStack() as stack:
        platform = stack.enter_context(running_platform())
        platform.deploy(SERVICE, "echo")
        socket = platform.replica_socket("echo")
        proxy, proxy_pid = stack.enter_context(bare_proxy(socket))
        ways = {
            DIRECT: _Way(f"unix:{socket}", "", [], seconds),
            BARE: _Way(proxy, "", [proxy_pid], seconds),
            ONE: gateway_way(platform, "echo", seconds),
        }
        if not chosen.own.one_worker_only:
            second = stack.enter_context(running_platform("--workers", "2"))
            second.deploy(SERVICE, "echo")
            ways[TWO] = gateway_way(second, "echo", seconds)
        contestants = [Contestant(name=name, run=way.round, note=NOTES[name]) for name, way in ways.items()]
        results = harness.measure(contestants, METRICS, chosen)
    harness.publish("gateway", results, bars(results), chosen, baseline=BARE)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one measurement")
    parser.add_argument("--one-worker-only", action="store_true", help="leave the platform of two workers out")
    run(harness.options(parser))


if __name__ == "__main__":
    main()

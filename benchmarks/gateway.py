"""The warm path: Snowdrop's gateway beside Ray Serve, BentoML, and a bare aiohttp reverse proxy.

All serve the same handler. Snowdrop does it with API keys required, queue, metrics and request records on; the
bare proxy relays to the same replica's unix socket and does nothing else, with the same number of processes.

Requests/s in a closed loop at several numbers of connections, latency at one connection, events/s of server-sent
streams, and the CPU time of proxy or gateway per request (the steadiest figure on a busy machine). A peer that
cannot be installed or does not start is named with the reason and left out.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import harness
from benchmarks.harness import Bar, Contestant, Metric, Options, PeerError, Results, Round
from benchmarks.load import Load
from benchmarks.running import Platform, cpu_ns, running_platform

SERVICE = Path(__file__).resolve().parent / "services" / "echo" / "service.py"
PEERS = Path(__file__).resolve().parent / "peers"
ECHO = '{"text": "a flower in the snow"}'
EVENTS = 100
CONNECTIONS = (8, 64, 256)
STREAMS = (16, 128)
LOAD_S_MAX = 60.0
STOP_S_MAX = 15.0
PEER_READY_S_MAX = 120.0
SAID_CHARS = 500

DIRECT, BARE, BARE_TWO, ONE, TWO = "direct", "bare-aiohttp", "bare-aiohttp-2", "gateway", "gateway-2-workers"
RAY, BENTO = "ray-serve", "bentoml"
NOTES = {
    DIRECT: "the replica's unix socket",
    BARE: "aiohttp reverse proxy, one process",
    BARE_TWO: "the same, two processes",
    ONE: "snowdrop, one worker",
    TWO: "snowdrop, two workers and an owner",
    RAY: "proxy and one replica",
    BENTO: "one worker",
}
METRICS = (
    Metric(name="p50_ms", better="lower"),
    Metric(name="p99_ms", better="lower"),
    *(
        Metric(name=f"rps_{connections}", better="higher", digits=0, plot=True)
        for connections in (1, *CONNECTIONS)
    ),
    Metric(name="cpu_us", better="lower", digits=0),
    *(Metric(name=f"events_per_s_{streams}", better="higher", digits=0) for streams in STREAMS),
)
THROUGHPUT = tuple(f"rps_{connections}" for connections in CONNECTIONS)
EVENT_RATES = tuple(f"events_per_s_{streams}" for streams in STREAMS)
TO_RAY_MIN = 8.0
TO_BARE_MIN = 0.8
P50_OVERHEAD_MS_MAX = 0.5


class _Way:
    """One way to the handler: where to send requests, with which key, and whose CPU time they cost."""

    def __init__(self, target: str, prefix: str, pids: Sequence[int], chosen: Options, *, key: str = "") -> None:
        self._target = target
        self._prefix = prefix
        self._pids = list(pids)
        self._seconds: float = chosen.own.seconds
        self._key = key

    def round(self) -> Round:
        taken: dict[str, float] = {}
        alone = self._load("/echo", ECHO, 1)
        taken["p50_ms"], taken["p99_ms"], taken["rps_1"] = alone.p50_ms, alone.p99_ms, alone.rps
        for connections in CONNECTIONS:
            before_ns = cpu_ns(self._pids)
            load = self._load("/echo", ECHO, connections)
            taken[f"rps_{connections}"] = load.rps
            if self._pids and connections == CONNECTIONS[1]:
                taken["cpu_us"] = (cpu_ns(self._pids) - before_ns) / load.requests / 1e3
        for streams in STREAMS:
            load = self._load("/events", f'{{"count": {EVENTS}}}', streams)
            taken[f"events_per_s_{streams}"] = load.rps * EVENTS
        return taken

    def _load(self, path: str, body: str, connections: int) -> Load:
        command = [sys.executable, "-m", "benchmarks.load", self._target, self._prefix + path, body]
        command += ["--connections", str(connections), "--seconds", str(self._seconds), "--key", self._key]
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


class _PeerWay(_Way):
    """A peer that fails in its turn is left out and named; the others' figures are kept."""

    def round(self) -> Round:
        try:
            return super().round()
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            raise PeerError(f"it failed under load: {error}") from error


@contextmanager
def bare_proxy(socket_path: Path, processes: int) -> Iterator[tuple[str, list[int]]]:
    """The proxy's address and process ids while inside."""
    running: list[subprocess.Popen[str]] = []
    port = "0"
    try:
        for _ in range(processes):
            command = [sys.executable, "-m", "benchmarks.peers.bare_proxy", str(socket_path), "--port", port]
            process = subprocess.Popen(command, cwd=harness.ROOT, stdout=subprocess.PIPE, text=True)
            running.append(process)
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            if not port:
                raise RuntimeError("the bare proxy did not start")
        yield f"127.0.0.1:{port}", [process.pid for process in running]
    finally:
        for process in running:
            process.terminate()
            process.wait(timeout=STOP_S_MAX)
            if process.stdout is not None:
                process.stdout.close()


@contextmanager
def ray_serve() -> Iterator[str]:
    """Ray Serve's address while inside."""
    python = harness.peer_python("ray-serve", ["ray[serve]==2.*"])
    with _peer(lambda port: [str(python), str(PEERS / "ray_echo.py"), str(port)]) as address:
        yield address


@contextmanager
def bentoml() -> Iterator[str]:
    """BentoML's address while inside."""
    python = harness.peer_python("bentoml", ["bentoml==1.*"])

    def command(port: int) -> list[str]:
        made = [
            str(python),
            "-m",
            "bentoml",
            "serve",
            "bento_echo:Echo",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        return [*made, "--working-dir", str(PEERS)]

    with _peer(command) as address:
        yield address


@contextmanager
def _peer(command: Callable[[int], Sequence[str]]) -> Iterator[str]:
    """A server at a free port, once it answers; ended with all that it started. Raises PeerError."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    env = {"PATH": "/usr/bin:/bin", "HOME": str(harness.PEERS), "RAY_USAGE_STATS_ENABLED": "0"}
    env |= {"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": str(harness.PEERS / "bentoml-home")}
    log = harness.PEERS / f"peer-{port}.log"
    with log.open("wb") as said:
        process = subprocess.Popen(
            command(port),
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=said,
            env=env,
            cwd=PEERS,
            start_new_session=True,
        )
    try:
        limit_s = time.monotonic() + PEER_READY_S_MAX
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > limit_s:
                raise PeerError(f"it did not start: {log.read_text(errors='replace').strip()[-SAID_CHARS:]}")
            time.sleep(0.5)
        yield f"127.0.0.1:{port}"
    finally:
        if process.stdin is not None:
            process.stdin.close()
        process.terminate()
        try:
            process.wait(timeout=STOP_S_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it left behind, in a session of its own
        log.unlink(missing_ok=True)


def _answers(port: int) -> bool:
    """Whether the echo is served: a listening port alone is not enough."""
    request = (
        f"POST /echo HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(ECHO)}\r\n\r\n{ECHO}"
    )
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(request.encode())
            return b" 200 " in connection.recv(64)
    except OSError:
        return False


def gateway_way(platform: Platform, name: str, chosen: Options) -> _Way:
    """Through a platform's gateway, with a key of its own."""
    key: Any = msgspec.json.decode(platform.command("key", "create", "benchmark"))
    return _Way(platform.gateway, f"/{name}", platform.gateway_pids(), chosen, key=key["secret"])


def bars(results: Results) -> list[Bar]:
    """Ratios to the bare proxy are those of the worst load; that to Ray Serve is of each one's best throughput."""
    made = [
        Bar(
            name="gateway.p50_overhead_ms",
            value=results.difference(ONE, DIRECT, "p50_ms"),
            limit=P50_OVERHEAD_MS_MAX,
            better="lower",
        ),
        Bar(name="gateway.rps_to_ray_serve", value=_best_ratio(results), limit=TO_RAY_MIN, better="higher"),
    ]
    for mine, bare in ((ONE, BARE), (TWO, BARE_TWO)):
        if mine in results.rounds:
            for kind, names in (("rps", THROUGHPUT), ("events", EVENT_RATES)):
                ratios = [results.ratio(mine, bare, name) for name in names]
                known = [ratio for ratio in ratios if ratio is not None]
                value = min(known, default=None)
                made.append(Bar(name=f"{mine}.{kind}_to_bare", value=value, limit=TO_BARE_MIN, better="higher"))
    return made


def _best_ratio(results: Results) -> float | None:
    ours = max((best for who in (ONE, TWO) if (best := _best(results, who)) is not None), default=None)
    rays = _best(results, RAY)
    return ours / rays if ours is not None and rays else None


def _best(results: Results, contestant: str) -> float | None:
    medians = [results.median(contestant, name) for name in THROUGHPUT]
    return max((median for median in medians if median is not None), default=None)


def run(chosen: Options) -> None:
    missing: dict[str, str] = {}
    with ExitStack() as stack:
        platform = stack.enter_context(running_platform(config="[gateway]\nkeys_required = true\n"))
        platform.deploy(SERVICE, "echo")
        socket_path = platform.replica_socket("echo")
        ways: dict[str, _Way] = {DIRECT: _Way(f"unix:{socket_path}", "", [], chosen)}
        proxies = [(BARE, 1)] if chosen.own.one_worker_only else [(BARE, 1), (BARE_TWO, 2)]
        for name, processes in proxies:
            address, pids = stack.enter_context(bare_proxy(socket_path, processes))
            ways[name] = _Way(address, "", pids, chosen)
        ways[ONE] = gateway_way(platform, "echo", chosen)
        if not chosen.own.one_worker_only:
            second = stack.enter_context(
                running_platform("--workers", "2", config="[gateway]\nkeys_required = true\n")
            )
            second.deploy(SERVICE, "echo")
            ways[TWO] = gateway_way(second, "echo", chosen)
        peers: dict[str, Callable[[], AbstractContextManager[str]]] = {RAY: ray_serve, BENTO: bentoml}
        for name in chosen.own.peers:
            try:
                ways[name] = _PeerWay(stack.enter_context(peers[name]()), "", [], chosen)
            except PeerError as error:
                missing[name] = str(error)
        contestants = [Contestant(name=name, run=way.round, note=NOTES[name]) for name, way in ways.items()]
        results = harness.measure(contestants, METRICS, chosen)
    harness.publish("gateway", results, bars(results), chosen, baseline=BARE, missing=missing)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one measurement")
    parser.add_argument("--one-worker-only", action="store_true", help="leave what has two workers out")
    parser.add_argument(
        "--peers", nargs="*", choices=(RAY, BENTO), default=[RAY, BENTO], help="who else takes part"
    )
    run(harness.options(parser))


if __name__ == "__main__":
    main()

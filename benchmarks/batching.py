"""Adaptive batching: a torch model that is called for each request, beside the same one called for many.

Both run in sandboxes of one platform and are reached at their replicas' sockets, closed loop, at 1 and at 32
connections. Batching is to multiply what many callers get, and to cost a single one nothing.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec

from benchmarks import harness
from benchmarks.harness import Bar, Contestant, Metric, Options, Results, Round
from benchmarks.load import Load
from benchmarks.running import Platform, running_platform

SERVICE = Path(__file__).resolve().parent / "services" / "batching" / "service.py"
BODY = '{"seed": 11}'
CONNECTIONS = 32
LOAD_S_MAX = 60.0
SINGLE, BATCHED = "single", "batched"
NOTES = {SINGLE: "one call a request, in threads", BATCHED: "sd.Batch(size_max=32, wait_ms_max=5)"}
METRICS = (
    Metric(name="rps_32", better="higher", digits=0),
    Metric(name="p50_32_ms", better="lower"),
    Metric(name="rps_1", better="higher", digits=0),
    Metric(name="p50_1_ms", better="lower"),
)
RPS_RATIO_MIN = 2.0
ALONE_RATIO_MAX = 1.25


def load(platform: Platform, name: str, connections: int, seconds: float) -> Load:
    """Closed-loop requests to the replica of `name`. Raises RuntimeError if any fails."""
    command = [sys.executable, "-m", "benchmarks.load", f"unix:{platform.replica_socket(name)}", "/score", BODY]
    command += ["--connections", str(connections), "--seconds", str(seconds)]
    done = subprocess.run(
        command, cwd=harness.ROOT, capture_output=True, timeout=seconds + LOAD_S_MAX, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"load on {name} failed: {done.stderr.decode(errors='replace')[-2000:]}")
    taken = msgspec.json.decode(done.stdout, type=Load)
    if taken.failed:
        raise RuntimeError(f"{taken.failed} requests to {name} failed")
    return taken


def bars(results: Results) -> list[Bar]:
    return [
        Bar(
            name="batching.rps_ratio",
            value=results.ratio(BATCHED, SINGLE, "rps_32"),
            limit=RPS_RATIO_MIN,
            better="higher",
        ),
        Bar(
            name="batching.p50_alone_ratio",
            value=results.ratio(BATCHED, SINGLE, "p50_1_ms"),
            limit=ALONE_RATIO_MAX,
            better="lower",
        ),
    ]


def run(chosen: Options) -> None:
    seconds: float = chosen.own.seconds
    with running_platform() as platform:
        for name in (SINGLE, BATCHED):
            platform.deploy(Path(f"{SERVICE}:{name.capitalize()}"), name)

        def contestant(name: str) -> Contestant:
            def measured() -> Round:
                many = load(platform, name, CONNECTIONS, seconds)
                alone = load(platform, name, 1, seconds)
                return {
                    "rps_32": many.rps,
                    "p50_32_ms": many.p50_ms,
                    "rps_1": alone.rps,
                    "p50_1_ms": alone.p50_ms,
                }

            return Contestant(name=name, run=measured, note=NOTES[name])

        results = harness.measure([contestant(SINGLE), contestant(BATCHED)], METRICS, chosen)
    harness.publish("batching", results, bars(results), chosen, baseline=SINGLE)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one measurement")
    run(harness.options(parser))


if __name__ == "__main__":
    main()

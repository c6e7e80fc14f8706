"""A cold start on a node that has the content: all but imports and `startup`, as the receipt shows it.

The baseline, `imports`, is a plain process that imports what a replica's runtime imports and ends: what Python
itself costs here, without sandbox, content, queue or scaling.
"""

from __future__ import annotations

import http.client
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from benchmarks import harness
from benchmarks.harness import Bar, Contestant, Metric, Round
from benchmarks.running import Platform, running_platform
from snowdrop.domain.receipt import Receipt

SERVICE = Path(__file__).parent / "services" / "echo" / "service.py"
OVERHEAD_MS_MAX = 150.0
"""The bar of "From zero to an answer"."""
ZERO_S_MAX = 30.0
METRICS = (
    Metric(name="waited_ms", better="lower"),
    Metric(name="overhead_ms", better="lower"),
)


def from_zero(platform: Platform) -> Round:
    """Waits for zero, calls once, reads the receipt."""
    limit_s = time.monotonic() + ZERO_S_MAX
    while (view := platform.describe("echo").view).ready + view.starting + view.draining:
        if time.monotonic() > limit_s:
            raise TimeoutError("the service did not go to zero")
        time.sleep(0.1)
    connection = http.client.HTTPConnection(platform.gateway, timeout=ZERO_S_MAX)
    try:
        connection.request("POST", "/echo/echo", b'{"text": "hello"}', {"content-type": "application/json"})
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise RuntimeError(f"the call failed: {body.decode(errors='replace')}")
    finally:
        connection.close()
    receipt = _receipt(platform, response.headers["snowdrop-receipt"])
    own = sum(span.duration_ns for span in receipt.main_line() if span.name in {"import", "startup"})
    return {"waited_ms": receipt.waited_ns / 1e6, "overhead_ms": (receipt.waited_ns - own) / 1e6}


def _receipt(platform: Platform, name: str) -> Receipt:
    """The receipt once its caller's part is stored, which happens behind the answer."""
    limit_s = time.monotonic() + ZERO_S_MAX
    while True:
        shown = msgspec.json.decode(platform.command("receipts", "show", name), type=_Shown)
        if shown.receipt.caller is not None:
            return shown.receipt
        if time.monotonic() > limit_s:
            raise TimeoutError("the receipt has no caller")
        time.sleep(0.02)


class _Shown(msgspec.Struct):
    receipt: Receipt


def imports() -> Round:
    started_s = time.perf_counter()
    code = "import snowdrop.replica.app, snowdrop.replica.server"
    subprocess.run([sys.executable, "-c", code], check=True)
    took_ms = (time.perf_counter() - started_s) * 1e3
    return {"waited_ms": took_ms}


def main() -> None:
    chosen = harness.options(harness.parser(__doc__, rounds=15, warmups=2))
    with running_platform() as platform:
        platform.deploy(SERVICE, "echo")
        platform.command("scale", "echo", "--min", "0", "--idle-s", "0.1")
        contestants = (
            Contestant(name="imports", run=imports),
            Contestant(name="from zero", run=lambda: from_zero(platform)),
        )
        results = harness.measure(contestants, METRICS, chosen)
    overhead_ms = results.median("from zero", "overhead_ms")
    bar = Bar(name="cold_start.overhead_ms", value=overhead_ms, limit=OVERHEAD_MS_MAX, better="lower")
    harness.publish("cold_start", results, (bar,), chosen, baseline="imports")


if __name__ == "__main__":
    main()

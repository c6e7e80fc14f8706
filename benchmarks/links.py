"""Links between two network namespaces with a bandwidth and a delay, on a kernel that has no netem.

Two namespaces of our own, each with one TUN device; `peers/delay_link.c` carries the packets from one to the
other, charges a token bucket and holds each packet back for half of the round trip. TCP runs from end to end, so
that slow start, acknowledgements and handshakes take the round trips that they take on a real link. Needs root.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import msgspec

from benchmarks.compiled import CompilerMissingError, compiled

COMMAND_S_MAX = 10.0
PREFIX = "sdbench-"
"""Of the namespaces' names; the benchmark's process id follows."""
MTU_BYTES = 1500
AHEAD_MS = 2.0
"""The bucket lets so much wait for its turn; the rest stays with its sender, as behind a full network card."""
AHEAD_BYTES_MIN = 128 << 10
CLIENT_ADDRESS, SERVER_ADDRESS = "10.213.77.1", "10.213.77.2"


class LinkUnavailableError(Exception):
    """Shaped links cannot be made on this machine, for the reason given."""


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """Bandwidth in each direction, and the round trip. `mbit_s` of 0 is no limit."""

    mbit_s: float
    rtt_ms: float

    @property
    def bytes_per_s(self) -> float:
        return self.mbit_s * 1e6 / 8

    def __str__(self) -> str:
        return f"{self.mbit_s / 1000:g} Gbit/s, {self.rtt_ms:g} ms"


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A link that is up. Put `client_prefix` or `server_prefix` before a command to run it at that end."""

    shape: Shape
    client_netns: str
    server_netns: str
    server_address: str = SERVER_ADDRESS

    @property
    def client_prefix(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.client_netns)

    @property
    def server_prefix(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.server_netns)


def parse_shape(text: str) -> Shape:
    """`MBIT:RTT_MS`, as in `2000:5`. Raises ValueError."""
    mbit, _, rtt = text.partition(":")
    shape = Shape(mbit_s=float(mbit), rtt_ms=float(rtt or 0))
    if shape.mbit_s < 0 or shape.rtt_ms < 0:
        raise ValueError(f"{text!r}: a bandwidth and a delay are not negative")
    return shape


def why_unavailable() -> str | None:
    """Why this machine cannot shape links; None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not Path("/dev/net/tun").exists():
        return "the kernel has no TUN devices (/dev/net/tun)"
    return None


@contextmanager
def shaped_link(shape: Shape, scratch: Path) -> Iterator[Link]:
    """A link while inside; namespaces, devices and the process are gone afterwards.

    `scratch` takes the compiled program. Raises LinkUnavailableError.
    """
    reason = why_unavailable()
    if reason is not None:
        raise LinkUnavailableError(reason)
    try:
        program = compiled("delay_link", scratch)
    except CompilerMissingError as error:
        raise LinkUnavailableError(str(error)) from error
    _remove_left_over()
    name = f"{PREFIX}{os.getpid()}"
    link = Link(shape=shape, client_netns=f"{name}-c", server_netns=f"{name}-s")
    with ExitStack() as stack:
        for netns in (link.client_netns, link.server_netns):
            _ip("netns", "add", netns)
            stack.callback(_remove, netns)
        stack.enter_context(_carrier(program, link))
        ends = (
            (link.client_netns, "sdclient", CLIENT_ADDRESS, SERVER_ADDRESS),
            (link.server_netns, "sdserver", SERVER_ADDRESS, CLIENT_ADDRESS),
        )
        for netns, device, own, other in ends:
            _ip("-n", netns, "link", "set", "lo", "up")
            _ip("-n", netns, "addr", "add", own, "peer", other, "dev", device)
            _ip("-n", netns, "link", "set", device, "mtu", str(MTU_BYTES), "up")
        yield link


@contextmanager
def _carrier(program: Path, link: Link) -> Iterator[None]:
    shape = link.shape
    ahead = max(AHEAD_BYTES_MIN, int(shape.bytes_per_s * AHEAD_MS / 1e3))
    words = [link.client_netns, "sdclient", link.server_netns, "sdserver"]
    words += [f"{shape.bytes_per_s:.0f}", f"{shape.rtt_ms * 500:.0f}", str(ahead)]
    process = subprocess.Popen([str(program), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if process.stdout.readline() != b"ready\n":
            raise LinkUnavailableError(f"the link's process ended with {process.wait(COMMAND_S_MAX)}")
        yield
    finally:
        process.stdin.close()
        try:
            process.wait(COMMAND_S_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _remove_left_over(root: Path = Path("/run/netns"), proc: Path = Path("/proc")) -> None:
    """Removes namespaces of benchmarks that were killed, so that they could not do it."""
    for found in root.glob(f"{PREFIX}*"):
        pid = found.name.removeprefix(PREFIX).partition("-")[0]
        if pid.isdigit() and not (proc / pid).exists():
            _remove(found.name)


def _remove(netns: str) -> None:
    with suppress(LinkUnavailableError):
        _ip("netns", "delete", netns)


def _ip(*words: str) -> None:
    command: Sequence[str] = ("ip", *words)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S_MAX, check=False)
    except FileNotFoundError as error:
        raise LinkUnavailableError("no `ip`: apt-get install iproute2") from error
    if done.returncode != 0:
        raise LinkUnavailableError(f"`{' '.join(command)}`: {done.stderr.strip()}")

"""A replica as a fork of a parent that has imported torch and transformers, to the first line of user code.

The baseline is the ordinary start in the same sandbox, whose service imports both itself. Private memory is what
the replica's process shares with nobody at that line.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import anyio.from_thread
import msgspec

from benchmarks import harness
from benchmarks.harness import Bar, Contestant, Metric, Round
from snowdrop.agent.sandbox.bubblewrap import BubblewrapLauncher, UidPool, find_bwrap
from snowdrop.agent.sandbox.detect import detect_limits
from snowdrop.agent.sandbox.environment import Environment
from snowdrop.agent.sandbox.forked import WarmParent, start_parent
from snowdrop.agent.sandbox.launcher import (
    LIFECYCLE,
    Descriptor,
    LaunchSpec,
    Mount,
    Output,
    SandboxHandle,
    replica_entry,
)
from snowdrop.agent.sandbox.limits import LimitBackend
from snowdrop.domain.ids import DeploymentName, ReplicaId, RevisionId, TenantId, fresh_id
from snowdrop.domain.replica import ReplicaKey
from snowdrop.domain.service import ServiceSpec
from snowdrop.wire.codec import PROTOCOL_VERSION
from snowdrop.wire.packet import PacketChannel, packet_pair
from snowdrop.wire.replica import FROM_REPLICA, Boot, StageFailed

IMPORTS = ("torch", "transformers")
CODE = """
import time
import torch
import transformers
ran_ns = time.monotonic_ns()
lines = open("/proc/self/smaps_rollup").read().splitlines()
private_kb = sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
raise RuntimeError(f"RAN {ran_ns} {private_kb}")
"""
ROUND_S_MAX = 120.0
PARENT_BYTES_MAX = 4 << 30
RUNS_MS_MAX, PRIVATE_MB_MAX = 40.0, 100.0
METRICS = (Metric(name="runs_ms", better="lower"), Metric(name="private_mb", better="lower"))

Launch = Callable[[LaunchSpec], Awaitable[SandboxHandle]]


async def one_start(launch: Launch, code: Path) -> Round:
    """Launches, boots, and hears of user code when it ran."""
    ours, theirs = packet_pair()
    null = os.open("/dev/null", os.O_WRONLY)
    replica = ReplicaId(fresh_id("rep"))
    started_ns = time.monotonic_ns()
    try:
        handle = await launch(
            LaunchSpec(
                replica=replica,
                entry=replica_entry(Environment.current().python),
                output=Output(stdout_fd=null, stderr_fd=null),
                mounts=(Mount(source=code, target="/app"),),
                descriptors=(Descriptor(role=LIFECYCLE, fd=theirs.fileno()),),
            )
        )
    finally:
        theirs.close()
        os.close(null)
    channel = PacketChannel(ours, FROM_REPLICA)
    boot = Boot(
        version=PROTOCOL_VERSION,
        key=ReplicaKey(
            tenant=TenantId("default"),
            deployment=DeploymentName("bench"),
            revision=RevisionId("rev-1"),
            replica=replica,
        ),
        spec=ServiceSpec(class_name="Ran", entry="ran:Ran"),
        code_directory="/app",
    )
    try:
        with anyio.fail_after(ROUND_S_MAX):
            await channel.send(boot)
            while not isinstance(message := (await channel.receive())[0], StageFailed):
                pass
            await handle.wait()
    finally:
        channel.close()
        await handle.close()
    _, _, told = message.error.message.partition("RAN ")
    if not told:
        raise RuntimeError(msgspec.json.encode(message.error).decode())
    ran_ns, private_kb = (int(word) for word in told.split()[:2])
    return {"runs_ms": (ran_ns - started_ns) / 1e6, "private_mb": private_kb * 1024 / 1e6}


async def warm_parent(limits: LimitBackend, uids: UidPool, bwrap: Path, output: Output) -> WarmParent:
    name = ReplicaId(fresh_id("warm"))
    made = await start_parent(limits, uids, bwrap, name=name, memory_bytes_max=PARENT_BYTES_MAX, output=output)
    await made.warm(IMPORTS)
    return made


def main() -> None:
    chosen = harness.options(harness.parser(__doc__, rounds=15, warmups=1))
    code = Path(tempfile.mkdtemp(prefix="warm-bench-"))
    code.chmod(0o755)
    (code / "ran.py").write_text(CODE)
    limits = detect_limits(f"bench-{os.getpid()}")
    bwrap, uids = find_bwrap(), UidPool()
    ordinary = BubblewrapLauncher(limits, bwrap=bwrap, uids=uids)
    try:
        with anyio.from_thread.start_blocking_portal() as portal:
            null = os.open("/dev/null", os.O_WRONLY)
            parent = portal.call(warm_parent, limits, uids, bwrap, Output(stdout_fd=null, stderr_fd=null))
            contestants = (
                Contestant(name="ordinary", run=lambda: portal.call(one_start, ordinary.launch, code)),
                Contestant(name="forked", run=lambda: portal.call(one_start, parent.fork, code)),
            )
            results = harness.measure(contestants, METRICS, chosen)
            portal.call(parent.close)
            os.close(null)
    finally:
        shutil.rmtree(code)
        limits.sweep()
    bars = (
        Bar(
            name="warm_pool.runs_ms", value=results.median("forked", "runs_ms"), limit=RUNS_MS_MAX, better="lower"
        ),
        Bar(
            name="warm_pool.private_mb",
            value=results.median("forked", "private_mb"),
            limit=PRIVATE_MB_MAX,
            better="lower",
        ),
    )
    harness.publish("warm_pool", results, bars, chosen, baseline="ordinary")


if __name__ == "__main__":
    main()

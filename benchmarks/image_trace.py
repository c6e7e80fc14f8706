"""How long a start in an image takes on a link with a delay: read on demand, and with what an earlier start read
fetched ahead.

The start reads 200 small files of an image one after the other, in an order that is not theirs on the disk;
between them lies what nobody reads. Each round is a node that has nothing: a new data plane with an empty cache,
at one end of a shaped link, the origin (nginx) at the other. Time runs from the mount to the last byte read. Needs
root.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec

from benchmarks import harness, links, servers
from benchmarks.fs_ops import push
from benchmarks.harness import Bar, Contestant, Metric, Round
from benchmarks.links import Link
from snowdrop.agent.content import DataPlaneKeeper
from snowdrop.agent.dataplane.client import DataPlane
from snowdrop.agent.mounts import ModelMounts
from snowdrop.content.imagetrace import stored_traces
from snowdrop.content.origin import open_origin
from snowdrop.content.settings import DataPlaneSettings
from snowdrop.domain.ids import DEFAULT_TENANT
from snowdrop.domain.manifest import ArtefactRef
from snowdrop.image.oci import machine_platform

START = "benchmark"
READ_BYTES = 40 << 10
ROUND_S_MAX = 300.0
LOOK_S = 0.05
ON_DEMAND, TRACED = "on demand", "with trace"
METRICS = (
    Metric(name="start_s", better="lower", plot=True),
    Metric(name="fetched_mib", better="lower", digits=0),
    Metric(name="waited_mib", better="lower", digits=0),
)
TRACE_RATIO_MIN = 2.0


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a child process does: mounts, reads, and records if the origin is one that it can write."""

    origin_url: str
    artefact: ArtefactRef
    start: str
    files: int
    record: bool


def make_image(folder: Path, files: int, unread_bytes: int) -> Path:
    """A docker archive with files that are read between others that are not."""
    rng = random.Random(1)
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as made:
        for number in range(files):
            for name, size in ((read_name(number), READ_BYTES), (f"lib/{number:04d}/unread.so", unread_bytes)):
                info = tarfile.TarInfo(name)
                info.size = size
                made.addfile(info, io.BytesIO(rng.randbytes(size)))
    diff = f"sha256:{hashlib.sha256(layer.getvalue()).hexdigest()}"
    platform = machine_platform(os.uname().machine)
    rootfs = {"type": "layers", "diff_ids": [diff]}
    config = {"architecture": platform.architecture, "os": platform.os, "config": {}, "rootfs": rootfs}
    listed = [{"Config": "config.json", "RepoTags": ["bench:latest"], "Layers": ["layer.tar"]}]
    documents = (
        ("config.json", json.dumps(config).encode()),
        ("layer.tar", layer.getvalue()),
        ("manifest.json", json.dumps(listed).encode()),
    )
    path = folder / "image.tar"
    with tarfile.open(path, mode="w") as made:
        for name, data in documents:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
    return path


def read_name(number: int) -> str:
    return f"lib/{number:04d}/module.py"


def measured(scratch: Path, link: Link, job: Job) -> Round:
    """One start on a node at the client's end of the link."""
    return _child(scratch, job, link.client_prefix)


def _child(scratch: Path, job: Job, prefix: tuple[str, ...] = ()) -> Round:
    with tempfile.TemporaryDirectory(dir=scratch) as own:
        words = [*prefix, sys.executable, "-m", "benchmarks.image_trace", "--node", own]
        done = subprocess.run(
            words, input=msgspec.json.encode(job), stdout=subprocess.PIPE, timeout=ROUND_S_MAX, check=True
        )
    return msgspec.json.decode(done.stdout, type=dict[str, float])


async def _node(folder: Path, job: Job) -> Round:
    cache = folder / "cache"
    settings = DataPlaneSettings(
        origin_url=job.origin_url,
        cache_directory=str(cache),
        disk_bytes_max=8 << 30,
        ram_bytes_max=256 << 20,
    )

    async def renew(plane: DataPlane) -> None:
        await mounts.renew(plane)

    keeper = DataPlaneKeeper(settings, renew)
    mounts = ModelMounts(cache / "mounts", folder / "mounts.json", keeper.current)
    async with anyio.create_task_group() as tasks:
        await tasks.start(keeper.run)
        try:
            begin = time.perf_counter()
            # Without a trace: under a name that nothing has been recorded for.
            at = await mounts.mount(DEFAULT_TENANT, job.artefact, "bench", start=job.start)
            await anyio.to_thread.run_sync(_read_all, at, job.files)
            took_s = time.perf_counter() - begin
            told = await mounts.started("bench")
            landing = [path for path in cache.rglob("data") if path.parent.name in {"partial", "tree"}]
            blocks = sum(path.stat().st_blocks for path in landing)
            if job.record:
                await mounts.ready("bench")
                await _recorded(job)
        finally:
            with anyio.CancelScope(shield=True):
                await mounts.close()
            tasks.cancel_scope.cancel()
    waited = told.missed_bytes if told is not None else 0
    return {"start_s": took_s, "fetched_mib": blocks * 512 / (1 << 20), "waited_mib": waited / (1 << 20)}


async def _recorded(job: Job) -> None:
    origin = open_origin(job.origin_url)
    named = job.artefact.key_domain, DEFAULT_TENANT, job.artefact.manifest
    while not list(stored_traces(origin, *named)):  # noqa: ASYNC110 -- another process writes it
        await anyio.sleep(LOOK_S)
    origin.close()


def _read_all(root: Path, files: int) -> None:
    order = list(range(files))
    random.Random(2).shuffle(order)
    for number in order:
        if len((root / read_name(number)).read_bytes()) != READ_BYTES:
            raise RuntimeError(f"{read_name(number)} is cut short")


def main() -> None:
    if sys.argv[1:2] == ["--node"]:
        job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
        sys.stdout.buffer.write(msgspec.json.encode(anyio.run(_node, Path(sys.argv[2]), job)))
        return
    made = harness.parser(__doc__, rounds=5, warmups=0)
    made.add_argument("--files", type=int, default=200)
    made.add_argument("--unread-kib", type=int, default=1500, help="after each file that is read")
    made.add_argument("--link", default="1000:10", help="Mbit/s:RTT in ms")
    made.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    chosen = harness.options(made)
    own: Namespace = chosen.own
    with tempfile.TemporaryDirectory(prefix="snowdrop-image-trace-", dir=own.scratch) as name:
        folder = Path(name)
        artefact = push(folder, make_image(folder, own.files, own.unread_kib << 10))
        here = Job(
            origin_url=f"file://{folder / 'origin'}", artefact=artefact, start=START, files=own.files, record=True
        )
        _child(folder, here)
        with (
            links.shaped_link(links.parse_shape(own.link), folder) as link,
            servers.nginx(
                folder,
                folder / "nginx",
                address=link.server_address,
                port=servers.free_port(),
                prefix=link.server_prefix,
            ) as server,
        ):
            jobs = {
                name: msgspec.structs.replace(here, origin_url=f"{server.url}/origin", start=start, record=False)
                for name, start in ((ON_DEMAND, "nothing"), (TRACED, START))
            }
            contestants = [
                Contestant(name=name, run=partial(measured, folder, link, job)) for name, job in jobs.items()
            ]
            results = harness.measure(contestants, METRICS, chosen)
    ratio = results.ratio(ON_DEMAND, TRACED, "start_s")
    bar = Bar(name="demand_to_trace", value=ratio, limit=TRACE_RATIO_MIN, better="higher")
    harness.publish("image_trace", results, [bar], chosen, baseline=ON_DEMAND)


if __name__ == "__main__":
    main()

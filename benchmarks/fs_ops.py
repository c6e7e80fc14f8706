"""What file operations cost on a mounted image: EROFS and FUSE, while its data is fetched and once it is here,
beside a plain directory and plain pyfuse3.

Each round begins with empty kernel caches and a mount that is new. `lazy`: the node has nothing of the image, its
origin is a folder on the same disk. `here`: all of it is on the node. Needs root.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import subprocess
import tarfile
import tempfile
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import anyio.from_thread

from benchmarks import harness
from benchmarks.harness import Bar, Contestant, Metric, PeerError, Round
from snowdrop.agent.content import DataPlaneKeeper
from snowdrop.agent.dataplane.client import DataPlane
from snowdrop.agent.imagecontent import open_image
from snowdrop.content.ingest import PushOptions
from snowdrop.content.origin import open_origin
from snowdrop.content.settings import DataPlaneSettings
from snowdrop.domain.ids import DEFAULT_TENANT
from snowdrop.domain.manifest import ArtefactRef
from snowdrop.image.mount.methods import image_mount
from snowdrop.image.mount.port import Method
from snowdrop.image.oci import machine_platform
from snowdrop.image.opening import ReachOptions
from snowdrop.image.opening import open_image as open_source
from snowdrop.image.push import ImageOptions, push_image
from snowdrop.image.unpack import LayerFolder

PYFUSE = Path(__file__).parent / "peers" / "pyfuse_tree.py"
REQUIREMENTS = ("pyfuse3==3.5.*",)
FILES_PER_FOLDER = 100
SMALL_BYTES = 4096
SAMPLES = 1000
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
EVERYTHING, DENTRIES_AND_INODES = "3", "2"
NATIVE, EROFS_HERE, FUSE_LAZY, PEER = "native", "erofs here", "fuse lazy", "pyfuse3"
METRICS = (
    Metric(name="walk_cold_ms", better="lower", digits=0),
    Metric(name="walk_ms", better="lower", digits=0, plot=True),
    Metric(name="walk_again_ms", better="lower", digits=0),
    Metric(name="stat_us", better="lower", digits=1),
    Metric(name="negative_us", better="lower", digits=1),
    Metric(name="miss_4k_us", better="lower", digits=0, plot=True),
    Metric(name="sequential_gb_s", better="higher", digits=2),
)


def make_image(folder: Path, files: int, big_mib: int) -> Path:
    """A docker archive with so many files of 4 KiB, and a large one."""
    rng = random.Random(1)
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as made:
        for number in range(files):
            info = tarfile.TarInfo(f"lib/d{number // FILES_PER_FOLDER:04d}/f{number:06d}.py")
            info.size = SMALL_BYTES
            made.addfile(info, io.BytesIO(rng.randbytes(SMALL_BYTES)))
        info = tarfile.TarInfo("big.so")
        info.size = big_mib << 20
        made.addfile(info, io.BytesIO(rng.randbytes(info.size)))
    diff = f"sha256:{hashlib.sha256(layer.getvalue()).hexdigest()}"
    platform = machine_platform(os.uname().machine)
    config = {
        "architecture": platform.architecture,
        "os": platform.os,
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [diff]},
    }
    documents = {
        "config.json": json.dumps(config).encode(),
        "layer.tar": layer.getvalue(),
        "manifest.json": json.dumps(
            [{"Config": "config.json", "RepoTags": ["bench:latest"], "Layers": ["layer.tar"]}]
        ).encode(),
    }
    path = folder / "image.tar"
    with tarfile.open(path, mode="w") as made:
        for name, data in documents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
    with tarfile.open(fileobj=io.BytesIO(layer.getvalue())) as made:
        made.extractall(folder / "native", filter="fully_trusted")
    return path


def push(folder: Path, archive: Path) -> ArtefactRef:
    source, _ = open_source(
        f"docker-archive:{archive}", ReachOptions(platform=machine_platform(os.uname().machine))
    )
    layers = LayerFolder(folder / "layers")
    origin = open_origin(f"file://{folder / 'origin'}")
    try:
        return push_image(source, origin, layers, PushOptions(kind="image"), ImageOptions()).result.artefact
    finally:
        layers.close()
        source.close()
        origin.close()


@asynccontextmanager
async def _on_node(folder: Path, artefact: ArtefactRef, method: Method, *, is_here: bool) -> AsyncIterator[Path]:
    """The image mounted on a node of its own: a new data plane, in its own process, with an empty cache."""
    cache, at = folder / "cache", folder / "mounted"
    at.mkdir()
    settings = DataPlaneSettings(
        origin_url=f"file://{folder.parent / 'origin'}",
        cache_directory=str(cache),
        disk_bytes_max=8 << 30,
        ram_bytes_max=256 << 20,
    )

    async def renew(_plane: DataPlane) -> None:
        return

    keeper = DataPlaneKeeper(settings, renew)
    async with anyio.create_task_group() as tasks:
        await tasks.start(keeper.run)
        content = await open_image(keeper.current, DEFAULT_TENANT, artefact, "bench")
        if is_here:
            await content.bring_all()
        mount = image_mount(content, folder / "work", method)
        await mount.mount(at)
        try:
            yield at
        finally:
            with anyio.CancelScope(shield=True):
                await mount.unmount()
            tasks.cancel_scope.cancel()


def ours(folder: Path, artefact: ArtefactRef, method: Method, *, is_here: bool) -> Round:
    with (
        tempfile.TemporaryDirectory(dir=folder) as own,
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(_on_node(Path(own), artefact, method, is_here=is_here)) as at,
    ):
        return measured(at)


def native(folder: Path) -> Round:
    return measured(folder / "native")


@contextmanager
def _peer(folder: Path) -> Iterator[Path]:
    python = harness.peer_python("pyfuse3", REQUIREMENTS)
    at = folder / "peer"
    at.mkdir(exist_ok=True)
    command = [str(python), str(PYFUSE), str(folder / "native"), str(at)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise PeerError("pyfuse3 could not mount")
        try:
            yield at
        finally:
            process.stdin.close()
            subprocess.run(["umount", "-l", str(at)], check=False, capture_output=True)


def pyfuse3(folder: Path) -> Round:
    with _peer(folder) as at:
        return measured(at)


def measured(root: Path) -> Round:
    """One round on a directory whose content nobody has looked at since the kernel's caches were dropped."""
    os.sync()
    DROP_CACHES.write_text(EVERYTHING)
    found: dict[str, float] = {}
    begin = time.perf_counter()
    files = _walk(root)
    found["walk_cold_ms"] = 1e3 * (time.perf_counter() - begin)
    DROP_CACHES.write_text(DENTRIES_AND_INODES)  # what is left is the work of the file system, not of the disk
    begin = time.perf_counter()
    _walk(root)
    found["walk_ms"] = 1e3 * (time.perf_counter() - begin)
    begin = time.perf_counter()
    _walk(root)
    found["walk_again_ms"] = 1e3 * (time.perf_counter() - begin)
    rng = random.Random(2)
    small = [path for path in files if path.endswith(".py")]
    sample = rng.sample(small, min(SAMPLES, len(small)))
    found["stat_us"] = _each(sample, os.stat)
    # Each name is new: what the kernel has learnt to be missing is no longer asked for.
    found["negative_us"] = _each([f"{path}.missing" for path in sample], os.path.exists)
    found["miss_4k_us"] = _each(sample, _read)
    begin = time.perf_counter()
    size = _read(str(root / "big.so"))
    found["sequential_gb_s"] = size / (time.perf_counter() - begin) / 1e9
    return found


def _walk(root: Path) -> list[str]:
    found: list[str] = []
    for folder, _, names in os.walk(root):
        for name in names:
            path = f"{folder}/{name}"
            os.lstat(path)
            found.append(path)
    return found


def _each(paths: list[str], act: object) -> float:
    assert callable(act)
    begin = time.perf_counter()
    for path in paths:
        act(path)
    return 1e6 * (time.perf_counter() - begin) / len(paths)


def _read(path: str) -> int:
    done = 0
    buffer = bytearray(1 << 20)
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            done += count
    return done


def contestants(folder: Path, artefact: ArtefactRef) -> list[Contestant]:
    made = [Contestant(name=NATIVE, run=partial(native, folder), note="a directory on the same disk")]
    methods: tuple[Method, ...] = ("erofs", "fuse")
    for method in methods:
        for state in ("lazy", "here"):
            run = partial(ours, folder, artefact, method, is_here=state == "here")
            made.append(Contestant(name=f"{method} {state}", run=run))
    made.append(Contestant(name=PEER, run=partial(pyfuse3, folder), note="names in memory, pread"))
    return made


def main() -> None:
    made = harness.parser(__doc__, rounds=3, warmups=0)
    made.add_argument("--files", type=int, default=10_000, help="of 4 KiB")
    made.add_argument("--big-mib", type=int, default=256, help="the file that is read in sequence")
    made.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    chosen = harness.options(made)
    own: Namespace = chosen.own
    with tempfile.TemporaryDirectory(prefix="snowdrop-fs-ops-", dir=own.scratch) as name:
        folder = Path(name)
        artefact = push(folder, make_image(folder, own.files, own.big_mib))
        results = harness.measure(contestants(folder, artefact), METRICS, chosen)
    walk = results.ratio(EROFS_HERE, NATIVE, "walk_ms")
    peer = results.ratio(FUSE_LAZY, PEER, "walk_ms")
    bars = [
        Bar(name="walk_erofs_to_native", value=walk, limit=2.0, better="lower"),
        Bar(name="walk_fuse_to_pyfuse3", value=peer, limit=1.0, better="lower"),
    ]
    harness.publish("fs_ops", results, bars, chosen, baseline=NATIVE)


if __name__ == "__main__":
    main()

"""What the weights benchmarks share: scratch folders, a pushed checkpoint, our data plane, peers' processes."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import checkpoint, harness
from benchmarks.checkpoint import Checkpoint
from benchmarks.compiled import CompilerMissingError, compiled
from benchmarks.harness import PeerError
from benchmarks.workers import Worker
from snowdrop.content.ingest import PushOptions, PushResult, SourceOptions, open_source, push_source
from snowdrop.content.ingest.index import IngestIndex
from snowdrop.content.layout import PUBLIC_DOMAIN
from snowdrop.content.origin import open_origin
from snowdrop.content.settings import DataPlaneSettings
from snowdrop.domain.manifest import ArtefactRef

LOADERS = Path(__file__).parent / "peers" / "loaders.py"
RAW_PYTHON = Path(__file__).parent / "peers" / "raw_python.py"
SLAB_BYTES = 64 << 20
FETCH_THREADS = 8
TORCH = ("torch==2.13.0", "numpy>=2")
ENVIRONMENTS: Mapping[str, tuple[str, ...]] = {
    "safetensors": (*TORCH, "safetensors==0.8.*"),
    "runai": (*TORCH, "runai-model-streamer[s3]==0.17.*"),
    "fastsafetensors": (*TORCH, "fastsafetensors==0.5.*"),
    "tensorizer": (*TORCH, "tensorizer==2.12.*"),
    "instanttensor": (*TORCH, "instanttensor==0.2.*"),
    "hub": (*TORCH, "safetensors==0.8.*", "huggingface_hub>=1"),
    "boto3": (*TORCH, "safetensors==0.8.*", "boto3[crt]>=1.40"),
}
"""Each peer in an environment of its own: one that cannot be installed takes no other with it."""
Answer = Mapping[str, Any]


def arguments(made: argparse.ArgumentParser, *, gib: float) -> None:
    """The options that the weights benchmarks share."""
    made.add_argument("--gib", type=float, default=gib, help="size of the checkpoint")
    made.add_argument("--shards", type=int, default=4, help="safetensors files of the checkpoint")
    made.add_argument("--dtype", choices=sorted(checkpoint.DTYPE_BYTES), default="BF16")
    made.add_argument(
        "--scratch",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="a folder of its own is made here, and deleted",
    )
    made.add_argument("--without-peers", action="store_true", help="only ours and the raw limit")
    made.add_argument("--peers", nargs="*", default=None, metavar="NAME", help="only these peers")


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="snowdrop-weights-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def make_checkpoint(folder: Path, own: argparse.Namespace) -> Checkpoint:
    say(f"making a checkpoint of {own.gib:g} GiB")
    return checkpoint.write(folder, checkpoint.model(own.gib, own.dtype), shards=own.shards)


def push_result(source: Path, origin_folder: Path) -> PushResult:
    """Pushes a directory to an origin in `origin_folder`, re-using the chunks that the origin has."""
    origin_folder.mkdir(parents=True, exist_ok=True)
    url = origin_folder.as_uri()
    with closing(IngestIndex(origin_folder.parent / "ingest.sqlite", url, PUBLIC_DOMAIN)) as index:
        return push_source(open_source(str(source), SourceOptions()), open_origin(url), PushOptions(), index=index)


def push(source: Path, origin_folder: Path) -> ArtefactRef:
    return push_result(source, origin_folder).artefact


def settings(
    origin_url: str, cache: Path, model: Checkpoint, *, disk: bool = True, models: int = 1, **own: Any
) -> DataPlaneSettings:
    """A data plane for `models` like this one; without `disk` nothing is written behind, for there is no room."""
    cache.mkdir(parents=True, exist_ok=True)
    room = pool_bytes(model)
    return DataPlaneSettings(
        origin_url=origin_url,
        cache_directory=str(cache),
        ram_bytes_max=models * room + SLAB_BYTES,
        pool_bytes=room,
        disk_bytes_max=(models + 1) * model.total_bytes + SLAB_BYTES if disk else 1 << 20,
        fetch_threads=FETCH_THREADS,
        **own,
    )


def pool_bytes(model: Checkpoint) -> int:
    """What the pool must have, touched, for the model's area."""
    aligned = model.total_bytes + 4096 * len(model.files)
    return -(-aligned // SLAB_BYTES) * SLAB_BYTES


class Node:
    """Our data plane with its agent's part, `benchmarks.node`, and a reader for each load."""

    def __init__(self, chosen: DataPlaneSettings, *, prefix: Sequence[str] = ()) -> None:
        words = [sys.executable, "-m", "benchmarks.node", msgspec.json.encode(chosen).decode()]
        self._worker = Worker(words, prefix=prefix, folder=harness.ROOT)

    def prepare(self, model: Checkpoint) -> None:
        """A reader is ready, and memory for the model has been touched."""
        self._order(do="prepare", pool_bytes=pool_bytes(model))

    def load(self, artefact: ArtefactRef, model: Checkpoint, holder: str = "bench") -> Answer:
        """One load by the reader that is ready; raises RuntimeError if a byte was wrong."""
        answer = self._order(do="load", artefact=artefact.manifest, holder=holder)
        if answer["checksum"] != model.checksum:
            raise RuntimeError("the tensors are not those of the checkpoint")
        return answer

    def wait_directory(self, artefact: ArtefactRef) -> float:
        """Seconds until every file is in the directory, verified and durable."""
        return float(self._order(do="directory", artefact=artefact.manifest)["directory_s"])

    def release(self, holder: str = "bench") -> None:
        self._order(do="release", holder=holder)

    def close(self) -> None:
        self._worker.close()

    def _order(self, **order: Any) -> Answer:
        return self._worker.ask(json.dumps(order))

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Peer:
    """A library that loads weights in its own process."""

    def __init__(self, name: str, load: str, environment: str, **words: Any) -> None:
        self.name = name
        self._load = load
        self._environment = environment
        self._words = words
        self.env: dict[str, str] = {}
        self.prefix: tuple[str, ...] = ()

    def start(self) -> Worker:
        """A process that is ready to load. Raises PeerError if it cannot be."""
        requirements = ENVIRONMENTS[self._environment]
        python = harness.peer_python(f"weights-{self._environment}", requirements)
        words = [str(python), str(LOADERS), self._load, json.dumps(self._words)]
        return Worker(words, prefix=self.prefix, env=self.env)

    def go(self, worker: Worker, model: Checkpoint) -> Answer:
        """One load; raises PeerError if it fails or does not give all tensors."""
        try:
            answer = worker.ask()
        except RuntimeError as error:
            raise PeerError(f"failed while loading: {error}") from error
        if answer["bytes"] > model.total_bytes or answer["bytes"] < model.total_bytes * 0.99:
            raise PeerError(f"gave {answer['bytes']} bytes of tensors")
        return answer


def able(peers: Sequence[Peer], own: argparse.Namespace, missing: dict[str, str]) -> list[Peer]:
    """Those of `peers` that were asked for and start here; `missing` gets the reasons of the others."""
    if own.without_peers:
        return []
    found: list[Peer] = []
    for peer in peers:
        if own.peers is not None and peer.name not in own.peers:
            continue
        try:
            peer.start().close()
            found.append(peer)
        except (PeerError, RuntimeError) as error:
            missing[peer.name] = str(error)
    return found


def raw_command(program: str, folder: Path, words: Sequence[str]) -> tuple[list[str], str]:
    """The command of a raw limit, in C or, without a compiler, in Python; and which of them it is."""
    try:
        return [str(compiled(program, folder)), *words], "C"
    except CompilerMissingError:
        return [sys.executable, str(RAW_PYTHON), program, *words], "Python, for there is no C compiler"

"""Weights from the local disk and from the memory of the node, beside the raw limit of the disk and other
loaders.

Every load is measured in a process of its own that has done its imports; the clock stops when every byte is in
memory and addressable, for mapped files when one byte of each page has been read. `cold_s`: nothing of the files
in the page cache (ours: a new data plane, whose disk tier has them). `again_s`: the bytes are in the node's
memory already (ours: the RAM tier, mapped by a second reader; others: the page cache).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import harness, loading
from benchmarks.checkpoint import Checkpoint
from benchmarks.harness import Bar, Contestant, Metric, PeerError, Results, Round
from benchmarks.loading import Node, Peer, say
from benchmarks.memory import evict, warm
from benchmarks.peers import __file__ as peers_file
from benchmarks.workers import Worker
from snowdrop.domain.manifest import ArtefactRef

RAW_THREADS = 8
RAW_BLOCK_BYTES = 4 << 20
CONVERT = Path(peers_file).parent / "convert.py"
CONVERT_S_MAX = 600.0
COLD_RATIO_MIN = 0.95
AGAIN_RATIO_MAX = 1.5
AGAIN_MEMORY_MIB_MAX = 64.0
PEAK_MIB_MAX = 256.0
RAW, OURS = "raw O_DIRECT", "snowdrop"
METRICS = (
    Metric(name="cold_s", better="lower", digits=3, plot=True),
    Metric(name="again_s", better="lower", digits=3, plot=True),
    Metric(name="again_views_s", better="lower", digits=3),
    Metric(name="again_memory_mib", better="lower", digits=1),
    Metric(name="peak_mib", better="lower", digits=0),
    Metric(name="peak_growth_mib", better="lower", digits=0),
    Metric(name="cpu_s", better="lower"),
    Metric(name="origin_mib", better="lower", digits=0),
)


def raw(files: list[Path], folder: Path) -> Round:
    command, _ = loading.raw_command(
        "raw_direct", folder, [str(RAW_THREADS), str(RAW_BLOCK_BYTES), *map(str, files)]
    )
    with Worker(command) as worker:
        evict(files)
        return {"cold_s": worker.ask()["usable_s"]}


def ours(scratch: Path, model: Checkpoint, artefact: ArtefactRef) -> Round:
    """A new data plane reads from its disk tier; then a second reader gets what is in memory."""
    chosen = loading.settings((scratch / "origin").as_uri(), scratch / "cache", model)
    with Node(chosen) as node:
        node.prepare(model)
        evict(path for path in (scratch / "cache").rglob("*") if path.is_file())
        cold = node.load(artefact, model, "first")
        node.prepare(model)
        again = node.load(artefact, model, "second")
    if again["content"]["ram"] < model.total_bytes * 0.99:
        raise RuntimeError(f"the second load was not from memory: {again['content']}")
    return {
        "cold_s": cold["usable_s"],
        "again_s": again["usable_s"],
        "again_views_s": again["views_s"],
        "again_memory_mib": again["private_mib"] + again["shared_growth_mib"],
        "peak_mib": max(cold["peak_mib"], again["peak_mib"]),
        "peak_growth_mib": cold["peak_growth_mib"],
        "cpu_s": cold["data_plane_cpu_s"],
        "origin_mib": cold["content"]["origin"] / (1 << 20),
    }


def of_files(start: Callable[[], Worker], go: Callable[[Worker], loading.Answer], files: list[Path]) -> Round:
    """A loader of files: once with nothing of them in the page cache, once with all."""
    with start() as worker:
        evict(files)
        cold = go(worker)
    warm(files)
    with start() as worker:
        again = go(worker)
    return {"cold_s": cold["usable_s"], "again_s": again["usable_s"], "again_views_s": again["views_s"]}


def converted(kind: str, suffix: str, environment: str, scratch: Path, model: Checkpoint) -> list[Path]:
    """The checkpoint in a peer's own format."""
    folder = scratch / kind
    folder.mkdir()
    python = harness.peer_python(f"weights-{environment}", loading.ENVIRONMENTS[environment])
    words = [str(python), str(CONVERT), kind, str(folder), *map(str, model.files)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=CONVERT_S_MAX, check=False)
    if done.returncode != 0:
        raise PeerError(f"could not write its own format: {done.stderr.strip().splitlines()[-1:]}")
    return sorted(folder.glob(f"*{suffix}"))


def peers_of(
    scratch: Path, model: Checkpoint, tree: list[Path], own: argparse.Namespace, missing: dict[str, str]
) -> list[tuple[Peer, list[Path]]]:
    """The peers that run here, each with its files."""
    names = [str(path) for path in tree]
    on_tree = [
        Peer("safetensors", "safetensors_mmap", "safetensors", files=names),
        Peer("runai", "runai", "runai", files=names, concurrency=16),
        Peer("fastsafetensors", "fastsafetensors", "fastsafetensors", files=names, threads=16),
        Peer("instanttensor", "instanttensor", "instanttensor", files=names),
    ]
    found = [(peer, tree) for peer in loading.able(on_tree, own, missing)]
    own_formats: tuple[tuple[str, str, str, str, dict[str, int]], ...] = (
        ("tensorizer", "tensorizer", ".tensors", "tensorizer", {"readers": 4}),
        ("torch mmap", "torch", ".pt", "safetensors", {}),
    )
    for name, kind, suffix, environment, words in own_formats:
        if own.without_peers or (own.peers is not None and name not in own.peers):
            continue
        try:
            files = converted(kind, suffix, environment, scratch, model)
        except PeerError as error:
            missing[name] = str(error)
            continue
        load = "torch_mmap" if kind == "torch" else kind
        peer = Peer(name, load, environment, files=[str(path) for path in files], **words)
        found += [(able, files) for able in loading.able([peer], own, missing)]
    return found


def contestants_of(
    scratch: Path, model: Checkpoint, artefact: ArtefactRef, tree: list[Path], peers: list[tuple[Peer, list[Path]]]
) -> list[Contestant]:
    _, language = loading.raw_command("raw_direct", scratch, [])
    own_files = [sys.executable, "-m", "benchmarks.file_reader", *map(str, tree)]

    def start_own() -> Worker:
        return Worker(own_files, folder=harness.ROOT)

    def checked(worker: Worker) -> loading.Answer:
        answer = worker.ask()
        if answer["checksum"] != model.checksum:
            raise RuntimeError("load_file's tensors are not those of the checkpoint")
        return answer

    made = [
        Contestant(
            name=RAW, run=lambda: raw(tree, scratch), note=f"{RAW_THREADS} threads, touched memory, {language}"
        ),
        Contestant(name=OURS, run=lambda: ours(scratch, model, artefact), note="data plane, verified"),
        Contestant(
            name="snowdrop load_file",
            run=lambda: of_files(start_own, checked, tree),
            note="weights.load_file, no platform",
        ),
    ]
    for peer, files in peers:

        def run(peer: Peer = peer, files: list[Path] = files) -> Round:
            return of_files(peer.start, lambda worker: peer.go(worker, model), files)

        made.append(Contestant(name=peer.name, run=run))
    return made


def bars_of(results: Results, peers: list[str]) -> list[Bar]:
    against_raw = results.ratio(RAW, OURS, "cold_s")
    against_peers = [results.ratio(OURS, peer, "cold_s") for peer in peers]
    worst = max((ratio for ratio in against_peers if ratio is not None), default=None)
    again = results.ratio(OURS, "safetensors", "again_s")
    memory = results.median(OURS, "again_memory_mib")
    peak = results.median(OURS, "peak_mib")
    origin = results.median(OURS, "origin_mib")
    return [
        Bar(name="local.cold_to_raw", value=against_raw, limit=COLD_RATIO_MIN, better="higher"),
        Bar(name="local.cold_to_best_peer", value=worst, limit=1.0, better="lower"),
        Bar(name="local.again_to_safetensors", value=again, limit=AGAIN_RATIO_MAX, better="lower"),
        Bar(name="local.again_memory_mib", value=memory, limit=AGAIN_MEMORY_MIB_MAX, better="lower"),
        Bar(name="local.peak_mib", value=peak, limit=PEAK_MIB_MAX, better="lower"),
        Bar(name="local.restart_origin_mib", value=origin, limit=1.0, better="lower"),
    ]


def land(scratch: Path, model: Checkpoint, artefact: ArtefactRef) -> list[Path]:
    """Brings the model to the disk tier once; returns its tensor files there, which everybody reads."""
    say("landing it")
    chosen = loading.settings((scratch / "origin").as_uri(), scratch / "cache", model)
    with Node(chosen) as node:
        node.prepare(model)
        node.load(artefact, model)
        node.wait_directory(artefact)
    return sorted(path for path in (scratch / "cache").rglob("*.safetensors") if path.stat().st_size)


def main() -> None:
    made = harness.parser(__doc__)
    loading.arguments(made, gib=4.0)
    chosen = harness.options(made)
    missing: dict[str, str] = {}
    with loading.scratch_folder(chosen.own.scratch) as scratch:
        model = loading.make_checkpoint(scratch / "checkpoint", chosen.own)
        artefact = loading.push(model.folder, scratch / "origin")
        tree = land(scratch, model, artefact)
        peers = peers_of(scratch, model, tree, chosen.own, missing)
        contestants = contestants_of(scratch, model, artefact, tree, peers)
        results = harness.measure(contestants, METRICS, chosen)
    bars = bars_of(results, [peer.name for peer, _ in peers])
    harness.publish("weights_local", results, bars, chosen, baseline=RAW, missing=missing)


if __name__ == "__main__":
    main()

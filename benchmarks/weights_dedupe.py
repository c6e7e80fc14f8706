"""How much of a changed checkpoint is pushed, and fetched by a node that has the one before.

Three changes: `fine-tune` (some of the tensors have new values), `re-shard` (the same tensors in other files),
`vocabulary` (rows appended to embedding and head). Ours is compared with what file-level dedupe (a hub that
knows whole files) and dedupe of chunks of 4 MiB cut at fixed offsets would move, and with `ideal`: the bytes of
tensors that the base does not have.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
from blake3 import blake3

from benchmarks import checkpoint, harness, loading
from benchmarks.checkpoint import Checkpoint, Tensor
from benchmarks.harness import Bar, Contestant, Metric, Options, Round
from benchmarks.loading import Node, say
from snowdrop.domain.manifest import ArtefactRef

MIB = 1 << 20
FIXED_BYTES = 4 << 20
NEW_ROWS = 256
CASES = ("fine-tune", "re-shard", "vocabulary")
OURS, IDEAL, ALL = "snowdrop", "ideal", "all bytes"
OVER_IDEAL_MAX = 0.02
"""Of the checkpoint: headers, and the chunks of tensors whose end moved."""
METRICS = (
    Metric(name="pushed_mib", better="lower", digits=1, plot=True),
    Metric(name="fetched_mib", better="lower", digits=1, plot=True),
    Metric(name="pushed_share", better="lower", digits=4),
    Metric(name="fetched_share", better="lower", digits=4),
)


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """A changed checkpoint; `new_bytes` are those of its tensors that the base does not have."""

    name: str
    tensors: list[Tensor]
    shards: int
    new_bytes: int


def cases_of(base: Sequence[Tensor], shards: int, changed_share: float) -> list[Case]:
    step = max(1, round(1 / changed_share))
    tuned = [_retuned(tensor) if index % step == 0 else tensor for index, tensor in enumerate(base)]
    tuned_bytes = sum(tensor.size for index, tensor in enumerate(base) if index % step == 0)
    longer = [_longer(tensor) if tensor.shape[0] == checkpoint.VOCABULARY else tensor for tensor in base]
    longer_bytes = sum(new.size - old.size for new, old in zip(longer, base, strict=True))
    return [
        Case(name="fine-tune", tensors=tuned, shards=shards, new_bytes=tuned_bytes),
        Case(name="re-shard", tensors=list(base), shards=2 * shards, new_bytes=0),
        Case(name="vocabulary", tensors=longer, shards=shards, new_bytes=longer_bytes),
    ]


def _retuned(tensor: Tensor) -> Tensor:
    parts = tuple((f"tuned/{seed}", size) for seed, size in tensor.parts)
    return msgspec.structs.replace(tensor, parts=parts)


def _longer(tensor: Tensor) -> Tensor:
    rows, *rest = tensor.shape
    more = tensor.size // rows * NEW_ROWS
    parts = (*tensor.parts, (f"more/{tensor.name}", more))
    return msgspec.structs.replace(tensor, shape=(rows + NEW_ROWS, *rest), parts=parts)


def round_of(model: Checkpoint, pushed: int, fetched: int) -> Round:
    return {
        "pushed_mib": pushed / MIB,
        "fetched_mib": fetched / MIB,
        "pushed_share": pushed / model.total_bytes,
        "fetched_share": fetched / model.total_bytes,
    }


def ours(scratch: Path, base: ArtefactRef, before: Checkpoint, model: Checkpoint) -> Round:
    """Pushes to a copy of the origin that has the base; then a node with the base on its disk loads it."""
    with loading.scratch_folder(scratch) as folder:
        # Links, not copies: an origin never changes an object.
        origin = folder / "origin"
        shutil.copytree(scratch / "origin", origin, copy_function=_link)
        result = loading.push_result(model.folder, origin)
        chosen = loading.settings(origin.as_uri(), folder / "cache", before, models=2)
        with Node(chosen) as node:
            node.prepare(before)
            node.load(base, before, "base")
            node.wait_directory(base)
            node.release("base")
        with Node(chosen) as node:
            node.prepare(model)
            loaded = node.load(result.artefact, model)
    return round_of(model, result.new_bytes, loaded["content"]["origin"])


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def by_pieces(pieces: Callable[[Path], Iterator[tuple[str, int]]], before: Checkpoint, model: Checkpoint) -> Round:
    """What moves if pieces of one name are the same, at the hub and at the node."""
    known = {name for path in before.files for name, _ in pieces(path)}
    moved = 0
    for path in model.files:
        for name, size in pieces(path):
            if name not in known:
                known.add(name)
                moved += size
    return round_of(model, moved, moved)


def whole_file(path: Path) -> Iterator[tuple[str, int]]:
    with path.open("rb") as source:
        yield hashlib.file_digest(source, "sha256").hexdigest(), path.stat().st_size


def fixed_chunks(path: Path) -> Iterator[tuple[str, int]]:
    with path.open("rb", buffering=0) as source:
        while piece := source.read(FIXED_BYTES):
            yield blake3(piece).hexdigest(), len(piece)


def measure_case(scratch: Path, base: ArtefactRef, before: Checkpoint, case: Case, chosen: Options) -> None:
    say(f"making the {case.name} checkpoint")
    with loading.scratch_folder(scratch) as folder:
        model = checkpoint.write(folder / "checkpoint", case.tensors, shards=case.shards)
        contestants = (
            Contestant(name=ALL, run=lambda: round_of(model, model.total_bytes, model.total_bytes)),
            Contestant(name=IDEAL, run=lambda: round_of(model, case.new_bytes, case.new_bytes)),
            Contestant(name=OURS, run=lambda: ours(scratch, base, before, model), note="chunks cut at tensors"),
            Contestant(
                name="files", run=lambda: by_pieces(whole_file, before, model), note="whole files, as a hub"
            ),
            Contestant(name="fixed 4 MiB", run=lambda: by_pieces(fixed_chunks, before, model)),
        )
        results = harness.measure(contestants, METRICS, chosen)
    bars = [
        Bar(
            name=f"dedupe.{case.name}.{way}_over_ideal",
            value=results.difference(OURS, IDEAL, f"{way}_share"),
            limit=OVER_IDEAL_MAX,
            better="lower",
        )
        for way in ("pushed", "fetched")
    ]
    harness.publish(f"weights_dedupe {case.name}", results, bars, harness.part(chosen, case.name), baseline=ALL)


def main() -> None:
    made = harness.parser(__doc__, rounds=1, warmups=0)
    loading.arguments(made, gib=1.0)
    made.add_argument(
        "--changed", type=float, default=0.1, metavar="SHARE", help="share of tensors that a fine-tune changes"
    )
    made.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="what is changed")
    chosen = harness.options(made)
    base_tensors = checkpoint.model(chosen.own.gib, chosen.own.dtype)
    with loading.scratch_folder(chosen.own.scratch) as scratch:
        say("making the base checkpoint")
        before = checkpoint.write(scratch / "base", base_tensors, shards=chosen.own.shards)
        base = loading.push(before.folder, scratch / "origin")
        for case in cases_of(base_tensors, chosen.own.shards, chosen.own.changed):
            if case.name in chosen.own.cases:
                measure_case(scratch, base, before, case, chosen)


if __name__ == "__main__":
    main()

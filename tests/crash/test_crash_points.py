"""Power cuts at seeded points of real work, and what the production code makes of what is left.

Fewer points than CRASH_POINTS_MIN is a failure. SNOWDROP_CRASH_SEEDS=n runs n times as many recordings.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from blake3 import blake3
from crash_disk import DiskModel, Op, Placed, SyncedData, materialise
from crash_work import BLOCK_BYTES, WORKLOADS, FaultyIo, Model, Work, bring_held, small_model

from snowdrop.content.checks import ChunkChecks
from snowdrop.content.chunkmap import ChunkMap
from snowdrop.content.disk import PREFIX, DiskTier
from snowdrop.content.diskio import DiskIo
from snowdrop.content.landing import Landing
from snowdrop.content.landtree import LandingTree
from snowdrop.content.manifest import encode_manifest
from snowdrop.domain.ids import Digest

CRASH_POINTS_MIN = 2000
SEEDS = int(os.environ.get("SNOWDROP_CRASH_SEEDS", "1"))
POINTS_A_RECORDING = 64
RECORDINGS = [
    (name, fault, seed)
    for seed in range(3 * SEEDS)
    for name in WORKLOADS
    for fault in ("none", "full", "fails", "unsynced")
    if fault == "none" or (seed + len(name) + len(fault)) % 3 == 0
]


class NoSync(DiskIo):
    """After the crash nothing crashes again: syncs would only take time."""

    def sync_data(self, fd: int) -> None:
        pass

    def sync_directory(self, path: Path) -> None:
        pass


@dataclass
class Recording:
    models: list[Model]
    ops: list[Op]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snowdrop.content.behind.BLOCK_BYTES_MAX", BLOCK_BYTES)


def record(root: Path, name: str, fault: str, seed: int) -> Recording:
    """The calls of one workload, with a fault somewhere in it if that is asked for."""
    first = small_model(seed)
    models = [first, small_model(seed + 1000, first.chunks[3])]

    def run(io: FaultyIo) -> None:
        io.root.mkdir()
        work = Work(io, models, random.Random(f"{name} {seed}"))
        work.start()
        WORKLOADS[name](work)
        work.stop()

    io = FaultyIo(root / "clean")
    run(io)
    if fault != "none":
        rng = random.Random(f"{name} {fault} {seed}")
        # Not while the tier itself is opened: it then says so and is not used.
        at = rng.choice(io.syncs) if fault == "unsynced" else rng.randrange(6, io.calls)
        io = FaultyIo(root / "faulty")
        io.at = at
        io.code, io.lasts = (errno.ENOSPC, rng.randrange(1, 12)) if fault == "full" else (errno.EIO, 1)
        run(io)
    used = [
        model
        for model in models
        if any(isinstance(op, Placed) and op.name == model.digest.removeprefix(PREFIX) for op in io.ops)
    ]
    return Recording(used, io.ops)


class Checker:
    """Opens what a crash left with the production code and checks the promises."""

    def __init__(self, models: list[Model], scratch: Path) -> None:
        self.models = models
        self.scratch = scratch
        self.wrong_claims = 0

    def check(
        self, image: dict[Path, bytes | None], synced: dict[Digest, bytearray], *, faults: int, again: bool
    ) -> None:
        root = self.scratch / "crashed"
        materialise(image, root)
        try:
            tier = self._opened(root)
            for model in self.models:
                assert tier.cached_manifest(model.digest) in {None, model.manifest}
                landing = tier.open_landing(model.digest, model.manifest)
                self._check_tree(landing, model)
                self._check_claims(landing, model, synced.get(model.digest), faults=faults)
                wrong = bring_held(landing, model)
                assert faults or not wrong
                self._check_believed(landing, model)
                for chunk, data in enumerate(model.chunks):
                    landing.write(chunk, memoryview(data))
                landing.sync()
                self._check_whole(landing, model)
            tier.close()
            if again:
                tier = self._opened(root)
                for model in self.models:
                    self._check_whole(tier.open_landing(model.digest, model.manifest), model)
                tier.close()
        finally:
            shutil.rmtree(root)

    def _opened(self, root: Path) -> DiskTier:
        tier = DiskTier(root, 1 << 30, NoSync(), boot_id="after the crash")
        tier.open()
        return tier

    def _check_tree(self, landing: Landing, model: Model) -> None:
        for path, data in found_files(landing.tree).items():
            assert data == model.files[path], f"{path} in the tree is wrong after a crash"

    def _check_whole(self, landing: Landing, model: Model) -> None:
        assert landing.is_complete
        assert found_files(landing.tree) == model.files

    def _check_claims(self, landing: Landing, model: Model, synced: bytearray | None, *, faults: int) -> None:
        """Bits are for durable bytes; what a sync had made durable is still claimed."""
        if faults:
            return
        for chunk in landing.held_chunks():
            assert places_right(landing, model, chunk), f"bit of chunk {chunk} without its data"
        if synced is not None:
            held = set(landing.held_chunks())
            assert held >= {chunk for chunk, bit in enumerate(synced) if bit}, "durable chunks were forgotten"

    def _check_believed(self, landing: Landing, model: Model) -> None:
        for chunk in range(len(model.chunks)):
            if landing.is_verified(chunk):
                assert places_right(landing, model, chunk), f"chunk {chunk} is believed and wrong"
        self._check_tree(landing, model)


def places_right(landing: Landing, model: Model, chunk: int) -> bool:
    right = True
    for entry in model.manifest.files:
        for extent in entry.extents:
            if extent.chunk == chunk:
                candidates = [landing.tree / entry.path, landing.directory / "partial" / entry.path]
                with next(path for path in candidates if path.exists()).open("rb") as stream:
                    stream.seek(extent.file_offset)
                    data = stream.read(extent.length)
                right &= data == model.chunks[chunk][extent.chunk_offset : extent.chunk_offset + extent.length]
    return right


def found_files(tree: Path) -> dict[str, bytes]:
    return {path.relative_to(tree).as_posix(): path.read_bytes() for path in tree.rglob("*") if path.is_file()}


def synced_bits(model: DiskModel, models: list[Model]) -> dict[Digest, bytearray]:
    """What the durable map of each artefact claims, where nothing is about to take claims back."""
    found = {}
    for artefact in models:
        path = Path("artefacts") / artefact.digest.removeprefix(PREFIX) / "chunks.map"
        raw = model.durable(path)
        if raw is not None:
            found[artefact.digest] = decoded_map(raw, artefact)
    return found


def decoded_map(raw: bytes, model: Model) -> bytearray:
    digest = blake3(encode_manifest(model.manifest)).digest()
    return ChunkMap(Path("unused"), len(model.chunks), digest, DiskIo()).decode(raw)


def crash_points(recording: Recording, seed: str, count: int) -> Iterator[tuple[DiskModel, int, random.Random]]:
    """(the disk, step, randomness) at `count` seeded steps; the steps just before and after a sync come more
    often."""
    rng = random.Random(seed)
    total = len(recording.ops)
    around = [
        step + shift for step, op in enumerate(recording.ops, 1) if isinstance(op, SyncedData) for shift in (-1, 0)
    ]
    steps = sorted(rng.choice(around) if rng.random() < 0.3 else rng.randint(0, total) for _ in range(count))
    model, done = DiskModel(), 0
    for step in steps:
        for op in recording.ops[done:step]:
            model.apply(op)
        done = step
        yield model, step, random.Random(f"{seed} {step} {rng.random()}")


def run_points(recording: Recording, seed: str, scratch: Path, *, keeps_claims: bool, count: int) -> set[str]:
    """Checks crash points; returns the names of the distinct states that were checked."""
    checker = Checker(recording.models, scratch)
    seen: set[str] = set()
    for number, (model, step, rng) in enumerate(crash_points(recording, seed, count)):
        faults = rng.choice([0, 0, 0, 1, 3])
        image = model.crash(rng, faults)
        name = state_name(step, image)
        if name in seen:
            continue
        synced = synced_bits(model, recording.models) if keeps_claims else {}
        try:
            checker.check(image, synced, faults=faults, again=number % 8 == 0)
        except AssertionError as error:
            raise AssertionError(f"crash point {seed}, step {step} of {len(recording.ops)}: {error}") from error
        seen.add(name)
    return seen


def state_name(step: int, image: dict[Path, bytes | None]) -> str:
    hasher = blake3(str(step).encode())
    for path, content in sorted(image.items()):
        hasher.update(f"{path} {None if content is None else len(content)} ".encode())
        hasher.update(content or b"")
    return hasher.hexdigest()


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """Crashed disks are made in memory where there is a file system in memory."""
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK):
        yield tmp_path
        return
    path = shm / f"snowdrop-crash-{os.getpid()}"
    path.mkdir(exist_ok=True)
    yield path
    shutil.rmtree(path)


def passed_checks(monkeypatch: pytest.MonkeyPatch) -> Counter[bool]:
    """Counts what fast checks say from now on."""
    passed: Counter[bool] = Counter()
    is_right = ChunkChecks.is_right

    def counted(self: ChunkChecks, chunk: int, data: memoryview) -> bool:
        right = is_right(self, chunk, data)
        passed[right] += self.has(chunk)
        return right

    monkeypatch.setattr(ChunkChecks, "is_right", counted)
    return passed


def test_no_crash_point_serves_a_wrong_byte_and_every_restart_recovers(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked, passed = 0, passed_checks(monkeypatch)
    for name, fault, seed in RECORDINGS:
        root = tmp_path / f"{name}-{fault}-{seed}"
        root.mkdir()
        recording = record(root, name, fault, seed)
        shutil.rmtree(root)
        # Claims are taken back by quarantine, eviction and failed syncs: there only their truth is checked.
        keeps = fault == "none" and name in {"plain", "eager", "sharing"}
        checked += len(
            run_points(recording, f"{name} {fault} {seed}", scratch, keeps_claims=keeps, count=POINTS_A_RECORDING)
        )
    print(f"{checked} distinct crash points in {len(RECORDINGS)} recordings, fast checks: {dict(passed)}")
    assert checked >= CRASH_POINTS_MIN
    assert passed[True] > checked
    assert passed[False] > 100


def bit_before_data(monkeypatch: pytest.MonkeyPatch) -> None:
    sync = Landing.sync

    def broken(self: Landing) -> None:
        bits = bytearray(a | b for a, b in zip(self._durable, self._written, strict=True))
        self._map.write(bits)
        sync(self)

    monkeypatch.setattr(Landing, "sync", broken)


def no_sync_of_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snowdrop.content.landfiles.LandingFiles.sync", lambda self, index: None)


def no_sync_of_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snowdrop.content.landtree.LandingTree.sync_directories", lambda self: None)


def belief_after_a_failed_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Landing, index: int) -> None:
        # Left among what is to be synced, and tried again: as if the kernel had kept it.
        self._files.sync(index)
        self._dirty.discard(index)

    monkeypatch.setattr(Landing, "_sync_file", broken)


def tree_believed_after_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object, index: int, *, is_durable: bool) -> int:
        entry = self._manifest.files[index]  # type: ignore[attr-defined]
        if (self.tree / entry.path).exists():  # type: ignore[attr-defined]
            self.is_complete[index] = True  # type: ignore[attr-defined]
            return int(entry.size)
        return int(take_over(self, index, is_durable=is_durable))

    take_over: Callable[..., int] = LandingTree.take_over
    monkeypatch.setattr(LandingTree, "take_over", broken)


def claims_without_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crash_work.wrong_on_disk", lambda *given: [])


def claims_without_hashing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has no fast check, or fails it, is believed."""
    monkeypatch.setattr("crash_work.bad_chunks", lambda *given: [])


def checks_that_pass_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChunkChecks, "is_right", lambda self, chunk, data: self.has(chunk))


def checks_of_half_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    check = ChunkChecks._check
    monkeypatch.setattr(
        ChunkChecks, "_check", lambda self, chunk, data: check(self, chunk, data[: len(data) // 2])
    )


def bit_before_every_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk counts as written when one of its blocks is."""

    def broken(self: object, block: object, area: object) -> list[int]:
        return list(block.chunks)  # type: ignore[attr-defined]

    monkeypatch.setattr("snowdrop.content.behind.Behind.wrote", broken)


@pytest.mark.parametrize(
    "broken",
    [
        bit_before_data,
        no_sync_of_data,
        no_sync_of_directories,
        belief_after_a_failed_sync,
        tree_believed_after_a_crash,
        claims_without_a_check,
        claims_without_hashing,
        checks_that_pass_anything,
        checks_of_half_a_chunk,
        bit_before_every_place,
    ],
)
def test_a_broken_order_is_caught(
    broken: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch)

    def search() -> None:
        for seed in range(6):
            for name, fault in (("plain", "none"), ("eager", "unsynced"), ("sharing", "none")):
                root = tmp_path / f"{name}-{seed}"
                root.mkdir()
                recording = record(root, name, fault, seed)
                run_points(recording, f"{name} {seed}", scratch, keeps_claims=fault == "none", count=40)

    with pytest.raises(AssertionError, match="crash point"):
        search()


def test_a_recording_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    roots = [tmp_path / "one", tmp_path / "two"]
    for root in roots:
        root.mkdir()
    one, two = map(partial(record, name="mixed", fault="full", seed=5), roots)
    assert len(one.ops) == len(two.ops) > 50

"""Small models, and seeded work on a real disk tier that is worth a crash."""

from __future__ import annotations

import errno
import hashlib
import mmap
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from blake3 import blake3
from crash_disk import RecordingIo

from snowdrop.content.disk import DiskTier
from snowdrop.content.landing import Landing
from snowdrop.content.landread import wrong_on_disk
from snowdrop.content.layout import PUBLIC_DOMAIN, manifest_key, pack_key
from snowdrop.content.manifest import encode_manifest, manifest_digest
from snowdrop.content.origin import MemoryOrigin
from snowdrop.content.placement import area_layout
from snowdrop.content.source import bad_chunks
from snowdrop.domain.errors import StorageFullError, UnavailableError
from snowdrop.domain.ids import Digest
from snowdrop.domain.manifest import (
    FORMAT_VERSION,
    ChunkRef,
    Extent,
    FileEntry,
    Manifest,
    PackRef,
    TensorEntry,
)

SLAB_BYTES = 12_288
"""Windows of an area end here: a block and a small chunk may take two."""

CHECKED_SHARE = 0.8
"""Of chunks that go to disk behind a load: so many have a fast check."""
BLOCK_BYTES = 8192
"""Put in place of the real size of a block, so that a small file has several."""


@dataclass
class Model:
    """An artefact with its right bytes. Two files share a chunk with a third one that is no tensor file."""

    manifest: Manifest
    digest: Digest
    chunks: list[bytes]
    files: dict[str, bytes]

    def put(self, origin: MemoryOrigin) -> None:
        origin.objects[manifest_key(PUBLIC_DOMAIN, self.digest)] = encode_manifest(self.manifest)
        origin.objects[pack_key(PUBLIC_DOMAIN, self.manifest.packs[0].digest)] = b"".join(self.chunks)


def small_model(seed: int, shared: bytes = b"") -> Model:
    """About 100 KB in 18 chunks. `shared` is a tensor that another model has, too."""
    rng = random.Random(seed)
    chunks: list[bytes] = []

    def chunk(size: int) -> int:
        chunks.append(rng.randbytes(size))
        return len(chunks) - 1

    twice = chunk(5000)
    if shared:
        chunks.append(shared)
    plan: dict[str, list[int]] = {
        "a.safetensors": [chunk(300), *(chunk(rng.randint(2000, 12_000)) for _ in range(6)), twice],
        "b.safetensors": [chunk(200), twice, *(chunk(rng.randint(2000, 9000)) for _ in range(4))],
        "config.json": [chunk(40)],
        "nested/deep/vocab.txt": [chunk(4096), chunk(1500)],
        "copy.bin": [twice],
        "empty": [],
    }
    if shared:
        plan["b.safetensors"].append(1)
    return _model(plan, chunks)


def _model(plan: dict[str, list[int]], chunks: list[bytes]) -> Model:
    files = {path: b"".join(chunks[index] for index in indices) for path, indices in plan.items()}
    entries = []
    for path, indices in plan.items():
        extents, offset = [], 0
        for index in indices:
            extents.append(Extent(offset, len(chunks[index]), index, 0))
            offset += len(chunks[index])
        tensor = TensorEntry(name="t", dtype="U8", shape=(offset - 100,), offset=100, length=offset - 100)
        entries.append(
            FileEntry(
                path=path,
                size=offset,
                mode=0o644,
                sha256=hashlib.sha256(files[path]).hexdigest(),
                extents=tuple(extents),
                tensors=(tensor,) if path.endswith(".safetensors") else (),
            )
        )
    refs, offset = [], 0
    for data in chunks:
        refs.append(ChunkRef(blake3(data).hexdigest(), len(data), 0, offset, len(data)))
        offset += len(data)
    manifest = Manifest(
        version=FORMAT_VERSION,
        kind="model",
        key_domain=PUBLIC_DOMAIN,
        files=tuple(sorted(entries, key=lambda entry: entry.path)),
        chunks=tuple(refs),
        packs=(PackRef(blake3(b"".join(chunks)).hexdigest(), offset),),
    )
    return Model(manifest, manifest_digest(encode_manifest(manifest)), chunks, files)


class SmallArea:
    """A landing area in ordinary memory."""

    def __init__(self, model: Model) -> None:
        self.layout = area_layout(model.manifest)
        self._model = model
        self._view = memoryview(mmap.mmap(-1, max(self.layout.size, 1)))
        self._filled: set[int] = set()

    def fill(self, chunk: int) -> None:
        for place in self.layout.places.get(chunk, ()):
            part = self._model.chunks[chunk][place.chunk_offset : place.chunk_offset + place.length]
            self._view[place.offset : place.offset + place.length] = part
        self._filled.add(chunk)

    def is_filled(self, chunk: int) -> bool:
        return chunk in self._filled

    def stretch(self, offset: int, length: int) -> int:
        return min(length, SLAB_BYTES - offset % SLAB_BYTES)

    def window(self, offset: int, length: int) -> memoryview:
        assert offset // SLAB_BYTES == (offset + length - 1) // SLAB_BYTES
        return self._view[offset : offset + length]


class FaultyIo(RecordingIo):
    """Fails once, at the call that the seed chose; a full disk stays full for some calls."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.at = -1
        self.code = errno.EIO
        self.lasts = 1
        self.calls = 0
        self.syncs: list[int] = []

    def fail(self, call: str, path: Path, size: int) -> None:
        self.calls += 1
        if call == "sync_data":
            self.syncs.append(self.calls)
        if self.at <= self.calls < self.at + self.lasts:
            raise OSError(self.code, f"{call} of {path.name}")


@dataclass
class Work:
    """Steps of a store on a disk tier, chosen by a seed. What the disk refuses is passed over, as the store
    does."""

    io: RecordingIo
    models: list[Model]
    rng: random.Random
    boot: str = "first"
    is_one_boot: bool = False
    tier: DiskTier | None = None

    def start(self) -> None:
        self.restart(self.boot)

    def restart(self, boot: str) -> None:
        self.stop()
        self.areas = [SmallArea(model) for model in self.models]
        self.boot = self.boot if self.is_one_boot else boot
        self.tier = DiskTier(self.io.root, 1 << 30, self.io, boot_id=self.boot)
        try:
            self.tier.open()
        except (StorageFullError, UnavailableError):
            # The process ends, and is started once more.
            self.restart(boot)

    def stop(self) -> None:
        """Gives back descriptors and the lock, as the end of a process does."""
        if self.tier is not None:
            self.tier.close()

    @property
    def disk(self) -> DiskTier:
        assert self.tier is not None
        return self.tier

    def landing(self, index: int) -> Landing:
        model = self.models[index]
        self.disk.reserve(model.digest, model.manifest, set())
        return self.disk.open_landing(model.digest, model.manifest)

    def tried(self, step: Callable[[], object]) -> None:
        with suppress(StorageFullError, UnavailableError):
            step()

    def fill(self, index: int, share: float) -> None:
        landing = self.landing(index)
        for chunk in self.areas[index].layout.places:
            if self.rng.random() < share:
                self.areas[index].fill(chunk)
                if self.rng.random() < CHECKED_SHARE:  # the others are as an earlier version left them
                    landing.learn(chunk, memoryview(self.models[index].chunks[chunk]))

    def behind(self, index: int, rounds: int) -> None:
        landing = self.landing(index)
        for _ in range(rounds):
            if not landing.write_behind(self.areas[index], self.rng.choice([1, BLOCK_BYTES, 4 * BLOCK_BYTES])):
                break

    def write(self, index: int, share: float, *, small_only: bool) -> None:
        landing, model = self.landing(index), self.models[index]
        chunks = list(range(len(model.chunks)))
        self.rng.shuffle(chunks)
        for chunk in chunks:
            is_small = chunk not in self.areas[index].layout.places
            if (is_small or not small_only) and self.rng.random() < share:
                landing.learn(chunk, memoryview(model.chunks[chunk]))
                landing.write(chunk, memoryview(model.chunks[chunk]))

    def read_back(self, index: int) -> None:
        bring_held(self.landing(index), self.models[index], self.rng)

    def quarantine(self, index: int, count: int) -> None:
        landing = self.landing(index)
        held = landing.held_chunks()
        for chunk in self.rng.sample(held, min(count, len(held))):
            landing.quarantine(chunk)

    def copy_from_siblings(self, index: int) -> None:
        landing, model = self.landing(index), self.models[index]
        for chunk, ref in enumerate(model.manifest.chunks):
            found = self.disk.find_chunk(PUBLIC_DOMAIN, ref)
            if found is not None and found[0] is not landing:
                data = memoryview(bytearray(ref.plain_bytes))
                found[0].read(found[1], 1, data)
                if not bad_chunks(model.manifest, chunk, 1, data):
                    landing.learn(chunk, data)
                    landing.write(chunk, data)

    def sync(self, index: int) -> None:
        self.landing(index).sync()

    def load(self, index: int, share: float = 1.0) -> None:
        """In pieces, as a load goes: some arrives, some is written behind, some is synced."""
        for _ in range(4):
            self.tried(lambda: self.fill(index, share / 2))
            self.tried(lambda: self.behind(index, self.rng.randint(0, 6)))
            self.tried(lambda: self.write(index, share / 2, small_only=True))
            if self.rng.random() < 0.6:
                self.tried(lambda: self.sync(index))
        if share >= 1:
            self.finish(index)

    def finish(self, index: int) -> None:
        for chunk in self.areas[index].layout.places:
            self.areas[index].fill(chunk)
        self.tried(lambda: self.behind(index, 100))
        self.tried(lambda: self.write(index, 1.0, small_only=False))
        self.tried(lambda: self.sync(index))

    def evict(self, index: int) -> None:
        self.areas[index] = SmallArea(self.models[index])
        self.tried(lambda: self.disk.evict(self.models[index].digest))


def bring_held(landing: Landing, model: Model, rng: random.Random | None = None) -> int:
    """Reads and verifies what the landing claims; returns how much of it was wrong."""
    wrong = 0
    for chunk in landing.held_chunks():
        if landing.is_verified(chunk) or (rng is not None and rng.random() < 0.3):
            continue
        data = memoryview(bytearray(len(model.chunks[chunk])))
        landing.read(chunk, 1, data)
        if wrong_on_disk(landing, partial(bad_chunks, model.manifest), chunk, 1, data):
            landing.quarantine(chunk)
            wrong += 1
        else:
            landing.confirm(chunk, data)
    return wrong


def plain(work: Work) -> None:
    work.load(0)


def eager(work: Work) -> None:
    """Loads without an area: every chunk is written to its files."""
    for _ in range(3):
        work.tried(lambda: work.write(0, 0.5, small_only=False))
        work.tried(lambda: work.sync(0))
    work.finish(0)


def eviction(work: Work) -> None:
    work.load(0)
    work.load(1, 0.5)
    work.evict(0)
    work.load(1)
    work.load(0, 0.8)
    work.evict(1)
    work.load(0)


def repair(work: Work) -> None:
    work.load(0)
    for _ in range(3):
        work.tried(lambda: work.quarantine(0, work.rng.randint(1, 4)))
        if work.rng.random() < 0.5:
            work.tried(lambda: work.sync(0))
        work.tried(lambda: work.behind(0, 3))
        work.tried(lambda: work.write(0, 0.7, small_only=False))
    work.finish(0)


def sharing(work: Work) -> None:
    work.load(0, 0.8)
    work.load(1, 0.5)
    work.tried(lambda: work.copy_from_siblings(1))
    work.tried(lambda: work.copy_from_siblings(0))
    work.finish(1)
    work.finish(0)


def resumed(work: Work) -> None:
    """Killed and started again, within a boot and after one."""
    for boot in ("first", "second", "second", "third"):
        work.load(0, 0.4)
        work.restart(boot)
        work.tried(lambda: work.read_back(0))
    work.finish(0)
    work.restart("third")
    work.restart("fourth")
    work.tried(lambda: work.read_back(0))
    work.finish(0)


def mixed(work: Work) -> None:
    """Anything after anything."""
    steps: list[Callable[[int], object]] = [
        lambda index: work.fill(index, 0.5),
        lambda index: work.behind(index, 3),
        lambda index: work.write(index, 0.4, small_only=True),
        lambda index: work.write(index, 0.2, small_only=False),
        work.sync,
        work.sync,
        lambda index: work.quarantine(index, 1),
        work.copy_from_siblings,
        work.read_back,
    ]
    for _ in range(40):
        index = work.rng.randrange(2)
        work.tried(partial(work.rng.choice(steps), index))
        chance = work.rng.random()
        if chance < 0.04:
            work.evict(index)
        elif chance < 0.10:
            work.restart(work.rng.choice([work.boot, f"boot {work.rng.random()}"]))


WORKLOADS: dict[str, Callable[[Work], None]] = {
    step.__name__: step for step in (plain, eager, eviction, repair, sharing, resumed, mixed)
}

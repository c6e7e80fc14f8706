"""The content store as a whole: power cuts in the middle of its loads, and disks that are full from any call on.

`test_crash_points.py` goes through many more states of the disk tier alone; here the real store made the calls,
from its own threads, and the real store takes over.
"""

from __future__ import annotations

import errno
import random
import shutil
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from crash_disk import RecordingIo, materialise
from crash_work import BLOCK_BYTES, Model, small_model
from test_crash_points import NoSync, Recording, crash_points, found_files, scratch, state_name

from content_helpers import CountingOrigin, settings_for
from snowdrop.content.disk import DiskTier
from snowdrop.content.diskio import DiskIo
from snowdrop.content.store import ContentStore, Landed, open_store
from snowdrop.domain.errors import NotFoundError, SnowdropError, StorageFullError, UnavailableError
from snowdrop.domain.ids import DEFAULT_TENANT
from snowdrop.domain.receipt import ContentBytes

__all__ = ["scratch"]

pytestmark = pytest.mark.anyio

POINTS_A_RECORDING = 60
POINTS_MIN = 150


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snowdrop.content.behind.BLOCK_BYTES_MAX", BLOCK_BYTES)


@pytest.fixture
def models() -> list[Model]:
    first = small_model(1)
    return [first, small_model(1001, first.chunks[3])]


@pytest.fixture
def origin(models: list[Model]) -> CountingOrigin:
    origin = CountingOrigin()
    for model in models:
        model.put(origin)
    return origin


@asynccontextmanager
async def store_on(cache: Path, origin: CountingOrigin, io: DiskIo, boot: str) -> AsyncIterator[ContentStore]:
    disk = DiskTier(cache, 64 << 20, io, boot_id=boot)
    async with open_store(settings_for(cache), origin=origin, disk=disk) as store:
        yield store


async def load(store: ContentStore, model: Model, holder: str = "h", *, map_tensors: bool = True) -> ContentBytes:
    """Loads, checks every byte that the reader is given, and says where the bytes came from."""
    landed = await store.ensure(DEFAULT_TENANT, model.digest, holder, map_tensors=map_tensors)
    content = landed.content
    if landed.wake is not None:
        landed.wake.close()
        content = content + (await store.wait_filled(model.digest, holder)).content
        check_area(landed, model)
    for path, data in found_files(landed.directory).items():
        assert data == model.files[path]
    return content


def check_area(landed: Landed, model: Model) -> None:
    assert landed.area is not None
    for file in landed.area.layout.files:
        assert bytes(landed.area.window(file.offset, file.size)) == model.files[file.path]


async def complete(store: ContentStore, model: Model) -> ContentBytes:
    content = await load(store, model, map_tensors=False)
    await store.wait_directory(model.digest)
    landed = await store.ensure(DEFAULT_TENANT, model.digest, "h", map_tensors=False)
    assert found_files(landed.directory) == model.files
    return content


async def record(root: Path, models: list[Model], origin: CountingOrigin, *, map_tensors: bool) -> Recording:
    io = RecordingIo(root)
    root.mkdir()
    async with store_on(root, origin, io, "one") as store:
        await load(store, models[0], map_tensors=map_tensors)
    async with store_on(root, origin, io, "one") as store:
        await load(store, models[1], map_tensors=map_tensors)
        await store.wait_directory(models[1].digest)
        await load(store, models[0], map_tensors=map_tensors)
        await store.wait_directory(models[0].digest)
    async with store_on(root, origin, io, "two") as store:
        for model in models:
            await load(store, model, map_tensors=map_tensors)
            await store.wait_directory(model.digest)
    return Recording(models, io.ops)


async def test_the_store_recovers_from_a_power_cut_at_any_call_of_its_own(
    tmp_path: Path, scratch: Path, models: list[Model], origin: CountingOrigin
) -> None:
    seen: set[str] = set()
    for number, map_tensors in enumerate((True, False, True)):
        recording = await record(tmp_path / str(number), models, origin, map_tensors=map_tensors)
        for model, step, rng in crash_points(recording, f"store {number}", POINTS_A_RECORDING):
            image = model.crash(rng, rng.choice([0, 0, 1]))
            seen.add(state_name(step, image))
            root = scratch / "crashed"
            materialise(image, root)
            async with store_on(root, origin, NoSync(), "three") as store:
                for artefact in rng.sample(models, 2):
                    await load(store, artefact, map_tensors=rng.random() < 0.5)
                    await complete(store, artefact)
            shutil.rmtree(root)
    assert len(seen) >= POINTS_MIN


class FullFrom(NoSync):
    """No call that needs room succeeds from number `at` on, until `free` is called."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.calls = 0
        self.is_hit = False

    def free(self) -> None:
        self.at = 1 << 60

    def _need_room(self) -> None:
        self.calls += 1
        if self.calls >= self.at:
            self.is_hit = True
            raise OSError(errno.ENOSPC, "No space left on device")

    def make_directory(self, path: Path) -> None:
        self._need_room()
        super().make_directory(path)

    def create(self, path: Path, size: int, mode: int) -> None:
        self._need_room()
        super().create(path, size, mode)

    def write(self, fd: int, view: memoryview, offset: int) -> None:
        self._need_room()
        super().write(fd, view, offset)

    def replace(self, source: Path, target: Path) -> None:
        self._need_room()
        super().replace(source, target)

    def sync_data(self, fd: int) -> None:
        self._need_room()


async def refusal_of(step: Awaitable[object]) -> SnowdropError | None:
    """What a full disk may answer; anything else is raised."""
    try:
        await step
    except (StorageFullError, NotFoundError) as error:
        return error
    return None


@pytest.mark.parametrize("map_tensors", [True, False])
async def test_a_disk_that_is_full_from_any_call_on_serves_right_bytes_or_says_so(
    tmp_path: Path, models: list[Model], origin: CountingOrigin, map_tensors: bool
) -> None:
    model = models[0]
    passed = refused = 0
    at, is_hit = 1, True
    while is_hit:
        cache = tmp_path / str(at)
        io = FullFrom(1 << 60)
        async with store_on(cache, origin, io, "one") as store:
            io.at = io.calls + at
            refusal = await refusal_of(load(store, model, map_tensors=map_tensors))
            passed += refusal is None
            refused += refusal is not None
            waited = await refusal_of(store.wait_directory(model.digest))
            if refusal is None and waited is None:
                landed = await store.ensure(DEFAULT_TENANT, model.digest, "h", map_tensors=False)
                assert found_files(landed.directory) == model.files
            for error in (refusal, waited):
                assert error is None or error.next_step
            # What is still under way may yet find the disk full.
            await store.wait_quiet()
            is_hit = io.is_hit
            io.free()
            await load(store, model, map_tensors=map_tensors)
            await complete(store, model)
        brought = origin.pack_bytes_read
        async with store_on(cache, origin, io, "one") as store:
            await load(store, model, map_tensors=map_tensors)
        assert origin.pack_bytes_read == brought
        at += 1
    assert passed > (10 if map_tensors else 0)
    assert refused > 10


async def test_a_sync_that_fails_takes_nothing_down(
    tmp_path: Path, models: list[Model], origin: CountingOrigin
) -> None:
    """Each sync in turn fails once; asking for the directory again ends well, and so does a restart."""

    class FailsOnce(NoSync):
        def __init__(self, at: int) -> None:
            self.at = at

        def sync_data(self, fd: int) -> None:
            self.at -= 1
            if self.at == 0:
                raise OSError(errno.EIO, "lost a write")

    rng = random.Random(3)
    failed = 0
    for at in range(1, 14):
        io = FailsOnce(at)
        model = rng.choice(models)
        async with store_on(tmp_path / str(at), origin, io, "one") as store:
            await load(store, model)
            for _ in range(2):
                try:
                    await store.wait_directory(model.digest)
                    break
                except UnavailableError:
                    failed += 1
            await complete(store, model)
        async with store_on(tmp_path / str(at), origin, NoSync(), "two") as store:
            await load(store, model)
            await complete(store, model)
    assert failed

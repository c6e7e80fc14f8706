import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import msgspec
import pytest

from content_helpers import CountingOrigin, FullDisk, noise, push, safetensors_bytes, settings_for, write_model
from snowdrop.content.disk import DiskTier
from snowdrop.content.diskio import DiskIo
from snowdrop.content.ingest import PushOptions, push_source
from snowdrop.content.ingest.directory import DirectorySource
from snowdrop.content.keys import Hasher, key_domain, load_keyring, tenant_key
from snowdrop.content.landing import Landing
from snowdrop.content.layout import PUBLIC_DOMAIN, manifest_key
from snowdrop.content.manifest import decode_manifest, encode_manifest, manifest_digest
from snowdrop.content.progress import ProgressReader
from snowdrop.content.siblings import AreaSiblings
from snowdrop.content.slabs import SlabPool
from snowdrop.content.store import ContentStore, Landed, open_store
from snowdrop.domain.cancel import CANCEL_FLAG, cancelled
from snowdrop.domain.errors import (
    ConflictError,
    IntegrityError,
    NotFoundError,
    ReadCancelledError,
    StorageFullError,
    UnavailableError,
)
from snowdrop.domain.ids import DEFAULT_TENANT, Digest

pytestmark = pytest.mark.anyio
WAIT_S_MAX = 10.0
THREADS_OF_THE_LOOP = 40
"""What anyio gives an event loop by default."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def origin() -> CountingOrigin:
    return CountingOrigin()


async def ensure(
    store: ContentStore, digest: Digest, holder: str = "h", *, map_tensors: bool = True, lazy: bool = False
) -> Landed:
    """And waits until the area is filled; `content` and `spans` are of both."""
    landed = await store.ensure(DEFAULT_TENANT, digest, holder, map_tensors=map_tensors, lazy=lazy)
    if landed.wake is None:
        return landed
    landed.wake.close()
    filled = await store.wait_filled(digest, holder)
    return msgspec.structs.replace(
        landed, content=landed.content + filled.content, spans=landed.spans + filled.spans
    )


def area_bytes(landed: Landed, path: str) -> bytes:
    assert landed.area is not None
    file = next(file for file in landed.area.layout.files if file.path == path)
    return bytes(landed.area.window(file.offset, file.size))


def assert_tree(landed: Landed, source: Path) -> None:
    found = {path.relative_to(landed.directory): path for path in landed.directory.rglob("*") if path.is_file()}
    wanted = {path.relative_to(source): path for path in source.rglob("*") if path.is_file()}
    assert {name: path.read_bytes() for name, path in found.items()} == {
        name: path.read_bytes() for name, path in wanted.items()
    }


async def test_first_from_origin_then_from_ram_then_after_a_restart_from_disk(
    tmp_path: Path, source: Path, origin: CountingOrigin
) -> None:
    digest = push(source, origin).artefact.manifest
    total = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    weights = (source / "model.safetensors").read_bytes()
    async with open_store(settings_for(tmp_path / "cache"), origin=origin) as store:
        first = await ensure(store, digest)
        assert area_bytes(first, "model.safetensors") == weights
        assert (first.directory / "nested/vocab.txt").read_bytes() == (source / "nested/vocab.txt").read_bytes()
        assert first.content.origin == first.content.total == total
        assert [span.name for span in first.spans] == ["manifest", "files", "fetch"]
        second = await ensure(store, digest, "other")
        assert second.area is first.area
        assert (second.content.ram, second.content.disk) == (len(weights), total - len(weights))
        await store.wait_directory(digest)
        assert_tree(first, source)
    assert origin.pack_bytes_read == total
    async with open_store(settings_for(tmp_path / "cache"), origin=origin) as store:
        again = await ensure(store, digest)
        assert again.content.disk == again.content.total == total
        assert area_bytes(again, "model.safetensors") == weights
    assert origin.pack_bytes_read == total


async def test_two_at_once_do_the_work_once(tmp_path: Path, source: Path, origin: CountingOrigin) -> None:
    digest = push(source, origin).artefact.manifest
    got: list[Landed] = []

    async def one(holder: str) -> None:
        got.append(await ensure(store, digest, holder))

    async with open_store(settings_for(tmp_path / "cache"), origin=origin) as store:
        async with anyio.create_task_group() as tasks:
            for holder in ("a", "b", "c"):
                tasks.start_soon(one, holder)
        assert sum(landed.content.origin for landed in got) == origin.pack_bytes_read == got[0].content.total


async def test_without_mapping_every_file_is_in_the_directory(
    tmp_path: Path, source: Path, origin: CountingOrigin
) -> None:
    digest = push(source, origin).artefact.manifest
    async with open_store(settings_for(tmp_path / "cache"), origin=origin) as store:
        landed = await ensure(store, digest, map_tensors=False)
        assert landed.area is None
        assert_tree(landed, source)


async def test_a_tensor_file_is_not_visible_before_it_is_whole(
    tmp_path: Path, source: Path, origin: CountingOrigin
) -> None:
    digest = push(source, origin).artefact.manifest
    disk = DiskTier(tmp_path / "cache", 64 << 20, FullDisk(200_000))
    async with open_store(settings_for(tmp_path / "cache"), origin=origin, disk=disk) as store:
        landed = await ensure(store, digest)
        with pytest.raises(StorageFullError):
            await store.wait_directory(digest)
        assert not (landed.directory / "model.safetensors").exists()
        assert (landed.directory / "config.json").exists()


async def test_an_unknown_artefact_is_not_found(tmp_path: Path, origin: CountingOrigin) -> None:
    async with open_store(settings_for(tmp_path / "cache"), origin=origin) as store:
        with pytest.raises(NotFoundError):
            await ensure(store, Digest("blake3:" + "0" * 64))
        with pytest.raises(NotFoundError):
            await store.wait_directory(Digest("blake3:" + "0" * 64))


@pytest.mark.parametrize("map_tensors", [True, False])
async def test_a_wrong_byte_at_the_origin_is_named_and_never_served(
    tmp_path: Path, source: Path, origin: CountingOrigin, map_tensors: bool
) -> None:
    digest = push(source, origin).artefact.manifest
    good = dict(origin.objects)
    origin.flip_byte(noise(5 << 20)[:64])
    async with open_store(settings_for(tmp_path / "cache"), origin=origin) as store:
        with pytest.raises(IntegrityError, match=r"model\.safetensors") as caught:
            await ensure(store, digest, map_tensors=map_tensors)
        assert "chunk" in caught.value.where
        assert "pack public/packs/" in caught.value.where
        origin.objects = good
        landed = await ensure(store, digest)
        assert area_bytes(landed, "model.safetensors") == (source / "model.safetensors").read_bytes()


async def test_a_manifest_that_is_not_what_its_digest_says_is_refused(
    tmp_path: Path, source: Path, origin: CountingOrigin
) -> None:
    digest = push(source, origin).artefact.manifest
    key = next(key for key in origin.objects if "manifests" in key)
    origin.objects[key] = origin.objects[key].replace(b"config", b"donfig")
    async with open_store(settings_for(tmp_path / "cache"), origin=origin) as store:
        with pytest.raises(IntegrityError, match="digest"):
            await ensure(store, digest)


def landing_of(cache: Path, digest: Digest) -> Path:
    return cache / "artefacts" / digest.removeprefix("blake3:")


async def landed_once(cache: Path, digest: Digest, origin: CountingOrigin, io: DiskIo | None = None) -> None:
    disk = DiskTier(cache, 64 << 20, io)
    async with open_store(settings_for(cache), origin=origin, disk=disk) as store:
        await ensure(store, digest)
        await store.wait_directory(digest)


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def truncate(path: Path) -> None:
    os.truncate(path, 100)


@pytest.mark.parametrize(
    "damage",
    [lambda path: overwrite(path, 1 << 20, b"wrong"), truncate, Path.unlink],
    ids=["wrong bytes", "cut short", "gone"],
)
async def test_damage_on_disk_is_found_and_mended_from_the_origin(
    tmp_path: Path, source: Path, origin: CountingOrigin, damage: Callable[[Path], None]
) -> None:
    cache, digest = tmp_path / "cache", push(source, origin).artefact.manifest
    await landed_once(cache, digest, origin)
    damage(landing_of(cache, digest) / "tree/model.safetensors")
    damage(landing_of(cache, digest) / "tree/nested/vocab.txt")
    async with open_store(settings_for(cache), origin=origin) as store:
        landed = await ensure(store, digest)
        assert landed.content.origin > 0
        assert area_bytes(landed, "model.safetensors") == (source / "model.safetensors").read_bytes()
        await store.wait_directory(digest)
        assert_tree(landed, source)
    async with open_store(settings_for(cache), origin=origin) as store:
        assert (await ensure(store, digest)).content.origin == 0


def counted_hashes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what is hashed to judge chunks, from now on."""
    sizes: list[int] = []

    def hexdigest(self: Hasher, data: bytes | bytearray | memoryview) -> str:
        sizes.append(len(data))
        return real(self, data)

    real = Hasher.hexdigest
    monkeypatch.setattr(Hasher, "hexdigest", hexdigest)
    return sizes


@pytest.mark.parametrize("map_tensors", [True, False])
async def test_what_this_node_verified_and_wrote_is_checked_fast_when_read_back(
    tmp_path: Path, source: Path, origin: CountingOrigin, monkeypatch: pytest.MonkeyPatch, map_tensors: bool
) -> None:
    cache, digest = tmp_path / "cache", push(source, origin).artefact.manifest
    async with open_store(settings_for(cache), origin=origin) as store:
        await ensure(store, digest, map_tensors=map_tensors)
        await store.wait_directory(digest)
    (landing_of(cache, digest) / "proof").unlink()  # as after a restart of the machine
    hashed = counted_hashes(monkeypatch)
    async with open_store(settings_for(cache), origin=origin) as store:
        landed = await ensure(store, digest)
        assert area_bytes(landed, "model.safetensors") == (source / "model.safetensors").read_bytes()
        assert landed.content.disk == landed.content.total
        await store.wait_directory(digest)
        assert_tree(landed, source)
    assert max(hashed) < 4096  # the manifest


async def test_a_directory_without_checks_is_hashed_once_and_has_them_from_then_on(
    tmp_path: Path, source: Path, origin: CountingOrigin, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, digest = tmp_path / "cache", push(source, origin).artefact.manifest
    with monkeypatch.context() as before:
        before.setattr(Landing, "learn", lambda *given: None)
        await landed_once(cache, digest, origin)
    for is_first in (True, False):
        hashed = counted_hashes(monkeypatch)
        async with open_store(settings_for(cache), origin=origin) as store:
            landed = await ensure(store, digest)
            assert landed.content.origin == 0
            await store.wait_directory(digest)
        assert (max(hashed) > 1 << 20) == is_first


async def test_a_check_that_is_itself_wrong_condemns_nothing(
    tmp_path: Path, source: Path, origin: CountingOrigin
) -> None:
    cache, digest = tmp_path / "cache", push(source, origin).artefact.manifest
    disk = DiskTier(cache, 64 << 20)
    async with open_store(settings_for(cache), origin=origin, disk=disk) as store:
        await ensure(store, digest)
        await store.wait_directory(digest)
        landing = store.landing_of(digest)
        for chunk in range(len(landing.manifest.chunks)):
            landing.learn(chunk, memoryview(b"not the chunk's bytes"))
        landing.sync()
    async with open_store(settings_for(cache), origin=origin) as store:
        landed = await ensure(store, digest)
        assert landed.content.origin == 0
        assert area_bytes(landed, "model.safetensors") == (source / "model.safetensors").read_bytes()
        assert not any(store.parts.disk.events.counts.values())


class CrashBeforeMap(DiskIo):
    """After `syncs` syncs the process might as well be dead: data is written, no bit ever is."""

    def __init__(self, syncs: int) -> None:
        self.syncs = syncs

    def sync_data(self, fd: int) -> None:
        self.syncs -= 1
        if self.syncs < 0:
            raise OSError(errno.EIO, "crashed")
        super().sync_data(fd)


@pytest.mark.parametrize("syncs", [2, 3])
async def test_after_a_crash_between_data_and_bit_the_chunk_is_not_believed(
    tmp_path: Path, source: Path, origin: CountingOrigin, syncs: int
) -> None:
    cache, digest = tmp_path / "cache", push(source, origin).artefact.manifest
    disk = DiskTier(cache, 64 << 20, CrashBeforeMap(syncs))
    async with open_store(settings_for(cache), origin=origin, disk=disk) as store:
        await ensure(store, digest)
        with pytest.raises(UnavailableError):
            await store.wait_directory(digest)
    before = origin.pack_bytes_read
    async with open_store(settings_for(cache), origin=origin) as store:
        landed = await ensure(store, digest)
        assert landed.content.disk == 0
        assert origin.pack_bytes_read == 2 * before
        await store.wait_directory(digest)
        assert_tree(landed, source)


async def test_a_claimed_chunk_of_zeros_is_not_believed(
    tmp_path: Path, source: Path, origin: CountingOrigin
) -> None:
    """A map that was torn, or that lied: bits for data that never reached the disk."""
    cache, digest = tmp_path / "cache", push(source, origin).artefact.manifest
    await landed_once(cache, digest, origin)
    path = landing_of(cache, digest) / "tree/model.safetensors"
    size = path.stat().st_size
    os.truncate(path, 0)
    os.truncate(path, size)
    async with open_store(settings_for(cache), origin=origin) as store:
        landed = await ensure(store, digest)
        assert landed.content.origin == size
        assert area_bytes(landed, "model.safetensors") == (source / "model.safetensors").read_bytes()


@pytest.mark.parametrize("junk", [b"", b"short", b"\xff" * 9, b"\xff" * 4096])
async def test_a_map_that_is_junk_is_not_believed(
    tmp_path: Path, source: Path, origin: CountingOrigin, junk: bytes
) -> None:
    cache, digest = tmp_path / "cache", push(source, origin).artefact.manifest
    await landed_once(cache, digest, origin)
    (landing_of(cache, digest) / "chunks.map").write_bytes(junk)
    async with open_store(settings_for(cache), origin=origin) as store:
        landed = await ensure(store, digest)
        assert landed.content.disk == 0
        assert area_bytes(landed, "model.safetensors") == (source / "model.safetensors").read_bytes()


class Recorder(DiskIo):
    def __init__(self) -> None:
        self.steps: list[tuple[str, str]] = []

    def write(self, fd: int, view: memoryview, offset: int) -> None:
        self.steps.append(("write", Path(f"/proc/self/fd/{fd}").readlink().name))
        super().write(fd, view, offset)

    def sync_data(self, fd: int) -> None:
        self.steps.append(("sync", Path(f"/proc/self/fd/{fd}").readlink().name))
        super().sync_data(fd)


async def test_data_is_durable_before_its_bit_is_written(
    tmp_path: Path, source: Path, origin: CountingOrigin
) -> None:
    recorder = Recorder()
    await landed_once(tmp_path / "cache", push(source, origin).artefact.manifest, origin, recorder)
    steps = recorder.steps
    last_map = max(index for index, step in enumerate(steps) if step == ("write", "chunks.map"))
    for name in ("model.safetensors", "config.json", "vocab.txt"):
        last_write = max(index for index, step in enumerate(steps) if step == ("write", name))
        assert ("sync", name) in steps[last_write:last_map]
    assert ("sync", "chunks.map") in steps[last_map:]


async def test_a_full_disk_lets_tensors_pass_and_says_so_for_the_directory(
    tmp_path: Path, source: Path, origin: CountingOrigin
) -> None:
    digest = push(source, origin).artefact.manifest
    io = FullDisk(200_000)
    disk = DiskTier(tmp_path / "cache", 64 << 20, io)
    async with open_store(settings_for(tmp_path / "cache"), origin=origin, disk=disk) as store:
        landed = await ensure(store, digest)
        assert area_bytes(landed, "model.safetensors") == (source / "model.safetensors").read_bytes()
        with pytest.raises(StorageFullError) as caught:
            await store.wait_directory(digest)
        assert caught.value.next_step
        io.free_bytes = 1 << 30
        await store.wait_directory(digest)
        assert_tree(landed, source)


async def test_a_full_disk_refuses_what_the_directory_needs(
    tmp_path: Path, source: Path, origin: CountingOrigin
) -> None:
    digest = push(source, origin).artefact.manifest
    disk = DiskTier(tmp_path / "cache", 64 << 20, FullDisk(20_000))
    async with open_store(settings_for(tmp_path / "cache"), origin=origin, disk=disk) as store:
        with pytest.raises(StorageFullError) as caught:
            await ensure(store, digest)
        assert caught.value.next_step


async def test_a_tree_beyond_the_disk_limit_passes_through(
    tmp_path: Path, source: Path, origin: CountingOrigin
) -> None:
    digest = push(source, origin).artefact.manifest
    settings = settings_for(tmp_path / "cache", disk_bytes_max=1 << 20)
    async with open_store(settings, origin=origin) as store:
        landed = await ensure(store, digest)
        assert area_bytes(landed, "model.safetensors") == (source / "model.safetensors").read_bytes()
        with pytest.raises(StorageFullError, match="directory needs"):
            await store.wait_directory(digest)
        with pytest.raises(StorageFullError):
            await ensure(store, digest, "other", map_tensors=False)


async def test_pinned_artefacts_stay_and_others_make_room(tmp_path: Path, origin: CountingOrigin) -> None:
    models = [write_model(tmp_path / f"m{index}", seed=100 * index) for index in range(3)]
    digests = [push(model, origin).artefact.manifest for model in models]
    cache = tmp_path / "cache"
    settings = settings_for(cache, disk_bytes_max=13 << 20, ram_bytes_max=13 << 20)
    async with open_store(settings, origin=origin) as store:
        for index in range(2):
            await ensure(store, digests[index], f"h{index}")
            await store.wait_directory(digests[index])
        with pytest.raises(StorageFullError, match="landing area"):
            await ensure(store, digests[2], "h2")
        store.release("h0")
        await ensure(store, digests[2], "h2")
        assert not landing_of(cache, digests[0]).exists()
        assert (await ensure(store, digests[1], "h1")).content.origin == 0
        store.release("h1")
        assert (await ensure(store, digests[0], "h0")).content.origin > 0


def write_base_and_tune(root: Path) -> tuple[Path, Path, int]:
    """Two models that share all but one tensor, and the bytes of the second that are its own."""
    base, tune = root / "base", root / "tune"
    for folder, seed in ((base, 50), (tune, 60)):
        folder.mkdir(parents=True)
        tensors = {f"t{index}": ("U8", [2 << 20], noise(2 << 20, index)) for index in range(3)}
        tensors["head"] = ("U8", [1 << 20], noise(1 << 20, seed))
        (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    return base, tune, 1 << 20


@pytest.mark.parametrize("resident", [True, False], ids=["in memory", "on disk"])
async def test_a_fine_tune_takes_what_it_shares_from_its_base(
    tmp_path: Path, origin: CountingOrigin, resident: bool
) -> None:
    base, tune, own_bytes = write_base_and_tune(tmp_path)
    first, second = (push(each, origin).artefact.manifest for each in (base, tune))
    cache = tmp_path / "cache"
    if not resident:
        await landed_once(cache, first, origin)
    async with open_store(settings_for(cache), origin=origin) as store:
        if resident:
            await ensure(store, first, "base")
        before = origin.pack_bytes_read
        landed = await ensure(store, second, "tune")
        assert area_bytes(landed, "model.safetensors") == (tune / "model.safetensors").read_bytes()
        assert own_bytes <= origin.pack_bytes_read - before == landed.content.origin < own_bytes + 4096
        shared = landed.content.ram if resident else landed.content.disk
        assert shared == landed.content.total - landed.content.origin > 5 << 20
        await store.wait_directory(second)
        assert_tree(landed, tune)
        assert origin.pack_bytes_read - before == landed.content.origin


async def test_two_loads_at_once_fetch_what_they_share_once(tmp_path: Path) -> None:
    base, tune, own_bytes = write_base_and_tune(tmp_path)
    origin = Slow()
    first, second = (push(each, origin).artefact.manifest for each in (base, tune))
    async with open_store(settings_for(tmp_path / "cache"), origin=origin) as store:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ensure, store, first, "base")
            await origin.was_asked()
            tasks.start_soon(ensure, store, second, "tune")
            await origin.was_asked()
            await anyio.wait_all_tasks_blocked()
            origin.let_all()
        assert origin.pack_bytes_read < (base / "model.safetensors").stat().st_size + own_bytes + 8192
        landed = await ensure(store, second, "again")
        assert area_bytes(landed, "model.safetensors") == (tune / "model.safetensors").read_bytes()


async def test_what_a_load_was_about_to_bring_is_fetched_when_it_is_given_up(tmp_path: Path) -> None:
    base, tune, _ = write_base_and_tune(tmp_path)
    origin = Slow()
    first, second = (push(each, origin).artefact.manifest for each in (base, tune))
    async with open_store(settings_for(tmp_path / "cache", fetch_threads=1), origin=origin) as store:
        given_up = await store.ensure(DEFAULT_TENANT, first, "base", map_tensors=True)
        await origin.was_asked()
        landed = await store.ensure(DEFAULT_TENANT, second, "tune", map_tensors=True)
        store.release("base")
        origin.let_all()
        await store.wait_filled(second, "tune")
        assert area_bytes(landed, "model.safetensors") == (tune / "model.safetensors").read_bytes()
        for each in (given_up, landed):
            assert each.wake is not None
            each.wake.close()


async def test_wrong_bytes_of_another_artefact_are_not_taken_over(tmp_path: Path, origin: CountingOrigin) -> None:
    base, tune, _ = write_base_and_tune(tmp_path)
    first, second = (push(each, origin).artefact.manifest for each in (base, tune))
    cache = tmp_path / "cache"
    await landed_once(cache, first, origin)
    overwrite(landing_of(cache, first) / "tree/model.safetensors", 3 << 20, b"wrong")
    async with open_store(settings_for(cache), origin=origin) as store:
        landed = await ensure(store, second)
        assert area_bytes(landed, "model.safetensors") == (tune / "model.safetensors").read_bytes()
        assert 3 << 20 <= landed.content.origin < 4 << 20, "the damaged chunk and the own one"


@pytest.mark.parametrize("resident", [True, False], ids=["in memory", "on disk"])
async def test_a_manifest_that_claims_another_size_for_a_chunk_harms_nobody_who_has_it(
    tmp_path: Path, origin: CountingOrigin, resident: bool
) -> None:
    base, _, _ = write_base_and_tune(tmp_path)
    first, second = (push(each, origin).artefact.manifest for each in (base, write_model(tmp_path / "m")))
    manifests = [decode_manifest(origin.objects[manifest_key(PUBLIC_DOMAIN, each)]) for each in (first, second)]
    wanted = next(chunk for chunk in manifests[0].chunks if chunk.plain_bytes == 2 << 20)
    forged = msgspec.structs.replace(
        manifests[1],
        chunks=tuple(
            msgspec.structs.replace(chunk, digest=wanted.digest) if chunk.plain_bytes == 300 << 10 else chunk
            for chunk in manifests[1].chunks
        ),
    )
    data = encode_manifest(forged)
    third = manifest_digest(data)
    origin.objects[manifest_key(PUBLIC_DOMAIN, third)] = data
    async with open_store(settings_for(tmp_path / "cache"), origin=origin) as store:
        landed = await ensure(store, first, "base", map_tensors=resident)
        await store.wait_directory(first)
        with anyio.fail_after(WAIT_S_MAX), pytest.raises(IntegrityError):
            await ensure(store, third, "forged")
        assert_tree(landed, base)


async def test_a_bug_in_a_source_is_met_once_and_the_next_one_is_asked(
    tmp_path: Path, origin: CountingOrigin, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(source: AreaSiblings, first: int, count: int, into: memoryview) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(AreaSiblings, "read", broken)
    base, tune, _ = write_base_and_tune(tmp_path)
    first, second = (push(each, origin).artefact.manifest for each in (base, tune))
    async with open_store(settings_for(tmp_path / "cache"), origin=origin) as store:
        await ensure(store, first, "base")
        with anyio.fail_after(WAIT_S_MAX):
            landed = await ensure(store, second, "tune")
        assert area_bytes(landed, "model.safetensors") == (tune / "model.safetensors").read_bytes()


async def test_a_pool_that_cannot_grow_ends_no_load(
    tmp_path: Path, source: Path, origin: CountingOrigin, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = threading.Event()

    def no_memory(pool: SlabPool, size: int) -> None:
        tried.set()
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(SlabPool, "grow", no_memory)
    digest = push(source, origin).artefact.manifest
    async with open_store(settings_for(tmp_path / "cache", pool_bytes=2 << 20), origin=origin) as store:
        assert await anyio.to_thread.run_sync(tried.wait, WAIT_S_MAX)
        assert area_bytes(await ensure(store, digest), "model.safetensors")


class Silent(CountingOrigin):
    """Answers nothing any more once `is_silent`, until a read is given up."""

    is_silent = False

    def read_range(self, key: str, offset: int, into: memoryview) -> None:
        while self.is_silent:
            if cancelled():
                raise ReadCancelledError("given up", where=key)
            time.sleep(0.001)
        super().read_range(key, offset, into)


@pytest.mark.parametrize("what", ["manifests", "packs"])
async def test_an_origin_that_does_not_answer_holds_up_nothing_that_is_on_the_node(
    tmp_path: Path, what: str
) -> None:
    origin, cache = Silent(), tmp_path / "cache"
    count = THREADS_OF_THE_LOOP + 1 if what == "manifests" else 1
    digests: list[Digest] = []
    for seed in range(count + 1):
        root = tmp_path / f"m{seed}"
        root.mkdir()
        (root / "model.safetensors").write_bytes(safetensors_bytes({"t": ("U8", [1000], noise(1000, seed))}))
        digests.append(push(root, origin).artefact.manifest)
    here, *others = digests
    await landed_once(cache, here, origin)
    async with open_store(settings_for(cache, fetch_threads=1), origin=origin) as store:
        if what == "packs":
            await store.ensure(DEFAULT_TENANT, others[0], "first", map_tensors=False, lazy=True)
        origin.is_silent = True
        async with anyio.create_task_group() as tasks:
            for other in others:
                tasks.start_soon(ensure, store, other, f"h{other}")
            await anyio.wait_all_tasks_blocked()
            with anyio.fail_after(WAIT_S_MAX):
                await ensure(store, here)
            tasks.cancel_scope.cancel()


async def test_an_artefact_is_only_found_in_its_own_key_domain(
    tmp_path: Path, source: Path, origin: CountingOrigin
) -> None:
    folder = tmp_path / "keys"
    domain = key_domain(tenant_key(folder, DEFAULT_TENANT))
    options = PushOptions(hasher=load_keyring(folder).hasher(domain))
    pushed = push_source(DirectorySource(source, ignored=()), origin, options)
    settings = msgspec.structs.replace(settings_for(tmp_path / "cache"), keys_directory=str(folder))
    digest = pushed.artefact.manifest
    for _ in ("here", "on the disk"):
        async with open_store(settings, origin=origin) as store:
            with pytest.raises(NotFoundError):
                await store.ensure(DEFAULT_TENANT, digest, "other", map_tensors=False)
            await store.ensure(DEFAULT_TENANT, digest, "own", map_tensors=False, key_domain=domain)
            with pytest.raises(NotFoundError):
                await store.ensure(DEFAULT_TENANT, digest, "other", map_tensors=False)


async def test_a_redeploy_of_code_and_a_second_replica_take_no_byte_of_the_model(
    tmp_path: Path, source: Path, origin: CountingOrigin
) -> None:
    digest = push(source, origin).artefact.manifest
    codes = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "service.py").write_text(f"# {name}")
        codes.append(push(tmp_path / name, origin).artefact.manifest)
    async with open_store(settings_for(tmp_path / "cache"), origin=origin) as store:
        first = await ensure(store, digest, "rep-1")
        await ensure(store, codes[0], "rep-1", map_tensors=False)
        before, used = origin.pack_bytes_read, store.ram_bytes
        for holder, code in (("rep-2", codes[0]), ("rep-3", codes[1])):
            again = await ensure(store, digest, holder)
            await ensure(store, code, holder, map_tensors=False)
            assert again.content.origin == 0
            assert again.area is first.area
        assert store.ram_bytes == used, "no second copy in memory"
        assert origin.pack_bytes_read == before + len("# two")


class Slow(CountingOrigin):
    """Each read of a pack waits for a turn; all are let through once `turns` is None."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[int] = []
        self.turns: threading.Semaphore | None = threading.Semaphore(0)
        self.asked = threading.Semaphore(0)

    def read_range(self, key: str, offset: int, into: memoryview) -> None:
        if "/packs/" in key:
            self.reads.append(len(into))
            self.asked.release()
            if self.turns is not None:
                assert self.turns.acquire(timeout=WAIT_S_MAX)
        super().read_range(key, offset, into)

    async def was_asked(self) -> None:
        assert await anyio.to_thread.run_sync(lambda: self.asked.acquire(timeout=WAIT_S_MAX))

    def let_all(self) -> None:
        turns, self.turns = self.turns, None
        if turns is not None:
            turns.release(100)


def write_parts(root: Path, count: int = 10) -> Path:
    """One file of `count` tensors of 4 MiB: a chunk each, after that of the header."""
    root.mkdir()
    tensors = {f"t{index}": ("U8", [4 << 20], noise(4 << 20, index)) for index in range(count)}
    (root / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    return root


async def test_a_released_holder_stops_the_reads_and_the_next_one_goes_on(tmp_path: Path) -> None:
    origin, source = Slow(), write_parts(tmp_path / "m")
    digest = push(source, origin).artefact.manifest
    settings = settings_for(tmp_path / "cache", fetch_threads=1)
    async with open_store(settings, origin=origin) as store:
        landed = await store.ensure(DEFAULT_TENANT, digest, "h", map_tensors=True)
        assert landed.wake is not None
        await origin.was_asked()
        store.release("h")
        origin.let_all()
        assert landed.wake.recv(1) in {b"", b"\0"}, "one run was under way and ended, or the reader is let go"
        landed.wake.close()
        await store.wait_quiet()
        assert len(origin.reads) == 1
        brought = origin.pack_bytes_read
        again = await ensure(store, digest)
        assert again.area is landed.area
        assert again.content.ram == brought
        assert origin.pack_bytes_read == again.content.total
        assert area_bytes(again, "model.safetensors") == (source / "model.safetensors").read_bytes()


async def test_a_cancelled_ensure_leaves_nothing_pinned_and_reads_no_more(tmp_path: Path) -> None:
    origin, source = Slow(), write_parts(tmp_path / "m")
    (source / "config.json").write_bytes(noise(1 << 20, 99))
    digest = push(source, origin).artefact.manifest
    settings = settings_for(tmp_path / "cache", fetch_threads=1)
    async with open_store(settings, origin=origin) as store:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ensure, store, digest)
            await origin.was_asked()
            tasks.cancel_scope.cancel()
        origin.let_all()
        await store.wait_quiet()
        assert len(origin.reads) == 1
        with pytest.raises(NotFoundError):
            await store.wait_filled(digest, "h")
        assert (await ensure(store, digest)).content.origin > 0


async def test_an_answer_comes_before_the_bytes_and_a_reader_gets_what_it_asks_for_first(tmp_path: Path) -> None:
    origin, source = Slow(), write_parts(tmp_path / "m")
    digest = push(source, origin).artefact.manifest
    settings = settings_for(tmp_path / "cache", fetch_threads=1)
    weights = (source / "model.safetensors").read_bytes()
    async with open_store(settings, origin=origin) as store:
        landed = await store.ensure(DEFAULT_TENANT, digest, "h", map_tensors=True)
        assert landed.area is not None
        assert landed.wake is not None
        reader = ProgressReader(landed.area.progress.fileno(), landed.wake)
        await origin.was_asked()
        last = len(weights) - 100

        def read_last() -> bytes:
            reader.wait(last, 100, WAIT_S_MAX)
            assert landed.area is not None
            return bytes(landed.area.window(last, 100))

        order = store._artefacts[digest].fill._order
        wanted = len(store.manifest(digest).chunks) - 1
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(let_on_once, origin, lambda: order.is_wanted(wanted))
            assert await anyio.to_thread.run_sync(read_last) == weights[-100:]
        assert len(origin.reads) <= 3
        assert not reader.is_filled(20 << 20, 1)
        origin.let_all()
        await anyio.to_thread.run_sync(reader.wait_all, WAIT_S_MAX)
        reader.close()


async def let_on_once(origin: Slow, is_heard: Callable[[], bool]) -> None:
    """The read that is under way and the next, once the want has been heard."""
    with anyio.fail_after(WAIT_S_MAX):
        while not is_heard():
            await anyio.sleep(0.001)
    assert origin.turns is not None
    origin.turns.release(2)


async def test_a_lazy_load_reads_the_header_and_what_is_wanted(tmp_path: Path, origin: CountingOrigin) -> None:
    source = write_parts(tmp_path / "m")
    digest = push(source, origin).artefact.manifest
    weights = (source / "model.safetensors").read_bytes()
    async with open_store(settings_for(tmp_path / "cache"), origin=origin) as store:
        landed = await store.ensure(DEFAULT_TENANT, digest, "h", map_tensors=True, lazy=True)
        assert landed.area is not None
        assert landed.wake is not None
        reader = ProgressReader(landed.area.progress.fileno(), landed.wake)
        await anyio.to_thread.run_sync(reader.wait, 0, 8, WAIT_S_MAX)
        await anyio.to_thread.run_sync(reader.wait, 13 << 20, 100, WAIT_S_MAX)
        assert origin.pack_bytes_read < 9 << 20
        assert bytes(landed.area.window(13 << 20, 100)) == weights[13 << 20 :][:100]
        assert (await store.wait_filled(digest, "h")).content.origin == origin.pack_bytes_read
        whole = await ensure(store, digest, "other")
        assert area_bytes(whole, "model.safetensors") == weights
        assert origin.pack_bytes_read == len(weights)
        reader.close()


async def test_readers_of_one_area_share_every_chunk(tmp_path: Path) -> None:
    origin, source = Slow(), write_parts(tmp_path / "m")
    digest = push(source, origin).artefact.manifest
    async with open_store(settings_for(tmp_path / "cache"), origin=origin) as store:
        async with anyio.create_task_group() as tasks:
            for holder in ("a", "b", "c"):
                tasks.start_soon(ensure, store, digest, holder)
            await origin.was_asked()
            origin.let_all()
        assert origin.pack_bytes_read == sum(origin.reads) == (source / "model.safetensors").stat().st_size


async def test_wrong_bytes_that_come_right_the_second_time_are_fetched_again(
    tmp_path: Path, source: Path, origin: CountingOrigin, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = push(source, origin).artefact.manifest
    damaged = iter([True, True])

    def read_range(key: str, offset: int, into: memoryview) -> None:
        CountingOrigin.read_range(origin, key, offset, into)
        if "/packs/" in key and len(into) >= 4 << 20 and next(damaged, False):
            into[len(into) // 2] ^= 1

    monkeypatch.setattr(origin, "read_range", read_range)
    async with open_store(settings_for(tmp_path / "cache"), origin=origin) as store:
        landed = await ensure(store, digest)
        assert area_bytes(landed, "model.safetensors") == (source / "model.safetensors").read_bytes()
    assert next(damaged, None) is None


async def test_a_stretch_of_a_file_is_brought_to_the_disk_or_past_it(
    tmp_path: Path, source: Path, origin: CountingOrigin
) -> None:
    digest = push(source, origin).artefact.manifest
    weights = (source / "model.safetensors").read_bytes()
    io = FullDisk(200_000)
    disk = DiskTier(tmp_path / "cache", 64 << 20, io)
    async with open_store(settings_for(tmp_path / "cache"), origin=origin, disk=disk) as store:
        with pytest.raises(NotFoundError):
            await store.read_file(digest, 0, 0, 1)
        landed = await store.ensure(DEFAULT_TENANT, digest, "h", map_tensors=False, lazy=True)
        paths = [entry.path for entry in store.manifest(digest).files]
        index = paths.index("model.safetensors")
        assert await store.read_file(digest, index, 1 << 20, 1000) == weights[1 << 20 :][:1000]
        io.free_bytes = 1 << 30
        assert await store.read_file(digest, index, 4 << 20, 2000) is None
        partial = landed.directory.parent / "partial/model.safetensors"
        assert partial.read_bytes()[4 << 20 :][:2000] == weights[4 << 20 :][:2000]
        for file, offset, length in ((99, 0, 1), (index, len(weights), 1), (index, -1, 1)):
            with pytest.raises(NotFoundError):
                await store.read_file(digest, file, offset, length)


async def test_what_a_mount_read_is_not_read_from_the_origin_after_a_restart(
    tmp_path: Path, source: Path, origin: CountingOrigin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snowdrop.content.completing.KEEP_S", 0)
    digest = push(source, origin).artefact.manifest
    weights = (source / "model.safetensors").read_bytes()
    for _ in range(2):
        async with open_store(settings_for(tmp_path / "cache"), origin=origin) as store:
            await store.ensure(DEFAULT_TENANT, digest, "mount", map_tensors=False, lazy=True)
            index = [entry.path for entry in store.manifest(digest).files].index("model.safetensors")
            assert await store.read_file(digest, index, 0, len(weights)) is None
            landing = store.landing_of(digest)
            with anyio.fail_after(WAIT_S_MAX):
                while not landing.is_complete:  # durable without anybody asking for the whole directory
                    await anyio.sleep(0)
        origin.objects.clear()  # neither is its manifest


async def test_what_a_mount_read_last_is_durable_at_the_end(
    tmp_path: Path, source: Path, origin: CountingOrigin
) -> None:
    digest = push(source, origin).artefact.manifest
    async with open_store(settings_for(tmp_path / "cache"), origin=origin) as store:
        await store.ensure(DEFAULT_TENANT, digest, "mount", map_tensors=False, lazy=True)
    read = origin.pack_bytes_read
    async with open_store(settings_for(tmp_path / "cache"), origin=origin) as store:
        landed = await store.ensure(DEFAULT_TENANT, digest, "mount", map_tensors=False, lazy=True)
    assert origin.pack_bytes_read == read > 0
    assert landed.content.disk == landed.content.total


async def test_a_cache_directory_serves_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snowdrop.content.disk.LOCK_S_MAX", 0)
    async with open_store(settings_for(tmp_path / "cache"), origin=CountingOrigin()):
        with pytest.raises(ConflictError):
            DiskTier(tmp_path / "cache", 1).open()


async def test_a_wait_for_an_area_ends_when_its_holder_is_released(tmp_path: Path) -> None:
    origin, source = Slow(), write_parts(tmp_path / "m")
    digest = push(source, origin).artefact.manifest
    ended: list[str] = []

    async def wait(holder: str) -> None:
        try:
            await store.wait_filled(digest, holder)
            ended.append(f"{holder} filled")
        except ReadCancelledError:
            ended.append(f"{holder} released")

    async with open_store(settings_for(tmp_path / "cache"), origin=origin) as store:
        for holder in ("a", "b"):
            landed = await store.ensure(DEFAULT_TENANT, digest, holder, map_tensors=True)
            assert landed.wake is not None
            landed.wake.close()
        await origin.was_asked()
        with anyio.fail_after(WAIT_S_MAX):
            async with anyio.create_task_group() as tasks:
                for holder in ("a", "b"):
                    tasks.start_soon(wait, holder)
                await anyio.wait_all_tasks_blocked()
                store.release("a")
                while not ended:
                    await anyio.sleep(0.01)
                assert ended == ["a released"]
                origin.let_all()
        assert ended == ["a released", "b filled"]


async def test_a_read_past_a_full_disk_takes_no_thread_of_the_loop_and_ends_when_it_is_cancelled(
    tmp_path: Path,
) -> None:
    origin, source = Slow(), write_parts(tmp_path / "m")
    digest = push(source, origin).artefact.manifest
    disk = DiskTier(tmp_path / "cache", 64 << 20, FullDisk(200_000))
    given_up: list[bool] = []

    def read_range(key: str, offset: int, into: memoryview) -> None:
        flag = CANCEL_FLAG.get()
        Slow.read_range(origin, key, offset, into)
        given_up.append(flag is not None and flag.is_set())

    async with open_store(settings_for(tmp_path / "cache"), origin=origin, disk=disk) as store:
        await store.ensure(DEFAULT_TENANT, digest, "h", map_tensors=False, lazy=True)
        artefact = store.parts.artefacts[digest]
        artefact.has_room = False
        origin.read_range = read_range  # type: ignore[method-assign]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(store.read_file, digest, 0, 1 << 20, 1000)
            await origin.was_asked()
            with anyio.fail_after(WAIT_S_MAX / 2):  # the store's own short calls come and go
                while anyio.to_thread.current_default_thread_limiter().borrowed_tokens:
                    await anyio.sleep(0.001)
            tasks.cancel_scope.cancel()
        origin.let_all()
        with anyio.fail_after(WAIT_S_MAX):
            while not given_up:
                await anyio.sleep(0.01)
    assert given_up == [True]

from pathlib import Path

import anyio
import pytest

from content_helpers import CountingOrigin, files_of, push, settings_for, write_model
from snowdrop.content.disk import DiskTier
from snowdrop.content.mending import make_scrubber
from snowdrop.content.store import ContentStore, open_store
from snowdrop.domain.ids import DEFAULT_TENANT, Digest

pytestmark = pytest.mark.anyio
WAIT_S_MAX = 20.0


@pytest.fixture
def origin() -> CountingOrigin:
    return CountingOrigin()


async def bring(store: ContentStore, digest: Digest) -> Path:
    landed = await store.ensure(DEFAULT_TENANT, digest, "h", map_tensors=False)
    await store.wait_directory(digest)
    return landed.directory


def damage(path: Path, at: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)
        stream.seek(at)
        stream.write(bytes([byte[0] ^ 4]))


@pytest.mark.parametrize("boot", ["a boot", "another boot"])
async def test_a_running_store_finds_bit_rot_and_mends_it_from_the_origin(
    tmp_path: Path, origin: CountingOrigin, boot: str
) -> None:
    """Nobody asks for the artefact: the scrubber alone finds what is wrong, and brings that much and no more."""
    source = write_model(tmp_path / "model")
    digest = push(source, origin).artefact.manifest
    cache = tmp_path / "cache"
    disk = DiskTier(cache, 64 << 20, boot_id="a boot")
    async with open_store(settings_for(cache), origin=origin, disk=disk) as store:
        tree = await bring(store, digest)
    damage(tree / "model.safetensors", 1 << 20)
    before = origin.pack_bytes_read
    disk = DiskTier(cache, 64 << 20, boot_id=boot)
    settings = settings_for(cache, scrub_bytes_per_s=1 << 40)
    async with open_store(settings, origin=origin, disk=disk):
        with anyio.fail_after(WAIT_S_MAX):
            while not disk.scrub_times()[digest]:
                await anyio.sleep(0.01)
        assert files_of(tree) == files_of(source)
        assert disk.events.counts == {"quarantined": 1, "replaced": 1}
        assert {event.seen_by for event in disk.events.recent()} == {"scrub"}
        assert 0 < origin.pack_bytes_read - before <= 4 << 20
        landing = disk.known_landing(digest)
        assert landing is not None
        assert landing.is_complete


async def test_without_the_origin_the_wrong_chunk_is_not_served_and_the_run_goes_on(
    tmp_path: Path, origin: CountingOrigin
) -> None:
    source = write_model(tmp_path / "model")
    digest = push(source, origin).artefact.manifest
    cache = tmp_path / "cache"
    async with open_store(settings_for(cache), origin=origin) as store:
        tree = await bring(store, digest)
    damage(tree / "nested/vocab.txt", 5)
    objects = dict(origin.objects)
    origin.objects.clear()
    disk = DiskTier(cache, 64 << 20)
    async with open_store(settings_for(cache, scrub_bytes_per_s=1 << 40), origin=origin, disk=disk) as store:
        with anyio.fail_after(WAIT_S_MAX):
            while not disk.scrub_times()[digest]:
                await anyio.sleep(0.01)
        assert not (tree / "nested/vocab.txt").exists()
        assert disk.events.counts == {"quarantined": 1, "replaced": 0}
        origin.objects.update(objects)
        await bring(store, digest)
        assert files_of(tree) == files_of(source)
        assert disk.events.counts == {"quarantined": 1, "replaced": 1}


async def test_what_memory_still_has_is_mended_from_there(tmp_path: Path, origin: CountingOrigin) -> None:
    source = write_model(tmp_path / "model")
    digest = push(source, origin).artefact.manifest
    cache = tmp_path / "cache"
    disk = DiskTier(cache, 64 << 20)
    async with open_store(settings_for(cache), origin=origin, disk=disk) as store:
        landed = await store.ensure(DEFAULT_TENANT, digest, "h", map_tensors=True)
        assert landed.wake is not None
        landed.wake.close()
        await store.wait_directory(digest)
        damage(landed.directory / "model.safetensors", 1 << 20)
        brought = origin.pack_bytes_read
        done = await make_scrubber(store.parts, origin, 0).scrub(digest)
        assert len(done.bad) == 1
        assert origin.pack_bytes_read == brought
        assert files_of(landed.directory) == files_of(source)
        store.release("h")

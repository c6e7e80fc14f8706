"""What a mount's content must do, for the fake and for the store's; and what only the latter does."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from content_helpers import noise, push
from fuse_helpers import DictSource
from snowdrop.content.diskio import DiskIo
from snowdrop.content.fuse.source import FileSource
from snowdrop.content.fuse.stored import StoredFiles
from snowdrop.content.landing import Landing
from snowdrop.content.layout import PUBLIC_DOMAIN, manifest_key
from snowdrop.content.manifest import decode_manifest
from snowdrop.content.origin import MemoryOrigin
from snowdrop.content.placement import stretch_chunks
from snowdrop.content.source import PackSource
from snowdrop.domain.errors import UnavailableError
from snowdrop.domain.ids import Digest

pytestmark = pytest.mark.anyio

FILES = {"a.gguf": noise(24 << 20, 1), "b/config.json": b"{}", "empty": b""}
MIB = 1 << 20


class PackStore:
    """A store whose disk may have no room; what is asked of it is kept."""

    def __init__(self, landing: Landing, packs: PackSource) -> None:
        self.landing, self.packs = landing, packs
        self.has_room = True
        self.asked: list[tuple[int, int, int]] = []

    async def read_file(self, digest: Digest, file: int, offset: int, length: int) -> bytes | None:
        self.asked.append((file, offset, length))
        entry = self.landing.manifest.files[file]
        content = bytearray(entry.size)
        for chunk in stretch_chunks(entry.extents, offset, length):
            data = memoryview(bytearray(self.landing.manifest.chunks[chunk].plain_bytes))
            self.packs.read(chunk, 1, data)
            if self.has_room:
                self.landing.write(chunk, data)
            else:
                extent = next(extent for extent in entry.extents if extent.chunk == chunk)
                content[extent.file_offset : extent.file_offset + extent.length] = data
        return None if self.has_room else bytes(content[offset : offset + length])


@asynccontextmanager
async def stored(tmp_path: Path) -> AsyncIterator[tuple[StoredFiles, PackStore]]:
    for name, content in FILES.items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_bytes(content)
    origin = MemoryOrigin()
    digest = push(tmp_path / "model", origin).artefact.manifest
    manifest = decode_manifest(origin.objects[manifest_key(PUBLIC_DOMAIN, digest)], expected=digest)
    (tmp_path / "landing").mkdir()
    landing = Landing(tmp_path / "landing", manifest, DiskIo())
    landing.open()
    store = PackStore(landing, PackSource(origin, manifest))
    async with anyio.create_task_group() as tasks:
        source = StoredFiles(store, digest, landing, tasks)
        try:
            yield source, store
        finally:
            source.close()
            landing.close()


@asynccontextmanager
async def opened(kind: str, tmp_path: Path) -> AsyncIterator[tuple[FileSource, list[str]]]:
    """A source and the names of its files by index."""
    if kind == "fake":
        yield DictSource(FILES), list(FILES)
        return
    async with stored(tmp_path) as (source, store):
        yield source, [entry.path for entry in store.landing.manifest.files]


@pytest.mark.parametrize("kind", ["fake", "stored"])
async def test_bytes_are_there_once_they_were_brought(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path) as (source, names):
        file = names.index("a.gguf")
        content = FILES["a.gguf"]
        for offset, length in ((5, 10), (17 * MIB, MIB + 3), (len(content) - 7, 7)):
            into = memoryview(bytearray(length))
            assert not await anyio.to_thread.run_sync(source.read, file, offset, into)
            assert not any(into), "nothing is written where nothing is there"
            assert await source.bring(file, offset, length) is None
            assert await anyio.to_thread.run_sync(source.read, file, offset, into)
            assert into == content[offset : offset + length]
        assert source.read(names.index("empty"), 0, memoryview(bytearray()))


def stretch(source: StoredFiles, file: int, offset: int, length: int) -> bytes | None:
    into = bytearray(length)
    return bytes(into) if source.read(file, offset, memoryview(into)) else None


async def test_a_file_may_be_read_by_the_kernel_when_all_of_it_is_there(tmp_path: Path) -> None:
    async with stored(tmp_path) as (source, store):
        file = [entry.path for entry in store.landing.manifest.files].index("a.gguf")
        assert source.backing(file) is None
        for at in range(20 * MIB, -1, -4 * MIB):  # backwards, so that nothing is fetched ahead
            assert source.backing(file) is None
            await source.bring(file, at, 4 * MIB)
        fd = source.backing(file)
        assert fd is not None
        try:
            assert os.pread(fd, len(FILES["a.gguf"]), 0) == FILES["a.gguf"]
        finally:
            os.close(fd)
        # Found wrong by somebody: it is neither served nor given away until it was replaced.
        wrong = store.landing.manifest.files[file].extents[2].chunk
        store.landing.quarantine(wrong)
        assert source.backing(file) is None
        assert stretch(source, file, 8 * MIB, MIB) is None
        assert stretch(source, file, 4 * MIB, MIB) == FILES["a.gguf"][4 * MIB : 5 * MIB]
        await source.bring(file, 8 * MIB, MIB)
        assert stretch(source, file, 8 * MIB, MIB) == FILES["a.gguf"][8 * MIB : 9 * MIB]


async def test_who_goes_through_a_file_finds_the_next_bytes_fetched(tmp_path: Path) -> None:
    async with stored(tmp_path) as (source, store):
        file = [entry.path for entry in store.landing.manifest.files].index("a.gguf")
        for offset in (0, 2 * MIB, 4 * MIB):
            if stretch(source, file, offset, 2 * MIB) is None:
                await source.bring(file, offset, 2 * MIB)
        await anyio.wait_all_tasks_blocked()
        assert any(offset > 4 * MIB for _, offset, _ in store.asked)
        assert stretch(source, file, 8 * MIB, 2 * MIB) is not None


async def test_without_room_chunks_are_fetched_once_for_the_reads_in_them(tmp_path: Path) -> None:
    async with stored(tmp_path) as (source, store):
        store.has_room = False
        file = [entry.path for entry in store.landing.manifest.files].index("a.gguf")
        for offset in range(0, 12 * MIB, MIB):
            assert await source.bring(file, offset, MIB + 1) == FILES["a.gguf"][offset : offset + MIB + 1]
        assert len(store.asked) <= 1 + 4
        store.has_room = True
        assert await source.bring(file, 20 * MIB, MIB) is None
        assert stretch(source, file, 20 * MIB, MIB) == FILES["a.gguf"][20 * MIB : 21 * MIB]


async def test_trouble_with_the_disk_has_its_own_error(tmp_path: Path) -> None:
    async with stored(tmp_path) as (source, store):
        file = [entry.path for entry in store.landing.manifest.files].index("a.gguf")
        await source.bring(file, 0, MIB)
        (tmp_path / "landing/partial/a.gguf").unlink()
        with pytest.raises(UnavailableError):
            stretch(source, file, 0, MIB)


async def test_a_fault_while_fetching_ahead_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with stored(tmp_path) as (source, store):
        file = [entry.path for entry in store.landing.manifest.files].index("a.gguf")
        read_file = store.read_file

        async def faulty(digest: Digest, file: int, offset: int, length: int) -> bytes | None:
            if length > MIB:
                raise ValueError("a fault of ours")
            return await read_file(digest, file, offset, length)

        store.read_file = faulty  # type: ignore[method-assign]
        for offset in range(0, 8 * MIB, MIB):
            await source.bring(file, offset, MIB)
        assert await anyio.to_thread.run_sync(source.read, file, 0, memoryview(bytearray(MIB)))
    assert "a fault of ours" in caplog.text

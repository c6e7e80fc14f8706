from collections.abc import Iterator
from pathlib import Path

import pytest

from content_helpers import noise, push, safetensors_bytes, small_pool
from snowdrop.content.area import Area
from snowdrop.content.disk import DiskTier
from snowdrop.content.diskio import DiskIo
from snowdrop.content.landing import Landing
from snowdrop.content.layout import PUBLIC_DOMAIN, manifest_key
from snowdrop.content.manifest import decode_manifest
from snowdrop.content.origin import MemoryOrigin
from snowdrop.content.placement import area_layout
from snowdrop.content.siblings import AreaSiblings, DiskSiblings
from snowdrop.content.source import ChunkSource, PackSource, bad_chunks
from snowdrop.domain.errors import SnowdropError
from snowdrop.domain.ids import Digest
from snowdrop.domain.manifest import Manifest

OTHER = Digest("blake3:" + "e" * 64)


class MemorySource:
    """The fake: chunks in a dict."""

    tier = "peer"

    def __init__(self, manifest: Manifest, chunks: dict[int, bytes]) -> None:
        self._manifest = manifest
        self._chunks = chunks

    def holds(self, chunk: int) -> bool:
        return chunk in self._chunks

    def read(self, first: int, count: int, into: memoryview) -> None:
        into[:] = b"".join(self._chunks[chunk] for chunk in range(first, first + count))

    def quarantine(self, chunk: int) -> None:
        self._chunks.pop(chunk, None)


@pytest.fixture
def packs(pushed: tuple[MemoryOrigin, str]) -> PackSource:
    origin, digest = pushed
    data = origin.objects[manifest_key(PUBLIC_DOMAIN, digest)]
    return PackSource(origin, decode_manifest(data))


@pytest.fixture
def pushed(tmp_path: Path) -> tuple[MemoryOrigin, str]:
    source = tmp_path / "source"
    source.mkdir()
    for shard in range(2):
        tensors = {
            f"t{shard}{part}": ("U8", [size], noise(size, shard * 9 + part))
            for part, size in enumerate((9 << 20, 300_000))
        }
        (source / f"m-{shard}.safetensors").write_bytes(safetensors_bytes(tensors))
    origin = MemoryOrigin()
    return origin, push(source, origin).artefact.manifest


@pytest.fixture
def manifest(pushed: tuple[MemoryOrigin, str]) -> Manifest:
    origin, digest = pushed
    return decode_manifest(origin.objects[manifest_key(PUBLIC_DOMAIN, digest)])


def chunks_of(manifest: Manifest, packs: PackSource) -> dict[int, bytes]:
    chunks = {}
    for index, chunk in enumerate(manifest.chunks):
        data = bytearray(chunk.plain_bytes)
        packs.read(index, 1, memoryview(data))
        chunks[index] = bytes(data)
    return chunks


class SourceContract:
    """What every ChunkSource does once it holds all chunks of `manifest`."""

    def test_every_chunk_and_every_run_of_chunks_is_right(self, source: ChunkSource, manifest: Manifest) -> None:
        total = len(manifest.chunks)
        for first, count in [(0, total), *((index, 1) for index in range(total)), (1, total - 2)]:
            size = sum(chunk.plain_bytes for chunk in manifest.chunks[first : first + count])
            data = bytearray(size)
            assert all(source.holds(chunk) for chunk in range(first, first + count))
            source.read(first, count, memoryview(data))
            assert bad_chunks(manifest, first, count, memoryview(data)) == []

    def test_a_quarantined_chunk_is_not_held_and_its_neighbours_are(self, source: ChunkSource) -> None:
        source.quarantine(1)
        source.quarantine(1)
        assert [source.holds(chunk) for chunk in range(3)] == [True, False, True]

    def test_its_tier_is_a_known_one(self, source: ChunkSource) -> None:
        assert source.tier in {"ram", "disk", "peer", "origin"}


class TestPackSource(SourceContract):
    @pytest.fixture
    def source(self, packs: PackSource) -> ChunkSource:
        return packs


class TestMemorySource(SourceContract):
    @pytest.fixture
    def source(self, packs: PackSource, manifest: Manifest) -> ChunkSource:
        return MemorySource(manifest, chunks_of(manifest, packs))


class TestLanding(SourceContract):
    @pytest.fixture
    def source(self, tmp_path: Path, packs: PackSource, manifest: Manifest) -> ChunkSource:
        landing = Landing(tmp_path / "landing", manifest, DiskIo())
        landing.directory.mkdir()
        landing.open()
        for chunk, data in chunks_of(manifest, packs).items():
            landing.write(chunk, memoryview(data))
        return landing


class TestArea(SourceContract):
    @pytest.fixture
    def source(self, packs: PackSource, manifest: Manifest) -> Iterator[ChunkSource]:
        area = Area(manifest, area_layout(manifest), small_pool())
        for chunk, data in chunks_of(manifest, packs).items():
            area.scatter(chunk, memoryview(data))
            area.mark(chunk)
        yield area
        area.close()


class TestAreaSiblings(SourceContract):
    """Another artefact's area, as a source of the same chunks."""

    @pytest.fixture
    def source(self, packs: PackSource, manifest: Manifest) -> Iterator[ChunkSource]:
        area = Area(manifest, area_layout(manifest), small_pool())
        for chunk, data in chunks_of(manifest, packs).items():
            area.scatter(chunk, memoryview(data))
            area.mark(chunk)
        yield AreaSiblings(manifest, lambda: (area,))
        area.close()

    def test_an_area_that_goes_away_is_an_error_and_not_held(self, packs: PackSource, manifest: Manifest) -> None:
        area = Area(manifest, area_layout(manifest), small_pool())
        area.mark(0)
        source = AreaSiblings(manifest, lambda: (area,))
        assert source.holds(0)
        area.close()
        assert not source.holds(0)
        with pytest.raises(SnowdropError):
            source.read(0, 1, memoryview(bytearray(manifest.chunks[0].plain_bytes)))


class TestDiskSiblings(SourceContract):
    """Another artefact's landing directory, as a source of the same chunks."""

    @pytest.fixture
    def disk(self, tmp_path: Path, packs: PackSource, manifest: Manifest) -> Iterator[DiskTier]:
        disk = DiskTier(tmp_path / "cache", 1 << 30)
        disk.open()
        disk.reserve(OTHER, manifest, set())
        landing = disk.open_landing(OTHER, manifest)
        for chunk, data in chunks_of(manifest, packs).items():
            landing.write(chunk, memoryview(data))
        yield disk
        disk.close()

    @pytest.fixture
    def source(self, tmp_path: Path, disk: DiskTier, manifest: Manifest) -> ChunkSource:
        own = Landing(tmp_path / "own", manifest, DiskIo())
        source = DiskSiblings(manifest)
        source.look(disk, range(len(manifest.chunks)), own)
        return source

    def test_only_bytes_that_were_read_and_wrong_are_told_to_their_directory(
        self, source: ChunkSource, disk: DiskTier, manifest: Manifest
    ) -> None:
        landing = disk.open_landing(OTHER, manifest)
        source.quarantine(0)
        assert landing.holds(0)
        source.read(1, 1, memoryview(bytearray(manifest.chunks[1].plain_bytes)))
        source.quarantine(1)
        assert not landing.holds(1)

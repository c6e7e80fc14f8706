from collections.abc import Iterator
from pathlib import Path

import pytest

from content_helpers import noise, push, safetensors_bytes, small_pool
from snowdrop.content.area import Area
from snowdrop.content.diskio import DiskIo
from snowdrop.content.landing import Landing
from snowdrop.content.layout import PUBLIC_DOMAIN, manifest_key
from snowdrop.content.manifest import decode_manifest
from snowdrop.content.origin import MemoryOrigin
from snowdrop.content.placement import area_layout
from snowdrop.content.source import ChunkSource, PackSource, bad_chunks
from snowdrop.domain.manifest import Manifest


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

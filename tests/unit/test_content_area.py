import fcntl
import mmap
import os
from collections.abc import Iterator

import pytest

from content_helpers import small_pool
from snowdrop.content.area import Area, RamTier
from snowdrop.content.placement import AREA_ALIGNMENT, area_layout
from snowdrop.domain.errors import ConflictError, StorageFullError
from snowdrop.domain.ids import Digest
from snowdrop.domain.manifest import ChunkRef, Extent, FileEntry, Manifest, PackRef, TensorEntry

HEX = "0" * 64


def manifest_of(sizes: list[int]) -> Manifest:
    """One tensor file of one chunk per size; the last file repeats chunk 0."""
    files = []
    for index, chunk in enumerate([*range(len(sizes)), 0]):
        size = sizes[chunk]
        tensor = TensorEntry(name="t", dtype="U8", shape=(size,), offset=0, length=size)
        files.append(
            FileEntry(
                path=f"{index}",
                size=size,
                mode=0o644,
                sha256=HEX,
                extents=(Extent(0, size, chunk, 0),),
                tensors=(tensor,),
            )
        )
    chunks = tuple(ChunkRef(HEX, size, 0, sum(sizes[:index]), size) for index, size in enumerate(sizes))
    return Manifest(
        version=2,
        kind="model",
        key_domain="public",
        files=tuple(files),
        chunks=chunks,
        packs=(PackRef(HEX, sum(sizes)),),
    )


@pytest.fixture
def area() -> Iterator[Area]:
    manifest = manifest_of([100])
    area = Area(manifest, area_layout(manifest), small_pool())
    area.scatter(0, memoryview(b"a" * 100))
    yield area
    area.close()


def test_files_are_aligned_and_a_repeated_chunk_is_in_both_places(area: Area) -> None:
    assert [file.offset for file in area.layout.files] == [0, AREA_ALIGNMENT]
    assert bytes(area.window(AREA_ALIGNMENT, 100)) == b"a" * 100


def test_whoever_gets_the_descriptor_can_neither_write_nor_resize(area: Area) -> None:
    fd = os.dup(area.slabs[0].fd)
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(fd, area.slabs[0].size)
        for attempt in (
            lambda: os.pwrite(fd, b"x", 0),
            lambda: os.ftruncate(fd, 1),
            lambda: os.ftruncate(fd, 1 << 20),
            lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
        ):
            with pytest.raises(PermissionError):
                attempt()
        reopened = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        try:
            with pytest.raises(PermissionError):
                os.pwrite(reopened, b"x", 0)
        finally:
            os.close(reopened)
    finally:
        os.close(fd)
    assert bytes(area.window(0, 3)) == b"aaa"


def test_a_private_mapping_writes_to_a_copy(area: Area) -> None:
    with mmap.mmap(area.slabs[0].fd, 0, access=mmap.ACCESS_COPY) as private:
        private[0:3] = b"xyz"
        assert bytes(area.window(0, 3)) == b"aaa"


def test_a_closed_area_gives_its_slabs_back_and_they_are_zeroed_before_they_are_used_again() -> None:
    pool, manifest = small_pool(), manifest_of([100])
    area = Area(manifest, area_layout(manifest), pool)
    area.scatter(0, memoryview(b"b" * 100))
    fd = os.dup(area.slabs[0].fd)
    area.close()
    again = Area(manifest, area_layout(manifest), pool)
    assert os.fstat(again.slabs[0].fd).st_ino == os.fstat(fd).st_ino, "this test is about a slab that is reused"
    assert os.pread(fd, 100, 0) == bytes(100)
    os.close(fd)
    again.close()
    pool.close()


def test_an_area_in_use_is_not_taken_apart(area: Area) -> None:
    with area.use():
        with pytest.raises(ConflictError):
            area.close()
        assert not area.retire()
        assert bytes(area.window(0, 3)) == b"aaa"
    assert area.retire()
    with pytest.raises(ConflictError), area.use():
        pass


def test_a_chunk_is_copied_everywhere_but_where_it_lies() -> None:
    manifest = manifest_of([100])
    area = Area(manifest, area_layout(manifest), small_pool())
    data = area.window(0, 100)
    data[:] = b"c" * 100
    area.scatter(0, memoryview(b"d" * 100), lies_at=0)
    assert bytes(data) == b"c" * 100
    assert bytes(area.window(AREA_ALIGNMENT, 100)) == b"d" * 100
    del data
    area.close()


def test_the_least_recently_used_unpinned_area_makes_room() -> None:
    pool = small_pool()
    tier = RamTier(3 * pool.small_bytes, pool)
    manifest = manifest_of([10])
    layout = area_layout(manifest)
    names = [Digest(name) for name in "abc"]
    for name in names:
        assert tier.reserve(name, layout.size, {}.__contains__) == []
        tier.settle(name, Area(manifest, layout, pool))
    areas = {name: tier.get(name) for name in names}
    tier.get(names[0])
    victims = tier.reserve(Digest("d"), layout.size, {names[1]}.__contains__)
    assert victims == [areas[names[2]]]
    with pytest.raises(StorageFullError, match="landing area"):
        tier.reserve(Digest("e"), layout.size * 2, {names[0], names[1]}.__contains__)
    for victim in victims:
        victim.close()
    tier.settle(Digest("d"), None)
    assert tier.used_bytes == pool.small_bytes * 2
    first = areas[names[0]]
    assert first is not None
    with first.use():
        assert tier.least_used(lambda name: name == names[1]) is None
    assert tier.least_used(lambda name: name == names[1]) is first
    first.close()
    tier.close()

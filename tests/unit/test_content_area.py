import fcntl
import mmap
import os
from collections.abc import Iterator

import pytest

from snowdrop.content.area import Area, RamTier
from snowdrop.content.placement import AREA_ALIGNMENT, area_layout, plan_runs
from snowdrop.domain.errors import StorageFullError
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
    area = Area(manifest, area_layout(manifest))
    area.scatter(0, memoryview(b"a" * 100))
    yield area
    area.close()


def test_files_are_aligned_and_a_repeated_chunk_is_in_both_places(area: Area) -> None:
    assert [file.offset for file in area.layout.files] == [0, AREA_ALIGNMENT]
    assert bytes(area.window(AREA_ALIGNMENT, 100)) == b"a" * 100


def test_whoever_gets_the_descriptor_can_neither_write_nor_resize(area: Area) -> None:
    fd = os.dup(area.fileno())
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(fd, area.layout.size)
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
    with mmap.mmap(area.fileno(), area.layout.size, access=mmap.ACCESS_COPY) as private:
        private[0:3] = b"xyz"
        assert bytes(area.window(0, 3)) == b"aaa"


def test_a_mapping_outlives_the_area() -> None:
    manifest = manifest_of([100])
    area = Area(manifest, area_layout(manifest))
    area.scatter(0, memoryview(b"b" * 100))
    with mmap.mmap(area.fileno(), area.layout.size, access=mmap.ACCESS_COPY) as private:
        area.close()
        assert private[:3] == b"bbb"


def test_the_least_recently_used_unpinned_area_makes_room() -> None:
    tier = RamTier(3 * AREA_ALIGNMENT * 2)
    manifest = manifest_of([10])
    layout = area_layout(manifest)
    names = [Digest(name) for name in "abc"]
    for name in names:
        assert tier.reserve(name, layout.size, set()) == []
        tier.settle(name, Area(manifest, layout))
    areas = {name: tier.get(name) for name in names}
    tier.get(names[0])
    victims = tier.reserve(Digest("d"), layout.size, {names[1]})
    assert victims == [areas[names[2]]]
    with pytest.raises(StorageFullError, match="landing area"):
        tier.reserve(Digest("e"), layout.size * 2, {names[0], names[1]})
    for victim in victims:
        victim.close()
    tier.settle(Digest("d"), None)
    assert tier.used_bytes == layout.size * 2
    tier.close()


def test_runs_read_neighbours_together_where_they_land_together() -> None:
    manifest = manifest_of([AREA_ALIGNMENT, AREA_ALIGNMENT, 10, AREA_ALIGNMENT])
    runs = plan_runs(manifest, [0, 1, 2, 3], area_layout(manifest))
    assert [(run.first, run.chunks) for run in runs] == [(0, 3), (3, 1)]
    assert [(run.first, run.chunks) for run in plan_runs(manifest, [0, 2, 3], None)] == [(0, 1), (2, 2)]

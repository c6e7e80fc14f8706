import gc
import os
from pathlib import Path

import pytest

from snowdrop.content.mapping import HUGE_PAGE_BYTES, map_slabs
from snowdrop.domain.errors import CorruptContentError

PAGE = 4096


def slab(fill: bytes, size: int) -> int:
    fd = os.memfd_create("snowdrop-test-slab")
    os.ftruncate(fd, size)
    os.pwrite(fd, fill * size, 0)
    return fd


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("snowdrop-test-slab")


def test_slabs_lie_side_by_side_and_stay_as_long_as_a_view_does() -> None:
    sizes = [HUGE_PAGE_BYTES, PAGE, 3 * PAGE]
    fds = [slab(fill, size) for fill, size in zip((b"a", b"b", b"c"), sizes, strict=True)]
    before = mappings()
    view = map_slabs(fds, sizes)
    for fd in fds:
        os.close(fd)
    assert len(view) == sum(sizes)
    assert bytes(view[sizes[0] - 1 : sizes[0] + PAGE + 1]) == b"a" + b"b" * PAGE + b"c"
    kept = view[-4:]
    del view
    gc.collect()
    assert mappings() == before + 3
    assert bytes(kept) == b"cccc"
    del kept
    gc.collect()
    assert mappings() == before


def test_writing_stays_in_this_process() -> None:
    fd = slab(b"a", PAGE)
    one, two = map_slabs([fd], [PAGE]), map_slabs([fd], [PAGE])
    one[:3] = b"xyz"
    assert bytes(two[:3]) == os.pread(fd, 3, 0) == b"aaa"
    os.pwrite(fd, b"later", PAGE - 5)
    assert bytes(two[-5:]) == b"later", "bytes that the data plane adds are seen"
    os.close(fd)


def data_bytes() -> int:
    """What counts into RLIMIT_DATA."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData:"))


def test_a_mapping_for_reading_sees_the_slab_and_takes_nothing_of_the_process_limit() -> None:
    size = 64 << 20
    fd = slab(b"a", PAGE)
    os.ftruncate(fd, size)
    before = data_bytes()
    view = map_slabs([fd], [size], is_private=False)
    assert data_bytes() < before + size // 2
    os.pwrite(fd, b"later", 100)
    assert bytes(view[99:106]) == b"alatera"
    os.close(fd)


def test_no_slab_gives_no_bytes() -> None:
    assert len(map_slabs([], [])) == 0


@pytest.mark.parametrize("size", [0, -PAGE, 100, 2 * PAGE])
def test_a_slab_of_another_size_is_refused(size: int) -> None:
    fd = slab(b"a", PAGE)
    with pytest.raises(CorruptContentError):
        map_slabs([fd], [size])
    os.close(fd)

import errno
import mmap
import os
import random
from pathlib import Path

import pytest

from content_helpers import noise
from snowdrop.content.direct import SCRATCH_BYTES, read_direct

SIZE = SCRATCH_BYTES + 70_001


@pytest.fixture
def data() -> bytes:
    return noise(SIZE)


@pytest.fixture
def direct(tmp_path: Path, data: bytes) -> int:
    path = tmp_path / "file"
    path.write_bytes(data)
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        pytest.skip("this file system has no O_DIRECT")


def cases() -> list[tuple[int, int, int]]:
    """(offset in the file, length, offset in memory)"""
    rng = random.Random(7)
    found = [(0, SIZE, 0), (0, 0, 0), (5, 3, 5), (4095, 2, 4095), (4096, 4096, 0), (1, SIZE - 1, 1), (0, 4096, 1)]
    for _ in range(60):
        offset = rng.randrange(SIZE)
        length = rng.choice([rng.randrange(9000), rng.randrange(SIZE)])
        at = rng.choice([offset % 4096, rng.randrange(4096)])
        found.append((offset, min(length, SIZE - offset), at))
    return found


def test_every_read_is_right_and_touches_nothing_else(direct: int, data: bytes) -> None:
    memory = mmap.mmap(-1, SIZE + 16384)
    view = memoryview(memory)
    for offset, length, at in cases():
        begin = 4096 + at
        view[: begin + length + 4096] = b"\xee" * (begin + length + 4096)
        assert read_direct(direct, offset, view[begin : begin + length])
        assert view[begin : begin + length] == data[offset : offset + length], (offset, length, at)
        assert view[:begin] == b"\xee" * begin
        assert view[begin + length : begin + length + 4096] == b"\xee" * 4096
    os.close(direct)


def test_a_read_past_the_end_says_so(direct: int) -> None:
    memory = mmap.mmap(-1, SIZE + 16384)
    view = memoryview(memory)
    for offset, length in [(0, SIZE + 1), (SIZE, 1), (SIZE - 1, 2), (SIZE + 5000, 1), (4096, SIZE), (1, SIZE)]:
        for at in (offset % 4096, 17):
            assert not read_direct(direct, offset, view[at : at + length])
    os.close(direct)

"""Touching a slab in advance: all of its memory is there afterwards, whatever the kernel grants."""

from __future__ import annotations

import os

import pytest

from snowdrop.content import slabs
from snowdrop.content.mapping import HUGE_PAGE_BYTES
from snowdrop.content.slabs import Slab

SIZE = 4 * HUGE_PAGE_BYTES


def resident_bytes(slab: Slab) -> int:
    return os.fstat(slab.fd).st_blocks * 512


@pytest.mark.parametrize("refused", [(), (slabs.MADV_COLLAPSE,), (slabs.MADV_COLLAPSE, slabs.MADV_POPULATE_WRITE)])
def test_what_was_touched_is_there_and_zero(monkeypatch: pytest.MonkeyPatch, refused: tuple[int, ...]) -> None:
    real = slabs.madvise
    monkeypatch.setattr(
        slabs, "madvise", lambda at, size, advice: -1 if advice in refused else real(at, size, advice)
    )
    slab = Slab(SIZE)
    try:
        assert resident_bytes(slab) == 0
        slab.touch(HUGE_PAGE_BYTES, 2 * HUGE_PAGE_BYTES)
        assert resident_bytes(slab) == 2 * HUGE_PAGE_BYTES
        assert os.pread(slab.fd, SIZE, 0) == bytes(SIZE)
    finally:
        slab.close()

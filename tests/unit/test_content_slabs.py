import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from content_helpers import small_pool
from snowdrop.content import slabs as slabs_module
from snowdrop.content.mapping import memory_at
from snowdrop.content.slabs import Slab, SlabPool, machine_memory, memory_pressure
from snowdrop.domain.errors import StorageFullError

MIB = 1 << 20


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlabPool]:
    monkeypatch.setattr(slabs_module, "TOUCH_STEP_S", 0.0)
    made = small_pool()
    yield made
    made.close()


def sizes(slabs: list[Slab]) -> list[int]:
    return [slab.size // MIB for slab in slabs]


def mapped() -> int:
    return Path("/proc/self/maps").read_text().count("/memfd:snowdrop-slab")


def give_up(pool: SlabPool, slabs: list[Slab]) -> None:
    pool.give_back(slabs)
    pool.shrink(1 << 30)


def test_an_area_takes_big_slabs_then_small_ones_side_by_side(pool: SlabPool) -> None:
    before = mapped()
    slabs = pool.take(9 * MIB)
    assert sizes(slabs) == [4, 4, 2]
    assert pool.area_bytes == pool.rounded(9 * MIB) == 10 * MIB
    memory = memory_at(slabs[0].address, 10 * MIB)
    memory[4 * MIB - 2 : 4 * MIB + 2] = b"abcd"
    assert os.pread(slabs[0].fd, 2, 4 * MIB - 2) == b"ab"
    assert os.pread(slabs[1].fd, 2, 0) == b"cd"
    give_up(pool, slabs)
    assert mapped() <= before  # other tests may have left some, which may go meanwhile


def test_what_comes_back_is_zeros_when_it_is_given_out_again_cleaned_or_not(pool: SlabPool) -> None:
    for clean in (True, False):
        slabs = pool.take(6 * MIB)
        memory_at(slabs[0].address, 6 * MIB)[:] = b"x" * (6 * MIB)
        files = {os.fstat(slab.fd).st_ino for slab in slabs}
        pool.give_back(slabs)
        while clean and pool.clean():
            pass
        assert pool.idle_bytes == 6 * MIB
        again = pool.take(6 * MIB)
        assert {os.fstat(slab.fd).st_ino for slab in again} == files, "this test is about reuse"
        assert not any(memory_at(again[0].address, 6 * MIB))
        pool.give_back(again)


def test_slabs_that_were_moved_are_writable_though_sealed(pool: SlabPool) -> None:
    first = pool.take(4 * MIB)
    second = pool.take(6 * MIB)
    pool.give_back(first)
    pool.give_back(second)
    slabs = pool.take(10 * MIB)
    memory = memory_at(slabs[0].address, 10 * MIB)
    memory[:] = b"y" * (10 * MIB)
    for slab in slabs:
        assert os.pread(slab.fd, 1, slab.size - 1) == b"y"
        with pytest.raises(PermissionError):
            mmap.mmap(slab.fd, slab.size)
    give_up(pool, slabs)


def test_it_grows_touched_and_takes_from_that_first(pool: SlabPool) -> None:
    pool.grow(2 * MIB)
    pool.grow(4 * MIB)
    assert pool.idle_bytes == 6 * MIB
    touched = {slab.fd: os.fstat(slab.fd).st_blocks * 512 for slab in pool._free}
    assert set(touched.values()) == {2 * MIB, 4 * MIB}
    slabs = pool.take(8 * MIB)
    assert set(touched) <= {slab.fd for slab in slabs}
    assert pool.idle_bytes == 0
    give_up(pool, slabs)


def test_it_shrinks_by_what_it_is_told_but_by_one_slab_at_least(pool: SlabPool) -> None:
    before = mapped()
    for size in (2, 2, 4):
        pool.grow(size * MIB)
    pool.shrink(1)
    assert pool.idle_bytes == 6 * MIB
    pool.shrink(6 * MIB)
    assert pool.idle_bytes == 0
    pool.shrink(MIB)
    assert mapped() <= before  # other tests may have left some, which may go meanwhile


def test_an_area_of_too_many_parts_is_refused_and_costs_nothing(
    pool: SlabPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slabs_module, "SLABS_MAX", 3)
    with pytest.raises(StorageFullError, match="too many parts"):
        pool.take(20 * MIB)
    assert pool.area_bytes == 0
    slabs = pool.take(12 * MIB)
    assert sizes(slabs) == [4, 4, 4]
    give_up(pool, slabs)


def test_many_small_slabs_stand_in_for_a_big_one_only_while_descriptors_suffice(
    pool: SlabPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(6):
        pool.grow(2 * MIB)
    slabs = pool.take(8 * MIB)
    assert sizes(slabs) == [2, 2, 2, 2]
    pool.give_back(slabs)
    monkeypatch.setattr(slabs_module, "SLABS_MAX", 2)
    slabs = pool.take(8 * MIB)
    assert sizes(slabs) == [4, 4]
    give_up(pool, slabs)


def test_without_memory_the_error_says_so_and_nothing_is_taken(
    pool: SlabPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patched:
        patched.setattr(os, "memfd_create", refuse)
        with pytest.raises(StorageFullError, match="landing area"):
            pool.take(MIB)
    assert pool.area_bytes == 0


def test_closing_ends_a_pool_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    before = mapped()
    monkeypatch.setattr(slabs_module, "TOUCH_STEP_S", 60.0)
    pool = small_pool()
    thread = threading.Thread(target=pool.grow, args=(64 * MIB,))
    thread.start()
    pool.close()
    thread.join(10)
    assert not thread.is_alive()
    assert pool.idle_bytes == 0
    assert mapped() <= before  # other tests may have left some, which may go meanwhile


def test_the_machine_is_asked(pool: SlabPool) -> None:
    total, available = machine_memory()
    assert 0 < available <= total
    assert 0 <= memory_pressure() <= 1
    state = pool.state(target_bytes=MIB, limit_bytes=2 * MIB, is_busy=True)
    assert (state.machine_bytes, state.idle_bytes, state.step_bytes) == (total, 0, 2 * MIB)

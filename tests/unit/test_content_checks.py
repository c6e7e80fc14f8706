import random

import pytest

from snowdrop.content.checks import NO_CHECK, ChunkChecks

DATA = random.Random(1).randbytes(70_000)


def checks(count: int = 4) -> ChunkChecks:
    made = ChunkChecks(count)
    made.learn(2, memoryview(DATA))
    return made


@pytest.mark.parametrize("at", [0, 1, 239, 240, 241, 4096, 65_535, len(DATA) - 1])
@pytest.mark.parametrize("bit", range(8))
def test_a_bit_that_flips_is_seen(at: int, bit: int) -> None:
    wrong = bytearray(DATA)
    wrong[at] ^= 1 << bit
    assert checks().is_right(2, memoryview(DATA))
    assert not checks().is_right(2, memoryview(wrong))


@pytest.mark.parametrize("sector", [512, 4096])
def test_sectors_that_are_stale_misdirected_or_exchanged_are_seen(sector: int) -> None:
    made = checks()
    for at in range(0, len(DATA) - sector, 7 * sector):
        stale = DATA[:at] + bytes(sector) + DATA[at + sector :]
        assert not made.is_right(2, memoryview(stale))
        other = (at + 3 * sector) % (len(DATA) // sector * sector)
        exchanged = bytearray(DATA)
        exchanged[at : at + sector], exchanged[other : other + sector] = (
            DATA[other : other + sector],
            DATA[at : at + sector],
        )
        assert not made.is_right(2, memoryview(exchanged))


def test_what_is_cut_short_or_goes_on_is_seen() -> None:
    assert not checks().is_right(2, memoryview(DATA)[:-1])
    assert not checks().is_right(2, memoryview(DATA + b"\0"))


def test_a_check_belongs_to_its_directory_and_chunk() -> None:
    one, other = checks(), checks()
    one.learn(3, memoryview(DATA))
    other.learn(3, memoryview(DATA))
    entries = {table[at : at + 16] for table in (one.table, other.table) for at in (32, 48)}
    assert len(entries) == 4
    assert ChunkChecks(4, one.secret, one.table).is_right(3, memoryview(DATA))
    assert not ChunkChecks(4, other.secret, one.table).is_right(3, memoryview(DATA))


def test_without_a_check_nothing_is_right() -> None:
    made = checks()
    assert not made.is_right(1, memoryview(DATA))
    assert not made.is_right(1, memoryview(b""))
    made.forget(2)
    assert not made.is_right(2, memoryview(DATA))
    assert made.table == NO_CHECK * 4


def test_learning_the_same_again_is_nothing_new() -> None:
    made = checks()
    assert not made.learn(2, memoryview(DATA))
    assert made.learn(2, memoryview(DATA[:-1]))

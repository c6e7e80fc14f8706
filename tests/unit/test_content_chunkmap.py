import random
from pathlib import Path

import pytest

from snowdrop.content.chunkmap import ChunkMap
from snowdrop.content.diskio import DiskIo

COUNT = 70_003
MANIFEST = bytes(range(32))


def bits(seed: int) -> bytearray:
    rng = random.Random(seed)
    return bytearray(rng.randrange(2) for _ in range(COUNT))


def opened(path: Path, count: int = COUNT, manifest: bytes = MANIFEST) -> ChunkMap:
    return ChunkMap(path, count, manifest, DiskIo())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "chunks.map"
    chunks = opened(found)
    assert not any(chunks.read())
    for seed in range(3):
        chunks.write(bits(seed))
    return found


def test_the_last_bits_that_were_written_are_read(path: Path) -> None:
    assert opened(path).read() == bits(2)


def test_counting_goes_on_after_a_restart(path: Path) -> None:
    for seed in range(3, 6):
        chunks = opened(path)
        chunks.read()
        chunks.write(bits(seed))
        assert opened(path).read() == bits(seed)


@pytest.mark.parametrize("seed", range(8))
def test_a_slot_that_was_torn_while_written_leaves_the_one_before(path: Path, seed: int) -> None:
    before = path.read_bytes()
    chunks = opened(path)
    chunks.read()
    chunks.write(bits(3))
    after = path.read_bytes()
    rng = random.Random(seed)
    torn = bytearray(before)
    sectors = [at for at in range(0, len(after), 512) if after[at : at + 512] != before[at : at + 512]]
    assert len(sectors) > 10
    for at in rng.sample(sectors, rng.randrange(1, len(sectors))):
        torn[at : at + 512] = after[at : at + 512]
    path.write_bytes(torn)
    assert opened(path).read() == bits(2)


def test_any_wrong_bit_of_a_slot_is_noticed(path: Path) -> None:
    good = path.read_bytes()
    slot = len(good) // 2
    rng = random.Random(1)
    used = 88 + -(-COUNT // 8)
    for at in [*range(88), *(rng.randrange(88, used) for _ in range(30))]:
        wrong = bytearray(good)
        # Three writes: the last one is in the second slot.
        wrong[slot + at] ^= 1 << rng.randrange(8)
        path.write_bytes(wrong)
        assert opened(path).read() == bits(1)


def test_a_map_of_other_content_claims_nothing(path: Path) -> None:
    assert not any(opened(path, manifest=bytes(32)).read())
    good = path.read_bytes()
    for count in (COUNT - 1, COUNT + 1, 5, 900_000):
        path.write_bytes(good)
        assert not any(opened(path, count).read())


@pytest.mark.parametrize("junk", [b"", b"\xff", b"\xff" * 100_000, b"SDMAP\0\0\2" + b"\xff" * 18_000])
def test_junk_claims_nothing_and_can_be_written_over(path: Path, junk: bytes) -> None:
    path.write_bytes(junk)
    chunks = opened(path)
    assert not any(chunks.read())
    chunks.write(bits(7))
    assert opened(path).read() == bits(7)

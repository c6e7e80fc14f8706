import random
import struct
from pathlib import Path

import pytest
from blake3 import blake3

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
    used = 120 + 16 * COUNT + -(-COUNT // 8)
    for at in [*range(120), *(rng.randrange(120, used) for _ in range(30)), used - 1]:
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


@pytest.mark.parametrize("junk", [b"", b"\xff", b"\xff" * 2_270_000, b"SDMAP\0\0\2" + b"\xff" * 24_568])
def test_junk_claims_nothing_and_can_be_written_over(path: Path, junk: bytes) -> None:
    path.write_bytes(junk)
    chunks = opened(path)
    assert not any(chunks.read())
    chunks.write(bits(7))
    assert opened(path).read() == bits(7)


def test_checks_are_stored_with_the_bits_and_their_secret(path: Path) -> None:
    chunks = opened(path)
    chunks.read()
    data = memoryview(random.Random(3).randbytes(5000))
    assert chunks.checks.learn(17, data)
    chunks.write(bits(3))
    again = opened(path)
    assert again.read() == bits(3)
    assert again.checks.is_right(17, data)
    assert not again.checks.is_right(16, data)
    other = opened(path.with_name("other.map"))
    other.read()
    assert other.checks.secret != again.checks.secret


def version_2(durable: bytearray, sequence: int) -> bytes:
    """A slot as the version before wrote it."""
    padded = bytes(durable) + bytes(-len(durable) % 8)
    packed = bytes(
        sum(bit << shift for shift, bit in enumerate(padded[at : at + 8])) for at in range(0, len(padded), 8)
    )
    head = (b"SDMAP\0\0\2", sequence, COUNT, 0, MANIFEST)
    seal = blake3(struct.pack("<8sQII32s32s", *head, bytes(32)) + packed).digest()
    return (struct.pack("<8sQII32s32s", *head, seal) + packed).ljust(12_288, b"\0")


def test_bits_of_the_version_before_are_taken_over_without_checks(tmp_path: Path) -> None:
    path = tmp_path / "chunks.map"
    path.write_bytes(version_2(bits(1), 8) + version_2(bits(2), 7))
    chunks = opened(path)
    assert chunks.read() == bits(1)
    assert not any(chunks.checks.has(chunk) for chunk in range(COUNT))
    assert opened(path).read() == bits(1)
    assert list(tmp_path.iterdir()) == [path]
    chunks.write(bits(3))
    assert opened(path).read() == bits(3)


class Fails(DiskIo):
    def replace(self, source: Path, target: Path) -> None:
        raise OSError(5, "cut off")


def test_a_takeover_that_is_cut_off_loses_nothing_and_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "chunks.map"
    path.write_bytes(version_2(bits(1), 7) + version_2(bits(2), 8))
    with pytest.raises(OSError, match="cut off"):
        ChunkMap(path, COUNT, MANIFEST, Fails()).read()
    assert opened(path).read() == bits(2)
    assert opened(path).read() == bits(2)

import random
from typing import Any

import pytest
import zstandard

from snowdrop.content.codec import decode, encode
from snowdrop.domain.errors import CorruptContentError

TEXT = b"the quick brown fox " * 5000


def decoded(codec: Any, stored: bytes, size: int) -> bytes:
    around = bytearray(b"#" * (size + 16))
    decode(codec, memoryview(stored), memoryview(around)[8 : 8 + size])
    assert around[:8] == around[-8:] == b"#" * 8
    return bytes(around[8 : 8 + size])


@pytest.mark.parametrize("codec", ["plain", "zstd"])
@pytest.mark.parametrize("size", [1, 100, 200_000, 4 << 20])
def test_what_was_encoded_comes_back_in_place(codec: Any, size: int) -> None:
    for plain in (b"\0" * size, random.Random(size).randbytes(size), (TEXT * 50)[:size]):
        stored = encode(codec, memoryview(plain))
        assert decoded(codec, stored, len(plain)) == plain


def test_text_gets_smaller() -> None:
    assert len(encode("zstd", TEXT)) < len(TEXT) // 10


def frame(**options: Any) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(TEXT)


def with_window(log: int) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(window_log=log, write_content_size=True, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj(size=len(TEXT))
    return compressor.compress(TEXT) + compressor.flush()


def without_size() -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(TEXT)


def huge_window() -> bytes:
    """A frame that states its size and, in a window descriptor of its own, a window of 2 GiB."""
    return b"\x28\xb5\x2f\xfd" + bytes([0x80, (31 - 10) << 3]) + len(TEXT).to_bytes(4, "little") + b"\x01\0\0"


HOSTILE = {
    "empty": b"",
    "noise": random.Random(1).randbytes(500),
    "magic only": frame()[:4],
    "no size": without_size(),
    "truncated": frame()[:-1],
    "trailing byte": frame() + b"\0",
    "two frames": frame() + frame(),
    "skippable frame": b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + frame(),
    "only skippable": b"\x50\x2a\x4d\x18\x04\0\0\0abcd",
    "longer": zstandard.ZstdCompressor().compress(TEXT + b"x"),
    "shorter": zstandard.ZstdCompressor().compress(TEXT[:-1]),
    "window of 2 GiB": huge_window(),
    "dictionary": zstandard.ZstdCompressor(
        dict_data=zstandard.ZstdCompressionDict(
            b"\x37\xa4\x30\xec" + b"\x07\0\0\0", zstandard.DICT_TYPE_RAWCONTENT
        )
    ).compress(TEXT)[:4]
    + bytes([0xA1, 7])
    + len(TEXT).to_bytes(4, "little")
    + b"\x01\0\0",
    "lies about its size": frame()[:4] + bytes([0xA0]) + len(TEXT).to_bytes(4, "little") + b"\x0b\0\0a",
    "no last block": frame()[:4] + bytes([0xA0]) + len(TEXT).to_bytes(4, "little") + b"\x0a\0\0a" * 3,
    "reserved block": frame()[:4] + bytes([0xA0]) + len(TEXT).to_bytes(4, "little") + b"\x07\0\0",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_frame_is_refused(name: str) -> None:
    with pytest.raises(CorruptContentError):
        decoded("zstd", HOSTILE[name], len(TEXT))


def test_a_frame_with_a_checksum_is_read_and_a_wrong_one_refused() -> None:
    stored = frame(write_checksum=True)
    assert decoded("zstd", stored, len(TEXT)) == TEXT
    with pytest.raises(CorruptContentError):
        decoded("zstd", stored[:-1] + bytes([stored[-1] ^ 1]), len(TEXT))


def test_a_frame_that_would_grow_without_bound_stops_at_the_length() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(256 << 20))
    with pytest.raises(CorruptContentError):
        decoded("zstd", bomb, 1000)


@pytest.mark.parametrize("size", [0, 3, 5])
def test_a_plain_chunk_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(CorruptContentError):
        decoded("plain", b"x" * size, 4)

"""Codecs: how a chunk is stored in its pack. The chunk's digest is over the plaintext, whatever the codec.

`zstd` is exactly one zstd frame (RFC 8878) that states its content size, uses no dictionary and a window of at
most CHUNK_BYTES_MAX. Readers refuse anything else, so that hostile bytes cost no more than a chunk.
"""

from __future__ import annotations

import threading

import zstandard

from snowdrop.domain.errors import CorruptContentError
from snowdrop.domain.manifest import CHUNK_BYTES_MAX, Codec

ZSTD_LEVEL = 3
_MAGIC = b"\x28\xb5\x2f\xfd"
_HEADER_BYTES_MAX = 18
_BLOCK_HEADER_BYTES = 3
_RLE, _RESERVED = 1, 3
_local = threading.local()


def encode(codec: Codec, plain: bytes | memoryview) -> bytes:
    """`plain` as it is stored under `codec`."""
    if codec == "plain":
        return bytes(plain)
    compressor: zstandard.ZstdCompressor | None = getattr(_local, "compressor", None)
    if compressor is None:
        _local.compressor = compressor = zstandard.ZstdCompressor(
            level=ZSTD_LEVEL, write_content_size=True, write_checksum=False, write_dict_id=False
        )
    return compressor.compress(plain)


def decode(codec: Codec, stored: memoryview, into: memoryview) -> None:
    """Fills `into`, which has exactly the chunk's plain length, from its stored bytes.

    Raises CorruptContentError if they are not a chunk of that length under `codec`; the content of `into` is then
    undefined. Allocates at most a window. Whoever calls compares the digest afterwards.
    """
    if codec == "plain":
        if len(stored) != len(into):
            raise _corrupt(f"a plain chunk of {len(into)} bytes is stored in {len(stored)}")
        into[:] = stored
        return
    _check_frame(stored, len(into))
    decompressor: zstandard.ZstdDecompressor | None = getattr(_local, "decompressor", None)
    if decompressor is None:
        _local.decompressor = decompressor = zstandard.ZstdDecompressor(max_window_size=CHUNK_BYTES_MAX)
    done = 0
    try:
        with decompressor.stream_reader(stored, read_across_frames=False) as reader:
            while done < len(into):
                count = reader.readinto(into[done:])
                if count == 0:
                    break
                done += count
            too_long = done == len(into) and reader.read(1) != b""
    except zstandard.ZstdError as error:
        raise _corrupt(f"not a zstd frame: {error}") from error
    if done != len(into) or too_long:
        raise _corrupt(f"the zstd frame does not hold {len(into)} bytes")


def _check_frame(stored: memoryview, plain_bytes: int) -> None:
    """One ordinary frame over all of `stored` for `plain_bytes`; walks the blocks without decoding them."""
    if bytes(stored[:4]) != _MAGIC:
        raise _corrupt("not a zstd frame")
    head = bytes(stored[:_HEADER_BYTES_MAX])
    try:
        frame = zstandard.get_frame_parameters(head)
        cursor = zstandard.frame_header_size(head)
    except zstandard.ZstdError as error:
        raise _corrupt(f"not a zstd frame: {error}") from error
    if frame.content_size != plain_bytes:
        raise _corrupt(f"the zstd frame states another length than {plain_bytes}")
    if frame.window_size > CHUNK_BYTES_MAX:
        raise _corrupt(f"window of {frame.window_size} bytes (chunk_bytes_max={CHUNK_BYTES_MAX})")
    if frame.dict_id:
        raise _corrupt("the zstd frame wants a dictionary")
    is_last = False
    while not is_last:
        block = bytes(stored[cursor : cursor + _BLOCK_HEADER_BYTES])
        if len(block) < _BLOCK_HEADER_BYTES:
            raise _corrupt("the zstd frame is cut short")
        header = int.from_bytes(block, "little")
        is_last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
        if kind == _RESERVED:
            raise _corrupt("not a zstd frame: reserved block type")
        cursor += _BLOCK_HEADER_BYTES + (1 if kind == _RLE else size)
    cursor += 4 if frame.has_checksum else 0
    if cursor != len(stored):
        raise _corrupt(f"the zstd frame ends at byte {cursor} of {len(stored)}")


def _corrupt(message: str) -> CorruptContentError:
    return CorruptContentError(message, where="stored chunk", next_step="push the artefact again")

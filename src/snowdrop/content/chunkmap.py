"""`chunks.map`: which chunks of a landing directory are durable, one bit each.

Two slots, written in turn, each complete in itself: whatever a crash does to the one that is being written, the
other still tells the state before. A slot is believed only if its own digest is right and it belongs to this
manifest.

    magic       8 bytes  "SDMAP\\0\\0\\2"
    sequence    u64      the higher of two good slots counts
    chunks      u32      how many bits follow
    reserved    u32      0
    manifest    32 bytes digest of the manifest
    digest      32 bytes BLAKE3 of the slot with this field zero
    bits        chunk i is bit (i mod 8) of byte i / 8

Little endian. A slot is padded to a multiple of 4096 bytes, so that no write touches both.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from blake3 import blake3

from snowdrop.content.diskio import DiskIo

_HEADER = struct.Struct("<8sQII32s32s")
_MAGIC = b"SDMAP\0\0\2"
_SLOT_ALIGNMENT = 4096
_UNPACKED = [bytes((byte >> bit) & 1 for bit in range(8)) for byte in range(256)]
_PACKED = {bits: byte for byte, bits in enumerate(_UNPACKED)}


class ChunkMap:
    """Bits are kept by the landing; here they are stored. For one thread at a time; errors are OSError."""

    def __init__(self, path: Path, count: int, manifest: bytes, io: DiskIo) -> None:
        self._path = path
        self._count = count
        self._manifest = manifest
        self._io = io
        self._bits_bytes = -(-count // 8)
        self._slot_bytes = -(-(_HEADER.size + self._bits_bytes) // _SLOT_ALIGNMENT) * _SLOT_ALIGNMENT
        self._sequence = 0

    def read(self) -> bytearray:
        """One byte for each chunk, 1 if its bit is set; all 0 if there is no map that can be believed.

        Makes the file if it is not there: its name is to be durable before the first bits are.
        """
        raw = self._path.read_bytes() if self._path.is_file() else b""
        if len(raw) != 2 * self._slot_bytes:
            self._io.create(self._path, 2 * self._slot_bytes, 0o600)
        return self.decode(raw)

    def decode(self, raw: bytes) -> bytearray:
        """What `raw`, the content of a map, says; goes on counting from there."""
        best: tuple[int, bytes] | None = None
        for slot in (raw[: self._slot_bytes], raw[self._slot_bytes : 2 * self._slot_bytes]):
            decoded = self._decode(slot)
            if decoded is not None and (best is None or decoded[0] > best[0]):
                best = decoded
        if best is None:
            return bytearray(self._count)
        self._sequence = best[0]
        return bytearray(b"".join(map(_UNPACKED.__getitem__, best[1]))[: self._count])

    def write(self, durable: bytearray) -> None:
        """Stores the bits, durable when this returns. The slot that was written last stays as it is."""
        sequence = self._sequence + 1
        slot = self._encode(sequence, durable)
        fd = self._io.open(self._path, os.O_WRONLY)
        try:
            self._io.write(fd, memoryview(slot), sequence % 2 * self._slot_bytes)
            self._io.sync_data(fd)
        finally:
            os.close(fd)
        self._sequence = sequence

    def _encode(self, sequence: int, durable: bytearray) -> bytes:
        padded = bytes(durable).ljust(8 * self._bits_bytes, b"\0")
        packed = bytes(_PACKED[padded[at : at + 8]] for at in range(0, len(padded), 8))
        head = (_MAGIC, sequence, self._count, 0, self._manifest)
        seal = blake3(_HEADER.pack(*head, bytes(32)) + packed).digest()
        return (_HEADER.pack(*head, seal) + packed).ljust(self._slot_bytes, b"\0")

    def _decode(self, slot: bytes) -> tuple[int, bytes] | None:
        if len(slot) != self._slot_bytes:
            return None
        magic, sequence, count, reserved, manifest, seal = _HEADER.unpack_from(slot)
        bits = slot[_HEADER.size : _HEADER.size + self._bits_bytes]
        head = (magic, sequence, count, reserved, manifest)
        if (magic, count, manifest) != (_MAGIC, self._count, self._manifest):
            return None
        return (sequence, bits) if blake3(_HEADER.pack(*head, bytes(32)) + bits).digest() == seal else None

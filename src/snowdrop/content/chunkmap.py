"""`chunks.map`: which chunks of a landing directory are durable, one bit each, and how their bytes are checked.

Two slots, written in turn, each complete in itself: whatever a crash does to the one that is being written, the
other still tells the state before. A slot is believed only if its own digest is right and it belongs to this
manifest.

    magic       8 bytes  "SDMAP\\0\\0\\3"
    sequence    u64      the higher of two good slots counts
    chunks      u32      how many bits follow
    reserved    u32      0
    manifest    32 bytes digest of the manifest
    digest      32 bytes BLAKE3 of the slot with this field zero
    secret      32 bytes seeds the checks (`checks.py`)
    checks      16 bytes a chunk, zeros where there is none
    bits        chunk i is bit (i mod 8) of byte i / 8

Little endian. A slot is padded to a multiple of 4096 bytes, so that no write touches both. A check says nothing
about what is on the disk, only what must be: it may be there without its bit.

Version 2 had neither secret nor checks. Its bits are taken over into a new file, which then takes its name.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

from snowdrop.content.checks import CHECK_BYTES, SECRET_BYTES, ChunkChecks
from snowdrop.content.diskio import DiskIo

_HEADER = struct.Struct("<8sQII32s32s")
_MAGIC = b"SDMAP\0\0\3"
_MAGIC_2 = b"SDMAP\0\0\2"
_SLOT_ALIGNMENT = 4096
_UNPACKED = [bytes((byte >> bit) & 1 for bit in range(8)) for byte in range(256)]
_PACKED = {bits: byte for byte, bits in enumerate(_UNPACKED)}


class _Slot(NamedTuple):
    sequence: int
    content: bytes


class ChunkMap:
    """Bits are kept by the landing; here they are stored. For one thread at a time; errors are OSError.

    `checks` may be used by any thread; they are stored with the bits.
    """

    def __init__(self, path: Path, count: int, manifest: bytes, io: DiskIo) -> None:
        self.checks = ChunkChecks(count)
        self._path = path
        self._count = count
        self._manifest = manifest
        self._io = io
        self._bits_bytes = -(-count // 8)
        self._checks_bytes = count * CHECK_BYTES
        self._slot_bytes = _aligned(_HEADER.size + SECRET_BYTES + self._checks_bytes + self._bits_bytes)
        self._sequence = 0

    def read(self) -> bytearray:
        """One byte for each chunk, 1 if its bit is set; all 0 if there is no map that can be believed.

        Makes the file if it is not there: its name is to be durable before the first bits are.
        """
        raw = self._path.read_bytes() if self._path.is_file() else b""
        old = self._decode_2(raw)
        if old is not None:
            self._renew(old)
            return old
        if len(raw) != 2 * self._slot_bytes:
            self._io.create(self._path, 2 * self._slot_bytes, 0o600)
        return self.decode(raw)

    def decode(self, raw: bytes) -> bytearray:
        """What `raw`, the content of a map, says; goes on counting from there."""
        best = _best(raw, _MAGIC, self._slot_bytes, self._count, self._manifest)
        if best is None:
            return bytearray(self._count)
        self._sequence = best.sequence
        checks_end = SECRET_BYTES + self._checks_bytes
        secret, table = best.content[:SECRET_BYTES], best.content[SECRET_BYTES:checks_end]
        self.checks = ChunkChecks(self._count, secret, table)
        return self._unpacked(best.content[checks_end:])

    def write(self, durable: bytearray) -> None:
        """Stores bits and checks, durable when this returns. The slot that was written last stays as it is."""
        self._write_to(self._path, durable)

    def _write_to(self, path: Path, durable: bytearray) -> None:
        sequence = self._sequence + 1
        slot = self._encode(sequence, durable)
        fd = self._io.open(path, os.O_WRONLY)
        try:
            self._io.write(fd, memoryview(slot), sequence % 2 * self._slot_bytes)
            self._io.sync_data(fd)
        finally:
            os.close(fd)
        self._sequence = sequence

    def _encode(self, sequence: int, durable: bytearray) -> bytes:
        padded = bytes(durable).ljust(8 * self._bits_bytes, b"\0")
        packed = bytes(_PACKED[padded[at : at + 8]] for at in range(0, len(padded), 8))
        content = self.checks.secret + self.checks.table + packed
        head = (_MAGIC, sequence, self._count, 0, self._manifest)
        seal = blake3(_HEADER.pack(*head, bytes(32)) + content).digest()
        return (_HEADER.pack(*head, seal) + content).ljust(self._slot_bytes, b"\0")

    def _decode_2(self, raw: bytes) -> bytearray | None:
        slot_bytes = _aligned(_HEADER.size + self._bits_bytes)
        best = _best(raw, _MAGIC_2, slot_bytes, self._count, self._manifest)
        return self._unpacked(best.content) if best is not None else None

    def _renew(self, durable: bytearray) -> None:
        """The bits in a file of this version, which takes the name of the old one when it is whole and durable."""
        new = self._path.with_suffix(".new")
        self._io.create(new, 0, 0o600)  # whatever an earlier attempt left
        self._io.create(new, 2 * self._slot_bytes, 0o600)
        self._write_to(new, durable)
        self._io.replace(new, self._path)

    def _unpacked(self, packed: bytes) -> bytearray:
        return bytearray(b"".join(map(_UNPACKED.__getitem__, packed[: self._bits_bytes]))[: self._count])


def _aligned(size: int) -> int:
    return -(-size // _SLOT_ALIGNMENT) * _SLOT_ALIGNMENT


def _best(raw: bytes, magic: bytes, slot_bytes: int, count: int, manifest: bytes) -> _Slot | None:
    """The newer of the slots that are whole and belong to the manifest: its number and what follows the head."""
    best: _Slot | None = None
    for begin in (0, slot_bytes) if len(raw) == 2 * slot_bytes else ():
        found = _HEADER.unpack_from(raw, begin)
        if (found[0], found[2], found[4]) != (magic, count, manifest):
            continue
        head = found[:5]
        content_bytes = _CONTENT_BYTES[magic](count)
        content = raw[begin + _HEADER.size : begin + _HEADER.size + content_bytes]
        if blake3(_HEADER.pack(*head, bytes(32)) + content).digest() != found[5]:
            continue
        if best is None or found[1] > best.sequence:
            best = _Slot(found[1], content)
    return best


_CONTENT_BYTES = {
    _MAGIC: lambda count: SECRET_BYTES + count * CHECK_BYTES + -(-count // 8),
    _MAGIC_2: lambda count: -(-count // 8),
}

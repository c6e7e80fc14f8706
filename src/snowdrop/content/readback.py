"""Reads one small file of an artefact from the origin, verified: for commands that ask what a model is."""

from __future__ import annotations

from snowdrop.content.codec import decode
from snowdrop.content.keys import Hasher
from snowdrop.content.layout import pack_key
from snowdrop.content.origin import Origin
from snowdrop.domain.errors import IntegrityError, TooLargeError
from snowdrop.domain.manifest import Manifest

SMALL_FILE_BYTES_MAX = 4 << 20


def read_small_file(origin: Origin, manifest: Manifest, path: str, hasher: Hasher) -> bytes | None:
    """The file's bytes; None if the artefact has no such file.

    Raises TooLargeError above SMALL_FILE_BYTES_MAX, IntegrityError for wrong bytes, and as the origin does.
    """
    entry = next((entry for entry in manifest.files if entry.path == path), None)
    if entry is None:
        return None
    if entry.size > SMALL_FILE_BYTES_MAX:
        raise TooLargeError(f"{path} has {entry.size} bytes", where=f"small_file_bytes_max={SMALL_FILE_BYTES_MAX}")
    content = bytearray(entry.size)
    for extent in entry.extents:
        chunk = manifest.chunks[extent.chunk]
        stored, plain = bytearray(chunk.stored_bytes), bytearray(chunk.plain_bytes)
        key = pack_key(manifest.key_domain, manifest.packs[chunk.pack].digest)
        if stored:
            origin.read_range(key, chunk.pack_offset, memoryview(stored))
        decode(chunk.codec, memoryview(stored), memoryview(plain))
        if hasher.hexdigest(plain) != chunk.digest:
            raise IntegrityError(
                f"the bytes of {path} are wrong at the origin",
                where=key,
                next_step="`snowdrop store verify --origin` lists what is wrong; push it again with --repair",
            )
        part = plain[extent.chunk_offset : extent.chunk_offset + extent.length]
        content[extent.file_offset : extent.file_offset + extent.length] = part
    return bytes(content)

"""Manifests as bytes: canonical encoding, digest, and a decoder that believes nothing.

The encoding is JSON in UTF-8 without white space, keys in the order of the fields of `domain.manifest`, no key
left out, numbers as plain decimal integers, `"`, `\\` and control characters the only escapes. One tree has
exactly one encoding: bytes that decode but do not encode back to themselves are refused.
`docs/reference/format.md` is the specification.
"""

from __future__ import annotations

import re

import msgspec
from blake3 import blake3

from snowdrop.content.paths import clashing_path, parse_tree_path
from snowdrop.content.safetensors import tensor_bytes
from snowdrop.domain.errors import CorruptContentError, IntegrityError
from snowdrop.domain.ids import Digest
from snowdrop.domain.manifest import (
    CHUNK_BYTES_MAX,
    FILES_MAX,
    FORMAT_VERSION,
    MANIFEST_BYTES_MAX,
    PACK_BYTES_MAX,
    ChunkRef,
    FileEntry,
    Manifest,
)

FILE_BYTES_MAX = 1 << 53
TREE_BYTES_MAX = 1 << 53
PLAIN_MODES = frozenset({0o644, 0o755})
"""What the files of a model or of code may have; only an image needs more."""

_HEX = re.compile(r"[0-9a-f]{64}")
_DOMAIN = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Manifest)


def encode_manifest(manifest: Manifest) -> bytes:
    """The canonical bytes; raises CorruptContentError if the manifest breaks the format or is too large."""
    validate_manifest(manifest)
    data = _ENCODER.encode(manifest)
    if len(data) > MANIFEST_BYTES_MAX:
        raise _corrupt(f"manifest has {len(data)} bytes (manifest_bytes_max={MANIFEST_BYTES_MAX})", "size")
    return data


def manifest_digest(data: bytes) -> Digest:
    return Digest("blake3:" + blake3(data).hexdigest())


def decode_manifest(data: bytes, *, expected: Digest | None = None) -> Manifest:
    """The manifest in `data`, fully validated.

    Raises IntegrityError if `expected` is given and is not the digest of `data`, CorruptContentError naming the
    place if the bytes are not a canonical, valid manifest of a known version.
    """
    if len(data) > MANIFEST_BYTES_MAX:
        raise _corrupt(f"manifest has {len(data)} bytes (manifest_bytes_max={MANIFEST_BYTES_MAX})", "size")
    if expected is not None and manifest_digest(data) != expected:
        raise IntegrityError(
            "manifest does not match its digest", where=expected, next_step="push the artefact again"
        )
    try:
        manifest = _DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _corrupt(f"undecodable: {error}", "encoding") from error
    validate_manifest(manifest)
    if _ENCODER.encode(manifest) != data:
        raise _corrupt("the encoding is not the canonical one", "encoding")
    return manifest


def validate_manifest(manifest: Manifest) -> None:
    """Raises CorruptContentError naming the place if a rule of the format is broken."""
    if manifest.version != FORMAT_VERSION:
        raise CorruptContentError(
            f"format version {manifest.version} is not {FORMAT_VERSION}",
            where="manifest: version",
            next_step="read it with the version of Snowdrop that wrote it, or push it again",
        )
    if not _DOMAIN.fullmatch(manifest.key_domain):
        raise _corrupt(f"key domain {manifest.key_domain[:80]!r} is not usable", "key_domain")
    if len(manifest.files) > FILES_MAX:
        raise _corrupt(f"{len(manifest.files)} files (files_max={FILES_MAX})", "files")
    for index, pack in enumerate(manifest.packs):
        if not _HEX.fullmatch(pack.digest):
            raise _corrupt("digest is not 64 hex digits", f"pack {index}")
        if not 0 < pack.size <= PACK_BYTES_MAX:
            raise _corrupt(f"size {pack.size} is out of bounds (pack_bytes_max={PACK_BYTES_MAX})", f"pack {index}")
    for index, chunk in enumerate(manifest.chunks):
        _check_chunk(chunk, index, manifest)
    paths = [parse_tree_path(entry.path) for entry in manifest.files]
    clash = clashing_path(paths)
    if clash is not None:
        raise _corrupt("path occurs twice, or as file and directory", clash)
    for entry in manifest.files:
        _check_file(entry, manifest)
    used = {extent.chunk for entry in manifest.files for extent in entry.extents}
    if len(used) != len(manifest.chunks):
        raise _corrupt("some chunks belong to no file", "chunks")
    if manifest.total_bytes > TREE_BYTES_MAX:
        raise _corrupt(f"tree has {manifest.total_bytes} bytes (tree_bytes_max={TREE_BYTES_MAX})", "files")


def _corrupt(message: str, place: str) -> CorruptContentError:
    return CorruptContentError(
        message, where=f"manifest: {ascii(place)[1:-1]}", next_step="push the artefact again"
    )


def _check_chunk(chunk: ChunkRef, index: int, manifest: Manifest) -> None:
    place = f"chunk {index}"
    if not _HEX.fullmatch(chunk.digest):
        raise _corrupt("digest is not 64 hex digits", place)
    if not 0 < chunk.plain_bytes <= CHUNK_BYTES_MAX:
        raise _corrupt(f"{chunk.plain_bytes} bytes are out of bounds (chunk_bytes_max={CHUNK_BYTES_MAX})", place)
    if chunk.codec == "plain" and chunk.stored_bytes != chunk.plain_bytes:
        raise _corrupt("a plain chunk is stored with another length", place)
    if not 0 <= chunk.pack < len(manifest.packs):
        raise _corrupt(f"pack {chunk.pack} does not exist", place)
    if chunk.stored_bytes <= 0 or chunk.pack_offset < 0:
        raise _corrupt("lies nowhere in its pack", place)
    if chunk.pack_offset + chunk.stored_bytes > manifest.packs[chunk.pack].size:
        raise _corrupt("runs over the end of its pack", place)


def _check_file(entry: FileEntry, manifest: Manifest) -> None:
    if not 0 <= entry.size <= FILE_BYTES_MAX:
        raise _corrupt(f"size {entry.size} is out of bounds (file_bytes_max={FILE_BYTES_MAX})", entry.path)
    if not (entry.mode in PLAIN_MODES or (manifest.kind == "image" and 0 <= entry.mode <= 0o7777)):
        raise _corrupt(f"mode {entry.mode:#o} is neither 0o644 nor 0o755", entry.path)
    if not _HEX.fullmatch(entry.sha256):
        raise _corrupt("sha256 is not 64 hex digits", entry.path)
    cursor = 0
    for extent in entry.extents:
        place = f"{entry.path}, byte {cursor}"
        if extent.file_offset != cursor or extent.length <= 0:
            raise _corrupt("extents overlap or leave a gap", place)
        if not 0 <= extent.chunk < len(manifest.chunks):
            raise _corrupt(f"chunk {extent.chunk} does not exist", place)
        if (
            extent.chunk_offset < 0
            or extent.chunk_offset + extent.length > manifest.chunks[extent.chunk].plain_bytes
        ):
            raise _corrupt(f"extent runs over its chunk {extent.chunk}", place)
        cursor += extent.length
    if cursor != entry.size:
        raise _corrupt(f"extents cover {cursor} of {entry.size} bytes", entry.path)
    names: set[str] = set()
    for tensor in entry.tensors:
        place = f"{entry.path}: tensor {tensor.name[:200]!r}"
        if tensor.name in names:
            raise _corrupt("name occurs twice", place)
        names.add(tensor.name)
        if any(size < 0 for size in tensor.shape) or tensor_bytes(tensor.dtype, tensor.shape) != tensor.length:
            raise _corrupt(f"{tensor.dtype[:40]!r} of this shape does not have {tensor.length} bytes", place)
        if tensor.offset < 0 or tensor.offset + tensor.length > entry.size:
            raise _corrupt("extent is outside of the file", place)

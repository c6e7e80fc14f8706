"""Manifests as bytes: canonical encoding, digest, and a decoder that believes nothing.

The encoding is JSON in UTF-8 without white space, keys in the order of the fields of `domain.manifest`, no key
left out, numbers as plain decimal integers, `"`, `\\` and control characters the only escapes. One tree has
exactly one encoding: bytes that decode but do not encode back to themselves are refused.
`docs/reference/format.md` is the specification.
"""

from __future__ import annotations

import re

import msgspec

from snowdrop.content.keys import PUBLIC_HASHER, Hasher, is_key_domain
from snowdrop.content.paths import clashing_path, parse_tree_path
from snowdrop.content.safetensors import SHAPE_RANK_MAX, TENSOR_BYTES_MAX, tensor_bytes
from snowdrop.domain.errors import CorruptContentError, IntegrityError
from snowdrop.domain.ids import Digest
from snowdrop.domain.manifest import (
    BRACKETS_MAX,
    CHUNK_BYTES_MAX,
    COMMAS_MAX,
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
_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Manifest)


def encode_manifest(manifest: Manifest) -> bytes:
    """The canonical bytes; raises CorruptContentError if the manifest breaks the format or is too large."""
    validate_manifest(manifest)
    data = _ENCODER.encode(manifest)
    if len(data) > MANIFEST_BYTES_MAX:
        raise _corrupt(f"manifest has {len(data)} bytes (manifest_bytes_max={MANIFEST_BYTES_MAX})", "size")
    return data


def encode_valid(manifest: Manifest) -> bytes:
    """The canonical bytes of a manifest that came out of `decode_manifest`: it is not validated once more."""
    return _ENCODER.encode(manifest)


def manifest_digest(data: bytes, hasher: Hasher = PUBLIC_HASHER) -> Digest:
    """The artefact's name, in the key domain of `hasher`."""
    return Digest("blake3:" + hasher.hexdigest(data))


def decode_manifest(
    data: bytes, *, expected: Digest | None = None, hasher: Hasher | None = PUBLIC_HASHER
) -> Manifest:
    """The manifest in `data`, fully validated.

    `hasher` is of the key domain that it must belong to; None takes any domain, for looking at a manifest without
    its key. Raises IntegrityError if `expected` is given and is not the digest of `data`, CorruptContentError
    naming the place if the bytes are not a canonical, valid manifest of a known version and of that domain.
    """
    if len(data) > MANIFEST_BYTES_MAX:
        raise _corrupt(f"manifest has {len(data)} bytes (manifest_bytes_max={MANIFEST_BYTES_MAX})", "size")
    if expected is not None and manifest_digest(data, hasher or PUBLIC_HASHER) != expected:
        raise IntegrityError(
            "manifest does not match its digest", where=expected, next_step="push the artefact again"
        )
    _check_counts(data)
    try:
        manifest = _DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _corrupt(f"undecodable: {error}", "encoding") from error
    validate_manifest(manifest)
    if _ENCODER.encode(manifest) != data:
        raise _corrupt("the encoding is not the canonical one", "encoding")
    if hasher is not None and manifest.key_domain != hasher.domain:
        raise _corrupt(f"key domain is {manifest.key_domain}, not {hasher.domain}", "key_domain")
    return manifest


def validate_manifest(manifest: Manifest) -> None:
    """Raises CorruptContentError naming the place if a rule of the format is broken."""
    if manifest.version != FORMAT_VERSION:
        raise CorruptContentError(
            f"format version {manifest.version} is not {FORMAT_VERSION}",
            where="manifest: version",
            next_step="push it again"
            if manifest.version < FORMAT_VERSION
            else "update Snowdrop here, or push it again with this version",
        )
    if not is_key_domain(manifest.key_domain):
        raise _corrupt(f"key domain {manifest.key_domain[:80]!r} is not usable", "key_domain")
    if len(manifest.files) > FILES_MAX:
        raise _corrupt(f"{len(manifest.files)} files (files_max={FILES_MAX})", "files")
    _check_packs(manifest)
    paths = [parse_tree_path(entry.path) for entry in manifest.files]
    clash = clashing_path(paths)
    if clash is not None:
        raise _corrupt("path occurs twice, or as file and directory", clash)
    for entry in manifest.files:
        _check_file(entry, manifest)
    _check_uses(manifest)
    if manifest.total_bytes > TREE_BYTES_MAX:
        raise _corrupt(f"tree has {manifest.total_bytes} bytes (tree_bytes_max={TREE_BYTES_MAX})", "files")


def _check_counts(data: bytes) -> None:
    """Bounds what decoding may allocate, before it does. Counts inside strings too: the format says so."""
    brackets = data.count(b"[") + data.count(b"{")
    if brackets > BRACKETS_MAX:
        raise _corrupt(f"manifest has {brackets} brackets (brackets_max={BRACKETS_MAX})", "size")
    commas = data.count(b",")
    if commas > COMMAS_MAX:
        raise _corrupt(f"manifest has {commas} commas (commas_max={COMMAS_MAX})", "size")


def _corrupt(message: str, place: str) -> CorruptContentError:
    return CorruptContentError(
        message, where=f"manifest: {ascii(place)[1:-1]}", next_step="push the artefact again"
    )


def _check_packs(manifest: Manifest) -> None:
    for index, pack in enumerate(manifest.packs):
        if not _HEX.fullmatch(pack.digest):
            raise _corrupt("digest is not 64 hex digits", f"pack {index}")
        if not 0 < pack.size <= PACK_BYTES_MAX:
            raise _corrupt(f"size {pack.size} is out of bounds (pack_bytes_max={PACK_BYTES_MAX})", f"pack {index}")
    for index, chunk in enumerate(manifest.chunks):
        _check_chunk(chunk, index, manifest)


def _check_uses(manifest: Manifest) -> None:
    used = {extent.chunk for entry in manifest.files for extent in entry.extents}
    if len(used) != len(manifest.chunks):
        raise _corrupt("some chunks belong to no file", "chunks")
    if len({chunk.digest for chunk in manifest.chunks}) != len(manifest.chunks):
        raise _corrupt("a chunk is listed twice", "chunks")
    if len({chunk.pack for chunk in manifest.chunks}) != len(manifest.packs):
        raise _corrupt("some packs hold no chunk", "packs")
    if len({pack.digest for pack in manifest.packs}) != len(manifest.packs):
        raise _corrupt("a pack is listed twice", "packs")


def _check_chunk(chunk: ChunkRef, index: int, manifest: Manifest) -> None:
    place = f"chunk {index}"
    if not _HEX.fullmatch(chunk.digest):
        raise _corrupt("digest is not 64 hex digits", place)
    if not 0 < chunk.plain_bytes <= CHUNK_BYTES_MAX:
        raise _corrupt(f"{chunk.plain_bytes} bytes are out of bounds (chunk_bytes_max={CHUNK_BYTES_MAX})", place)
    if chunk.codec == "plain" and chunk.stored_bytes != chunk.plain_bytes:
        raise _corrupt("a plain chunk is stored with another length", place)
    if chunk.codec != "plain" and chunk.stored_bytes >= chunk.plain_bytes:
        raise _corrupt(f"stored with {chunk.codec} it is no smaller", place)
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
    _check_tensors(entry)


def _check_tensors(entry: FileEntry) -> None:
    names: set[str] = set()
    end, before = 0, (0, 0, "")
    for tensor in entry.tensors:
        place = f"{entry.path}: tensor {tensor.name[:200]!r}"
        if tensor.name in names:
            raise _corrupt("name occurs twice", place)
        names.add(tensor.name)
        # Rank and sizes first: the product of a long list of large numbers has no bound of its own.
        if len(tensor.shape) > SHAPE_RANK_MAX or not all(0 <= size <= TENSOR_BYTES_MAX for size in tensor.shape):
            raise _corrupt("shape is not a list of sizes", place)
        if tensor_bytes(tensor.dtype, tensor.shape) != tensor.length:
            raise _corrupt(f"{tensor.dtype[:40]!r} of this shape does not have {tensor.length} bytes", place)
        order = (tensor.offset, tensor.length, tensor.name)
        if order < before or tensor.offset < end:
            raise _corrupt("overlaps its neighbour or is out of order", place)
        if tensor.offset + tensor.length > entry.size:
            raise _corrupt("extent is outside of the file", place)
        end, before = tensor.offset + tensor.length, order

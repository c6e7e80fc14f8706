"""The format's test vectors, read by a reader written from docs/reference/format.md alone, and by Snowdrop.

The first half of this file must not use Snowdrop: it shows that the page is enough to write a second reader from.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from snowdrop.content.codec import decode
from snowdrop.content.keys import PUBLIC_KEYRING, Keyring, key_domain
from snowdrop.content.manifest import decode_manifest, encode_manifest
from snowdrop.content.refs import verify_ref
from snowdrop.content.signing import TrustedKeys
from snowdrop.domain.errors import CorruptContentError, SnowdropError
from snowdrop.domain.manifest import Manifest

VECTORS = Path(__file__).resolve().parents[1] / "data" / "format"


class RefusedError(Exception):
    pass


def must(holds: bool, rule: str) -> None:
    if not holds:
        raise RefusedError(rule)


# ---- a reader of the format, from its page

CHUNK_MAX, PACK_MAX, MANIFEST_MAX, NUMBER_MAX = 4_194_304, 67_108_864, 67_108_864, 2**53
BITS = {
    **dict.fromkeys(["F4"], 4),
    **dict.fromkeys(["F6_E2M3", "F6_E3M2"], 6),
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"], 8),
    **dict.fromkeys(["I16", "U16", "F16", "BF16"], 16),
    **dict.fromkeys(["I32", "U32", "F32"], 32),
    **dict.fromkeys(["I64", "U64", "F64", "C64"], 64),
}


def h(data: bytes, key: bytes | None) -> str:
    return (blake3(data) if key is None else blake3(data, key=key)).hexdigest()


def domain_of(key: bytes | None) -> str:
    if key is None:
        return "public"
    return "t-" + blake3(key, derive_key_context="snowdrop 2026 content key id v1").digest(length=16).hex()


def is_hex(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def number(value: object, low: int = 0, high: int = NUMBER_MAX) -> bool:
    return type(value) is int and low <= value <= high


def row(value: object, kinds: list[type]) -> bool:
    return isinstance(value, list) and [type(item) for item in value] == kinds


def fields(value: object, names: str) -> None:
    must(isinstance(value, dict) and list(value) == names.split(), f"keys are {names}")


def canonical(data: bytes, limit: int) -> Any:
    must(len(data) <= limit, "size")
    must(data.count(b"[") + data.count(b"{") <= 2_000_000 and data.count(b",") <= 8_000_000, "counts")
    try:
        value = json.loads(data.decode())
        again = json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"JSON: {error}") from error
    must(again == data, "canonical")
    return value


def read_manifest(data: bytes, domain: str) -> Any:
    value = canonical(data, MANIFEST_MAX)
    fields(value, "version kind key_domain files chunks packs")
    must(value["version"] == 2 and type(value["version"]) is int, "version")
    must(value["kind"] in {"model", "code", "image"}, "kind")
    must(value["key_domain"] == domain, "key domain")
    files, chunks, packs = value["files"], value["chunks"], value["packs"]
    must(all(isinstance(part, list) for part in (files, chunks, packs)) and len(files) <= 1_000_000, "lists")
    for pack in packs:
        must(row(pack, [str, int]) and is_hex(pack[0]) and number(pack[1], 1, PACK_MAX), "pack")
    for chunk in chunks:
        check_chunk(chunk, packs)
    must(len({pack[0] for pack in packs}) == len(packs), "a pack twice")
    must(len({chunk[0] for chunk in chunks}) == len(chunks), "a chunk twice")
    must({chunk[2] for chunk in chunks} == set(range(len(packs))), "a pack of no chunk")
    for file in files:
        check_file(file, chunks, value["kind"])
    must(
        {extent[2] for file in files for extent in file["extents"]} == set(range(len(chunks))), "chunk of no file"
    )
    must(sum(file["size"] for file in files) <= NUMBER_MAX, "total")
    check_paths([file["path"] for file in files])
    return value


def check_chunk(chunk: Any, packs: Any) -> None:
    must(row(chunk, [str, int, int, int, int, str]), "chunk")
    digest, plain_bytes, pack, pack_offset, stored_bytes, codec = chunk
    must(is_hex(digest) and number(plain_bytes, 1, CHUNK_MAX) and number(pack, 0, len(packs) - 1), "chunk")
    must(number(stored_bytes, 1) and number(pack_offset) and pack_offset + stored_bytes <= packs[pack][1], "place")
    must(codec in {"plain", "zstd"}, "codec")
    must(stored_bytes == plain_bytes if codec == "plain" else stored_bytes < plain_bytes, "stored length")


def check_file(file: Any, chunks: Any, kind: str) -> None:
    fields(file, "path size mode sha256 extents tensors")
    must(number(file["size"]) and is_hex(file["sha256"]), "file")
    must(number(file["mode"], 0, 0o7777 if kind == "image" else 0o755), "mode")
    must(kind == "image" or file["mode"] in {420, 493}, "mode")
    must(isinstance(file["extents"], list) and isinstance(file["tensors"], list), "lists")
    cursor = 0
    for extent in file["extents"]:
        must(row(extent, [int] * 4), "extent")
        file_offset, length, chunk, chunk_offset = extent
        must(file_offset == cursor and length > 0 and number(chunk, 0, len(chunks) - 1), "extent")
        must(number(chunk_offset) and chunk_offset + length <= chunks[chunk][1], "extent in its chunk")
        cursor += length
    must(cursor == file["size"], "cover")
    end, before, names = 0, (-1, -1, b""), set()
    for tensor in file["tensors"]:
        fields(tensor, "name dtype shape offset length")
        name, shape, offset, length = tensor["name"], tensor["shape"], tensor["offset"], tensor["length"]
        must(isinstance(name, str) and name not in names and tensor["dtype"] in BITS, "tensor")
        must(isinstance(shape, list) and len(shape) <= 64 and all(map(number, shape)), "shape")
        must(number(offset) and number(length) and offset + length <= file["size"], "tensor in its file")
        bits = BITS[tensor["dtype"]]
        for size in shape:
            bits *= size
        must(bits == 8 * length, "tensor's length")
        must(offset >= end and (offset, length, name.encode()) > before, "order of tensors")
        end, before = offset + length, (offset, length, name.encode())
        names.add(name)


def check_paths(paths: list[Any]) -> None:
    for path in paths:
        must(isinstance(path, str) and 1 <= len(path.encode()) <= 4096 and "\0" not in path, "path")
        parts = path.split("/")
        must(all(part not in {"", ".", ".."} and len(part.encode()) <= 255 for part in parts), "path")
    directories = {"/".join(path.split("/")[:count]) for path in paths for count in range(1, path.count("/") + 1)}
    must(len(set(paths)) == len(paths) and not directories & set(paths), "paths clash")


def read_stored(stored: bytes, plain_bytes: int) -> bytes:
    """RFC 8878, 3.1.1: the frame's header and blocks are walked, then libzstd decodes it."""
    try:
        must(stored[:4] == b"\x28\xb5\x2f\xfd", "an ordinary frame")
        about = zstandard.get_frame_parameters(stored)
        must(about.content_size == plain_bytes and not about.dict_id and about.window_size <= CHUNK_MAX, "header")
        at, last = zstandard.frame_header_size(stored), 0
        while not last:
            must(at + 3 <= len(stored), "cut short")
            block = int.from_bytes(stored[at : at + 3], "little")
            last, at = block & 1, at + 3 + (1 if block >> 1 & 3 == 1 else block >> 3)
        must(at + 4 * about.has_checksum == len(stored), "ends where the frame ends")
        plain = zstandard.ZstdDecompressor().decompress(stored, max_output_size=plain_bytes)
    except zstandard.ZstdError as error:
        raise RefusedError(f"zstd: {error}") from error
    must(len(plain) == plain_bytes, "length")
    return plain


def read_tree(objects: dict[str, bytes], artefact: str, key: bytes | None) -> dict[str, tuple[int, bytes]]:
    """Every file of a tree: its mode and its bytes."""
    domain, name = domain_of(key), artefact.removeprefix("blake3:")
    data = objects[f"{domain}/manifests/{name[:2]}/{name}"]
    must(h(data, key) == name, "the manifest's name")
    manifest = read_manifest(data, domain)
    plain = []
    for digest, plain_bytes, pack, offset, stored_bytes, codec in manifest["chunks"]:
        pack_name = manifest["packs"][pack][0]
        stored = objects[f"{domain}/packs/{pack_name[:2]}/{pack_name}"][offset : offset + stored_bytes]
        plain.append(stored if codec == "plain" else read_stored(stored, plain_bytes))
        must(h(plain[-1], key) == digest, "the chunk's name")
    files = {}
    for file in manifest["files"]:
        parts = [plain[chunk][start : start + length] for _, length, chunk, start in file["extents"]]
        files[file["path"]] = (file["mode"], b"".join(parts))
        must(hashlib.sha256(files[file["path"]][1]).hexdigest() == file["sha256"], "the file's SHA-256")
    return files


def believes(data: bytes, public_key: bytes) -> bool:
    try:
        value = canonical(data, 4096)
        fields(value, "ref signature")
        ref = value["ref"]
        names = (
            "version name tenant key_domain manifest kind total_bytes file_count generation created_unix_ns key_id"
        )
        fields(ref, names)
        must(ref["version"] == 1 and ref["key_id"] == h(public_key, None)[:16], "version, key")
        for part in ("name", "tenant"):
            must(re.fullmatch("[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", ref[part]) is not None, part)
        for part in ("total_bytes", "file_count", "generation", "created_unix_ns"):
            must(number(ref[part], part == "generation", 2**62), part)
        must(re.fullmatch("[0-9a-f]{128}", value["signature"]) is not None, "signature")
        signed = b"snowdrop ref 1\0" + data[len(b'{"ref":') : data.rindex(b',"signature":"')]
        Ed25519PublicKey.from_public_bytes(public_key).verify(bytes.fromhex(value["signature"]), signed)
    except (RefusedError, InvalidSignature):
        return False
    return True


# ---- both readers over the vectors


def vectors(name: str) -> list[Any]:
    loaded: list[Any] = json.loads((VECTORS / f"{name}.json").read_text())
    return loaded


TREES, MANIFESTS, STORED, REFS = (vectors(name) for name in ("trees", "manifests", "stored", "refs"))


def objects_of(tree: Any) -> dict[str, bytes]:
    return {place: base64.b64decode(data) for place, data in tree["objects"].items()}


def key_of(tree: Any) -> bytes | None:
    return bytes.fromhex(tree["key"]) if tree["key"] else None


def snowdrop_manifest(tree: Any, data: bytes) -> Manifest:
    key = key_of(tree)
    ring = PUBLIC_KEYRING if key is None else Keyring({key_domain(key): key})
    return decode_manifest(data, expected=tree["artefact"], hasher=ring.hasher(tree["key_domain"]))


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree["title"])
def test_both_readers_read_the_trees(tree: Any) -> None:
    objects, name = objects_of(tree), tree["artefact"].removeprefix("blake3:")
    files = read_tree(objects, tree["artefact"], key_of(tree))
    told = {path: (mode, hashlib.sha256(data).hexdigest()) for path, (mode, data) in files.items()}
    assert told == {path: (file["mode"], file["sha256"]) for path, file in tree["files"].items()}
    encoded = objects[f"{tree['key_domain']}/manifests/{name[:2]}/{name}"]
    manifest = snowdrop_manifest(tree, encoded)
    assert {entry.path: (entry.mode, entry.sha256) for entry in manifest.files} == told
    assert encode_manifest(manifest) == encoded


@pytest.mark.parametrize("vector", MANIFESTS, ids=lambda vector: vector["breaks"])
def test_both_readers_refuse_what_breaks_a_rule(vector: Any) -> None:
    data = base64.b64decode(vector["manifest"])
    with pytest.raises(RefusedError):
        read_manifest(data, "public")
    with pytest.raises(CorruptContentError):
        decode_manifest(data)


@pytest.mark.parametrize("vector", STORED, ids=lambda vector: vector["title"])
def test_both_readers_agree_on_stored_chunks(vector: Any) -> None:
    stored, size = base64.b64decode(vector["stored"]), vector["plain_bytes"]
    into = bytearray(size)
    if vector["plain"] is None:
        with pytest.raises(RefusedError):
            read_stored(stored, size)
        with pytest.raises(CorruptContentError):
            decode("zstd", memoryview(stored), memoryview(into))
    else:
        decode("zstd", memoryview(stored), memoryview(into))
        assert read_stored(stored, size) == into == base64.b64decode(vector["plain"])


@pytest.mark.parametrize("vector", REFS, ids=lambda vector: vector["title"])
def test_both_readers_believe_the_same_refs(vector: Any) -> None:
    data, public = base64.b64decode(vector["ref"]), bytes.fromhex(vector["public_key"])
    assert believes(data, public) is vector["believed"]
    trusted = TrustedKeys({h(public, None)[:16]: public})
    if vector["believed"]:
        assert verify_ref(data, trusted, where="vector").name == "minilm"
    else:
        with pytest.raises(SnowdropError):
            verify_ref(data, trusted, where="vector")


def test_every_flipped_byte_of_every_object_is_noticed() -> None:
    for tree in TREES:
        right = read_tree(objects_of(tree), tree["artefact"], key_of(tree))
        for place, data in objects_of(tree).items():
            for at in range(len(data)):
                objects = objects_of(tree)
                objects[place] = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
                try:
                    read = read_tree(objects, tree["artefact"], key_of(tree))
                except RefusedError:
                    continue
                assert "foreign" in tree["title"], f"{tree['title']}: byte {at} of {place}"
                assert read == right


def test_the_vectors_are_what_the_script_makes() -> None:
    spec = importlib.util.spec_from_file_location("make_vectors", VECTORS / "make_vectors.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name in ("trees", "manifests", "refs"):
        assert json.loads(json.dumps(list(getattr(script, name)()))) == vectors(name)
    # Another libzstd may compress to other bytes.
    assert [vector["title"] for vector in script.stored()] == [vector["title"] for vector in STORED]

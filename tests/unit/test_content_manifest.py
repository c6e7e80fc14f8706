from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from snowdrop.content.keys import PUBLIC_KEYRING, Keyring, chunk_hasher, key_domain
from snowdrop.content.manifest import decode_manifest, encode_manifest, manifest_digest
from snowdrop.domain.errors import CorruptContentError, IntegrityError, NotFoundError
from snowdrop.domain.manifest import FORMAT_VERSION, ChunkRef, Extent, FileEntry, Manifest, PackRef, TensorEntry

HEX = "0" * 64
TENSOR = TensorEntry(name="t", dtype="U8", shape=(8,), offset=0, length=8)
FILE = FileEntry(
    path="a/b",
    size=16,
    mode=0o644,
    sha256=HEX,
    extents=(Extent(0, 10, 0, 0), Extent(10, 6, 1, 0)),
    tensors=(TENSOR,),
)
GOOD = Manifest(
    version=FORMAT_VERSION,
    kind="model",
    key_domain="public",
    files=(FILE,),
    chunks=(ChunkRef(HEX, 10, 0, 0, 10), ChunkRef("1" * 64, 6, 0, 10, 6)),
    packs=(PackRef(HEX, 16),),
)


def with_file(**changes: Any) -> Manifest:
    return msgspec.structs.replace(GOOD, files=(msgspec.structs.replace(FILE, **changes),))


def with_chunk(*values: Any) -> Manifest:
    return msgspec.structs.replace(GOOD, chunks=(ChunkRef(*values), GOOD.chunks[1]))


def with_tensor(**changes: Any) -> Manifest:
    return with_file(tensors=(msgspec.structs.replace(TENSOR, **changes),))


def test_the_good_one_is_good() -> None:
    assert decode_manifest(encode_manifest(GOOD)) == GOOD


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("", "is empty"),
        ("/etc/passwd", "is absolute"),
        ("../up", "escapes its tree"),
        ("a/../../b", "escapes its tree"),
        ("a//b", "empty or"),
        ("./a", "empty or"),
        ("a/.", "empty or"),
        ("a/", "empty or"),
        ("a\0b", "NUL"),
        ("x" * 300, "component_bytes_max"),
        ("a/" * 3000 + "b", "path_bytes_max"),
    ],
)
def test_a_hostile_path_is_refused_by_name(path: str, said: str) -> None:
    with pytest.raises(CorruptContentError, match=said) as caught:
        decode_manifest(msgspec.json.encode(with_file(path=path)))
    assert caught.value.where == ascii(path[:200])


BROKEN: dict[str, tuple[Callable[[], Manifest], str]] = {
    "version": (lambda: msgspec.structs.replace(GOOD, version=FORMAT_VERSION + 1), "version"),
    "key domain": (lambda: msgspec.structs.replace(GOOD, key_domain="../x"), "key_domain"),
    "another key domain": (lambda: msgspec.structs.replace(GOOD, key_domain="t-" + "0" * 32), "key_domain"),
    "key domain of no form": (lambda: msgspec.structs.replace(GOOD, key_domain="t-" + "0" * 31), "key_domain"),
    "mode": (lambda: with_file(mode=0o4755), "a/b"),
    "sha256": (lambda: with_file(sha256="x"), "a/b"),
    "gap": (lambda: with_file(extents=(Extent(0, 10, 0, 0), Extent(11, 5, 1, 0))), "byte 10"),
    "overlap": (lambda: with_file(extents=(Extent(0, 10, 0, 0), Extent(9, 7, 1, 0))), "byte 10"),
    "not covered": (lambda: with_file(size=17), "a/b"),
    "negative": (lambda: with_file(size=-1, extents=()), "a/b"),
    "no such chunk": (lambda: with_file(extents=(Extent(0, 10, 0, 0), Extent(10, 6, 2, 0))), "byte 10"),
    "over its chunk": (lambda: with_file(extents=(Extent(0, 10, 0, 0), Extent(10, 6, 1, 1))), "byte 10"),
    "before its chunk": (lambda: with_file(extents=(Extent(0, 10, 0, -1), Extent(10, 6, 1, 0))), "byte 0"),
    "chunk digest": (lambda: with_chunk("Z" * 64, 10, 0, 0, 10), "chunk 0"),
    "chunk too large": (lambda: with_chunk(HEX, 5 << 20, 0, 0, 5 << 20), "chunk 0"),
    "chunk stored": (lambda: with_chunk(HEX, 10, 0, 0, 9), "chunk 0"),
    "compressed, no smaller": (lambda: with_chunk(HEX, 10, 0, 0, 10, "zstd"), "chunk 0"),
    "compressed to nothing": (lambda: with_chunk(HEX, 10, 0, 0, 0, "zstd"), "chunk 0"),
    "chunk twice": (lambda: with_chunk("1" * 64, 10, 0, 0, 10), "chunks"),
    "unused pack": (lambda: msgspec.structs.replace(GOOD, packs=(*GOOD.packs, PackRef("2" * 64, 1))), "packs"),
    "pack twice": (
        lambda: msgspec.structs.replace(
            GOOD,
            chunks=(GOOD.chunks[0], ChunkRef("1" * 64, 6, 1, 10, 6)),
            packs=(PackRef(HEX, 16), PackRef(HEX, 16)),
        ),
        "packs",
    ),
    "chunk in no pack": (lambda: with_chunk(HEX, 10, 1, 0, 10), "chunk 0"),
    "chunk over its pack": (lambda: with_chunk(HEX, 10, 0, 7, 10), "chunk 0"),
    "chunk before its pack": (lambda: with_chunk(HEX, 10, 0, -1, 10), "chunk 0"),
    "unused chunk": (lambda: with_file(size=10, extents=(Extent(0, 10, 0, 0),)), "chunks"),
    "pack too large": (lambda: msgspec.structs.replace(GOOD, packs=(PackRef(HEX, 65 << 20),)), "pack 0"),
    "same path": (lambda: msgspec.structs.replace(GOOD, files=(FILE, FILE)), "a/b"),
    "file and directory": (
        lambda: msgspec.structs.replace(GOOD, files=(FILE, msgspec.structs.replace(FILE, path="a"))),
        "a",
    ),
    "tensor outside": (lambda: with_tensor(offset=9), "tensor 't'"),
    "tensor size": (lambda: with_tensor(shape=(9,)), "tensor 't'"),
    "tensor dtype": (lambda: with_tensor(dtype="X"), "tensor 't'"),
    "tensor twice": (lambda: with_file(tensors=(TENSOR, TENSOR)), "tensor 't'"),
    "tensors overlap": (
        lambda: with_file(tensors=(TENSOR, msgspec.structs.replace(TENSOR, name="u", offset=7))),
        "tensor 'u'",
    ),
    "tensors out of order": (
        lambda: with_file(tensors=(msgspec.structs.replace(TENSOR, name="u", offset=8), TENSOR)),
        "tensor 't'",
    ),
    "tensor of absurd rank": (lambda: with_tensor(shape=(1 << 60,) * 100_000), "tensor 't'"),
    "tensor of absurd size": (lambda: with_tensor(shape=(1 << 63, 0), length=0), "tensor 't'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_refused_with_its_place(name: str) -> None:
    make, place = BROKEN[name]
    with pytest.raises(CorruptContentError) as caught:
        decode_manifest(msgspec.json.encode(make()))
    assert place in caught.value.where


def test_an_unknown_codec_is_refused() -> None:
    data = msgspec.json.encode(GOOD).replace(b'"plain"', b'"brotli"', 1)
    with pytest.raises(CorruptContentError, match="undecodable"):
        decode_manifest(data)


def test_a_manifest_over_its_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snowdrop.content.manifest.MANIFEST_BYTES_MAX", 100)
    with pytest.raises(CorruptContentError, match="manifest_bytes_max"):
        decode_manifest(msgspec.json.encode(GOOD))


@pytest.mark.parametrize(("limit", "said"), [("BRACKETS_MAX", "brackets_max"), ("COMMAS_MAX", "commas_max")])
def test_counts_are_bounded_before_anything_is_decoded(
    monkeypatch: pytest.MonkeyPatch, limit: str, said: str
) -> None:
    monkeypatch.setattr(f"snowdrop.content.manifest.{limit}", 10)
    monkeypatch.setattr("snowdrop.content.manifest._DECODER", None)
    with pytest.raises(CorruptContentError, match=said):
        decode_manifest(msgspec.json.encode(GOOD))


def test_a_manifest_of_version_1_says_that_it_must_be_pushed_again() -> None:
    with pytest.raises(CorruptContentError, match="push it again") as caught:
        decode_manifest(msgspec.json.encode(msgspec.structs.replace(GOOD, version=1)))
    assert caught.value.where == "manifest: version"


def test_a_private_manifest_needs_its_key_and_its_name_is_keyed() -> None:
    key, other = b"k" * 32, b"o" * 32
    ring = Keyring({key_domain(key): key, key_domain(other): other})
    private = msgspec.structs.replace(GOOD, key_domain=key_domain(key))
    data = encode_manifest(private)
    hasher = chunk_hasher(private, ring)
    digest = manifest_digest(data, hasher)
    assert digest != manifest_digest(data)
    assert decode_manifest(data, expected=digest, hasher=hasher) == private
    assert decode_manifest(data, hasher=None) == private
    with pytest.raises(IntegrityError):
        decode_manifest(data, expected=digest)
    with pytest.raises(IntegrityError):
        decode_manifest(data, expected=digest, hasher=ring.hasher(key_domain(other)))
    with pytest.raises(NotFoundError, match="key"):
        chunk_hasher(private, PUBLIC_KEYRING)

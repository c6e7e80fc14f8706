from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from snowdrop.content.manifest import decode_manifest, encode_manifest
from snowdrop.domain.errors import CorruptContentError
from snowdrop.domain.manifest import ChunkRef, Extent, FileEntry, Manifest, PackRef, TensorEntry

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
    version=1,
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
    "version": (lambda: msgspec.structs.replace(GOOD, version=2), "version"),
    "key domain": (lambda: msgspec.structs.replace(GOOD, key_domain="../x"), "key_domain"),
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

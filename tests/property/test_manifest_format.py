import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snowdrop.content.manifest import decode_manifest, encode_manifest, manifest_digest
from snowdrop.content.paths import parse_tree_path
from snowdrop.content.safetensors import read_header
from snowdrop.domain.errors import CorruptContentError, IntegrityError, SnowdropError
from snowdrop.domain.manifest import FORMAT_VERSION, ChunkRef, Extent, FileEntry, Manifest, PackRef, TensorEntry

HEX = st.text("0123456789abcdef", min_size=64, max_size=64)
NAMES = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=12
).filter(lambda name: name not in {".", ".."})


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    sizes = draw(st.lists(st.integers(1, 4 << 20), max_size=6))
    digests = draw(st.lists(HEX, min_size=len(sizes), max_size=len(sizes), unique=True))
    chunks, offset = [], 0
    for size, digest in zip(sizes, digests, strict=True):
        packed = draw(st.integers(1, size))
        chunks.append(ChunkRef(digest, size, 0, offset, packed, "plain" if packed == size else "zstd"))
        offset += packed
    packs = (PackRef(draw(HEX), offset),) if sizes else ()
    names = draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    files = []
    for index, name in enumerate(names):
        extents, cursor = [], 0
        wanted = range(len(sizes)) if index == 0 else draw(st.lists(st.integers(0, 5), max_size=3))
        for chunk in [chunk for chunk in wanted if chunk < len(sizes)]:
            extents.append(Extent(cursor, sizes[chunk], chunk, 0))
            cursor += sizes[chunk]
        tensors = (
            (TensorEntry(name=draw(NAMES), dtype="U8", shape=(cursor,), offset=0, length=cursor),)
            if cursor
            else ()
        )
        files.append(
            FileEntry(
                path=f"d{index}/{name}",
                size=cursor,
                mode=draw(st.sampled_from([0o644, 0o755])),
                sha256=draw(HEX),
                extents=tuple(extents),
                tensors=tensors,
            )
        )
    return Manifest(
        version=FORMAT_VERSION,
        kind="model",
        key_domain="public",
        files=tuple(files),
        chunks=tuple(chunks),
        packs=packs,
    )


@given(manifests())
def test_decoding_gives_back_what_was_encoded(manifest: Manifest) -> None:
    data = encode_manifest(manifest)
    assert decode_manifest(data, expected=manifest_digest(data)) == manifest


@given(manifests(), st.data())
@settings(max_examples=200)
def test_a_changed_byte_is_refused_by_digest_and_never_breaks_the_decoder(
    manifest: Manifest, data: st.DataObject
) -> None:
    encoded = bytearray(encode_manifest(manifest))
    digest = manifest_digest(bytes(encoded))
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(IntegrityError):
        decode_manifest(bytes(encoded), expected=digest)
    try:
        other = decode_manifest(bytes(encoded))
    except CorruptContentError:
        return
    assert encode_manifest(other) == encoded


@given(st.binary(max_size=200))
def test_any_bytes_are_a_manifest_or_a_typed_error(data: bytes) -> None:
    with pytest.raises(SnowdropError):
        decode_manifest(data)


@given(manifests())
def test_another_spelling_of_the_same_manifest_is_refused(manifest: Manifest) -> None:
    data = msgspec.json.format(encode_manifest(manifest), indent=1)
    with pytest.raises(CorruptContentError, match="canonical"):
        decode_manifest(data)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_safetensors_header_or_a_typed_error(data: bytes) -> None:
    framed = min(len(data), 255).to_bytes(8, "little") + data
    try:
        header = read_header(lambda offset, length: framed[offset : offset + length], len(framed), where="f")
    except CorruptContentError:
        return
    assert header.data_offset <= len(framed)


@given(st.text(max_size=40))
def test_an_accepted_path_stays_below_its_root(text: str) -> None:
    try:
        path = parse_tree_path(text)
    except CorruptContentError:
        return
    parts = path.split("/")
    assert all(part not in {"", ".", ".."} for part in parts)
    assert "\0" not in path

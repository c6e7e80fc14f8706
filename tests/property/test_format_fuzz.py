"""What must hold for any bytes: nothing wrong is believed, and nothing hostile costs more than it is long."""

from __future__ import annotations

import json
import tempfile
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from content_helpers import framed, rebuilt
from snowdrop.content.codec import decode, encode
from snowdrop.content.ingest import Compress, IngestIndex, PushOptions, PushResult, push_source
from snowdrop.content.ingest.directory import DirectorySource
from snowdrop.content.keys import Keyring, chunk_hasher, key_domain
from snowdrop.content.layout import manifest_key
from snowdrop.content.manifest import decode_manifest, encode_manifest
from snowdrop.content.origin import MemoryOrigin
from snowdrop.content.safetensors import HEADER_BYTES_MAX, read_header
from snowdrop.content.source import bad_chunks
from snowdrop.domain.errors import CorruptContentError, IntegrityError
from snowdrop.domain.manifest import Manifest

KEY = bytes(range(32))
RING = Keyring({key_domain(KEY): KEY})
BLOCKS = st.sampled_from([b"", b"a", b"weights " * 300, bytes(5000), bytes(range(256)) * 30])
CONTENTS = st.lists(st.one_of(BLOCKS, st.binary(max_size=300)), max_size=4).map(b"".join)
PATHS = st.sampled_from(["a", "b.json", "c/d", "c/e", "f.bin", "\u00e9/1", "\u00e9/2"])
TREES = st.dictionaries(PATHS, CONTENTS, min_size=1, max_size=5)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
JSON: st.SearchStrategy[Any] = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner))
)


def pushed(tree: dict[str, bytes], origin: MemoryOrigin, options: PushOptions, *, times: int = 1) -> PushResult:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "tree"
        for path, data in tree.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)
        index = IngestIndex(Path(folder) / "ingest.db", "memory:", options.hasher.domain)
        results = [
            push_source(DirectorySource(root, ignored=()), origin, options, index=index) for _ in range(times)
        ]
        index.close()
    return results[-1]


def manifest_of(origin: MemoryOrigin, result: PushResult) -> tuple[bytes, Manifest]:
    artefact = result.artefact
    data = origin.objects[manifest_key(artefact.key_domain, artefact.manifest)]
    return data, decode_manifest(data, expected=artefact.manifest, hasher=RING.hasher(artefact.key_domain))


@given(TREES, st.sampled_from(["none", "zstd", "auto"]), st.sampled_from(RING.domains))
@settings(max_examples=40, deadline=None)
def test_any_tree_comes_back_as_it_was_and_is_stored_once(
    tree: dict[str, bytes], compress: Compress, domain: str
) -> None:
    origin, options = MemoryOrigin(), PushOptions(compress=compress, hasher=RING.hasher(domain))
    result = pushed(tree, origin, options)
    assert rebuilt(origin, result.artefact, options.hasher) == tree
    before = dict(origin.objects)
    again = pushed(tree, origin, options, times=2)
    assert (again.artefact, again.new_bytes, again.read_bytes) == (result.artefact, 0, 0)
    assert origin.objects == before


@given(TREES, st.sampled_from(["none", "zstd"]), st.sampled_from(RING.domains), st.data())
@settings(max_examples=60, deadline=None)
def test_any_changed_byte_of_a_pack_is_noticed_when_it_is_read(
    tree: dict[str, bytes], compress: Compress, domain: str, data: st.DataObject
) -> None:
    origin, options = MemoryOrigin(), PushOptions(compress=compress, hasher=RING.hasher(domain))
    _, manifest = manifest_of(origin, pushed(tree, origin, options))
    hasher = chunk_hasher(manifest, RING)
    packs = [origin.objects[f"{domain}/packs/{pack.digest[:2]}/{pack.digest}"] for pack in manifest.packs]
    if not packs:
        return
    pack = data.draw(st.integers(0, len(packs) - 1))
    at = data.draw(st.integers(0, len(packs[pack]) - 1))
    damaged = bytearray(packs[pack])
    damaged[at] ^= data.draw(st.integers(1, 255))
    assert hasher.hexdigest(damaged) != manifest.packs[pack].digest
    hit = [
        index
        for index, chunk in enumerate(manifest.chunks)
        if chunk.pack == pack and chunk.pack_offset <= at < chunk.pack_offset + chunk.stored_bytes
    ]
    assert len(hit) == 1
    chunk, plain = manifest.chunks[hit[0]], bytearray(manifest.chunks[hit[0]].plain_bytes)
    stored = memoryview(damaged)[chunk.pack_offset : chunk.pack_offset + chunk.stored_bytes]
    try:
        decode(chunk.codec, stored, memoryview(plain))
    except CorruptContentError:
        return
    if bad_chunks(manifest, hit[0], 1, memoryview(plain), hasher) != hit:
        # A compressed form may change without its content: then the content is still the right one.
        assert chunk.codec == "zstd"
        original = bytearray(chunk.plain_bytes)
        whole = memoryview(packs[pack])[chunk.pack_offset : chunk.pack_offset + chunk.stored_bytes]
        decode(chunk.codec, whole, memoryview(original))
        assert plain == original


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def mutate(value: Any, data: st.DataObject) -> None:
    """Changes one place of a JSON value."""
    place = data.draw(st.sampled_from([place for place in places(value) if place]))
    inside = value
    for key in place[:-1]:
        inside = inside[key]
    key, current = place[-1], inside[place[-1]]
    kind = data.draw(st.sampled_from(["replace", "remove", "double", "nudge"]))
    if kind == "remove":
        inside.pop(key)
    elif kind == "nudge" and type(current) is int:
        inside[key] = current + data.draw(st.sampled_from([-1, 1, 1 << 31, -current, 1 << 53]))
    elif kind == "double" and isinstance(current, list) and current:
        current.append(current[data.draw(st.integers(0, len(current) - 1))])
    else:
        inside[key] = data.draw(JSON)


@given(TREES, st.data())
@settings(max_examples=150, deadline=None)
def test_any_changed_field_of_a_manifest_is_refused_by_name_and_what_is_taken_is_whole(
    tree: dict[str, bytes], data: st.DataObject
) -> None:
    origin = MemoryOrigin()
    encoded, _ = manifest_of(origin, pushed(tree, origin, PushOptions()))
    value = json.loads(encoded)
    for _ in range(data.draw(st.integers(1, 3))):
        mutate(value, data)
    try:
        mutated = json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    if mutated == encoded:
        return
    with pytest.raises(IntegrityError):
        decode_manifest(mutated, expected=origin_name(origin))
    try:
        taken = decode_manifest(mutated)
    except CorruptContentError:
        return
    assert encode_manifest(taken) == mutated
    for entry in taken.files:
        assert sum(extent.length for extent in entry.extents) == entry.size
        for extent in entry.extents:
            assert 0 <= extent.chunk_offset <= taken.chunks[extent.chunk].plain_bytes - extent.length
    for chunk in taken.chunks:
        assert 0 <= chunk.pack_offset <= taken.packs[chunk.pack].size - chunk.stored_bytes


def origin_name(origin: MemoryOrigin) -> Any:
    return "blake3:" + next(key for key in origin.objects if "/manifests/" in key).rpartition("/")[2]


HOSTILE_JSON = st.sampled_from(
    [
        b"[",
        b"{",
        b'{"a":',
        b"[[],",
        b"[0,",
        b'"',
        b'"\\u0000',
        b"1",
        b"-",
        b"null,",
        b'{"files":[',
        b"[{},",
        b"9" * 50,
    ]
)


@given(HOSTILE_JSON, st.integers(0, 20_000))
@example(b'{"files":[', 20_000)
@settings(max_examples=60, deadline=None)
def test_memory_for_any_manifest_is_bounded_by_its_length(unit: bytes, count: int) -> None:
    data = unit * count
    tracemalloc.start()
    try:
        with pytest.raises(CorruptContentError):
            decode_manifest(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= 200_000 + 64 * len(data)


@given(st.binary(max_size=400), st.integers(1, 2000))
@settings(max_examples=200)
def test_any_bytes_are_a_stored_chunk_or_refused_and_nothing_around_is_touched(stored: bytes, size: int) -> None:
    around = bytearray(b"#" * (size + 64))
    for data in (stored, b"\x28\xb5\x2f\xfd" + stored):
        with suppress(CorruptContentError):
            decode("zstd", memoryview(data), memoryview(around)[32 : 32 + size])
        assert around[:32] == around[-32:] == b"#" * 32


@given(st.binary(min_size=100, max_size=3000), st.data())
@settings(max_examples=200)
def test_any_changed_frame_decodes_to_its_length_or_is_refused(plain: bytes, data: st.DataObject) -> None:
    stored = bytearray(encode("zstd", plain * 3))
    at = data.draw(st.integers(0, len(stored) - 1))
    stored[at] ^= data.draw(st.integers(1, 255))
    into = bytearray(3 * len(plain))
    try:
        decode("zstd", memoryview(stored), memoryview(into))
    except CorruptContentError:
        return
    assert zstandard.ZstdDecompressor().decompress(bytes(stored)) == into


VALUES = st.one_of(
    JSON,
    st.fixed_dictionaries(
        {
            "dtype": st.one_of(st.sampled_from(["U8", "F32", "BF16", "F4", "C64", "X"]), SCALARS),
            "shape": st.one_of(
                st.lists(st.integers(-1, 9), max_size=3), st.lists(st.integers(), max_size=70), JSON
            ),
            "data_offsets": st.one_of(st.tuples(st.integers(-1, 64), st.integers(0, 64)), JSON),
        }
    ),
)


HEADERS = st.dictionaries(st.one_of(st.text(max_size=5), st.just("__metadata__")), VALUES, max_size=4)


@given(HEADERS, st.integers(0, 64))
@example({"a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}, 12)
@settings(max_examples=300)
def test_any_header_is_whole_or_refused(table: dict[str, Any], body: int) -> None:
    try:
        data = framed(json.dumps(table).encode(), bytes(body))
    except UnicodeEncodeError:
        return
    try:
        header = read_header(lambda offset, length: data[offset : offset + length], len(data), where="f")
    except CorruptContentError:
        return
    cursor = header.data_offset
    for tensor in header.tensors:
        assert tensor.offset == cursor
        cursor += tensor.length
    assert cursor == len(data)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**54))
@example(HEADER_BYTES_MAX + 1, 2**54)
@example(HEADER_BYTES_MAX, HEADER_BYTES_MAX)
def test_no_more_is_read_than_a_header_may_have_and_the_file_has(claimed: int, file_bytes: int) -> None:
    asked: list[tuple[int, int]] = []

    def read(offset: int, length: int) -> bytes:
        asked.append((offset, length))
        return claimed.to_bytes(8, "little") if offset == 0 else b""

    with pytest.raises(CorruptContentError):
        read_header(read, file_bytes, where="f")
    assert all(length <= HEADER_BYTES_MAX and offset + length <= file_bytes for offset, length in asked)


@given(HOSTILE_JSON, st.integers(0, 20_000))
@settings(max_examples=60, deadline=None)
def test_memory_for_any_header_is_bounded_by_its_length(unit: bytes, count: int) -> None:
    data = framed(unit * count)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptContentError):
            read_header(lambda offset, length: data[offset : offset + length], len(data), where="f")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= 200_000 + 150 * len(data)


@pytest.mark.parametrize("limit", ["BRACKETS_MAX", "COMMAS_MAX"])
def test_a_header_is_counted_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(f"snowdrop.content.safetensors.{limit}", 3)
    monkeypatch.setattr("snowdrop.content.safetensors.json.loads", None)
    data = framed(b'{"a":[],"b":[],"c":[],"d":[],"e":[]}')
    with pytest.raises(CorruptContentError, match="commas_max"):
        read_header(lambda offset, length: data[offset : offset + length], len(data), where="f")

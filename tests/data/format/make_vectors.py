"""Makes the test vectors of docs/reference/format.md: python tests/data/format/make_vectors.py"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard
from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

HERE = Path(__file__).parent
KEY = bytes(range(32))
ID_CONTEXT = "snowdrop 2026 content key id v1"
PREFIX = b"snowdrop ref 1\0"
ODD_NAME = 'd\u00e9p\u00f4t/"odd"\\\u0001\u007f\U0001f33c name'
TEXT = b"the quick brown fox jumps over the lazy dog " * 40


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def encoded(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def name(data: bytes, key: bytes | None = None) -> str:
    return (blake3(data) if key is None else blake3(data, key=key)).hexdigest()


def domain_of(key: bytes | None) -> str:
    return "public" if key is None else "t-" + blake3(key, derive_key_context=ID_CONTEXT).hexdigest(length=16)


def file_entry(path: str, data: bytes, extents: list[list[int]], **changes: Any) -> dict[str, Any]:
    entry = {
        "path": path,
        "size": len(data),
        "mode": 0o644,
        "sha256": hashlib.sha256(data).hexdigest(),
        "extents": extents,
        "tensors": [],
    }
    return entry | changes


def tree(
    kind: str, files: list[dict[str, Any]], chunks: list[list[Any]], packs: list[bytes], key: bytes | None = None
) -> tuple[bytes, dict[str, bytes]]:
    """(manifest, objects). `chunks` are [plaintext, pack, pack_offset, stored, codec]."""
    domain = domain_of(key)
    value = {
        "version": 2,
        "kind": kind,
        "key_domain": domain,
        "files": files,
        "chunks": [
            [name(plain, key), len(plain), pack, offset, len(stored), codec]
            for plain, pack, offset, stored, codec in chunks
        ],
        "packs": [[name(pack, key), len(pack)] for pack in packs],
    }
    manifest = encoded(value)
    objects = {f"{domain}/packs/{name(pack, key)[:2]}/{name(pack, key)}": pack for pack in packs}
    objects[f"{domain}/manifests/{name(manifest, key)[:2]}/{name(manifest, key)}"] = manifest
    return manifest, objects


def safetensors() -> tuple[bytes, int, list[dict[str, Any]]]:
    """A safetensors file, the length of its header, its tensor table."""
    table = {
        "b": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        "none": {"dtype": "F32", "shape": [0, 4], "data_offsets": [12, 12]},
        "scalar": {"dtype": "F64", "shape": [], "data_offsets": [12, 20]},
    }
    raw = encoded(table)
    head = len(raw).to_bytes(8, "little") + raw
    tensors = [
        {
            "name": key,
            "dtype": entry["dtype"],
            "shape": entry["shape"],
            "offset": len(head) + entry["data_offsets"][0],
            "length": entry["data_offsets"][1] - entry["data_offsets"][0],
        }
        for key, entry in table.items()
    ]
    return head + bytes(range(20)), len(head), tensors


def trees() -> Iterator[dict[str, Any]]:
    small, packed = b'{"a": 1}\n', zstandard.ZstdCompressor(write_checksum=True).compress(TEXT)
    model, head, tensors = safetensors()
    pack = small + packed + model
    at = len(small) + len(packed)
    chunks = [
        [small, 0, 0, small, "plain"],
        [TEXT, 0, len(small), packed, "zstd"],
        [model[:head], 0, at, model[:head], "plain"],
        [model[head:], 0, at + head, model[head:], "plain"],
    ]
    files = [
        file_entry("config.json", small, [[0, len(small), 0, 0]]),
        file_entry(ODD_NAME, TEXT, [[0, len(TEXT), 1, 0]], mode=0o755),
        file_entry("empty", b"", []),
        file_entry("model.safetensors", model, [[0, head, 2, 0], [head, 20, 3, 0]], tensors=tensors),
    ]
    for title, key in (("every kind of file, public", None), ("the same, private", KEY)):
        yield described(title, tree("model", files, chunks, [pack], key), files, key)
    yield described("nothing", tree("code", [], [], []), [], None)
    twice = small + TEXT[:100] + small
    parts = [
        file_entry("parts", twice, [[0, 9, 0, 0], [9, 100, 1, 7], [109, 9, 0, 0]]),
        file_entry("inner", small[3:5], [[0, 2, 0, 3]], mode=0o7777),
    ]
    shifted = b"1234567" + TEXT[:100]
    other = [
        [small, 1, 4, small, "plain"],
        [shifted, 0, 0, shifted, "plain"],
    ]
    packs = [shifted + b"of another manifest", b"also" + small]
    yield described(
        "parts of chunks, two packs with foreign bytes", tree("image", parts, other, packs), parts, None
    )


def described(
    title: str, made: tuple[bytes, dict[str, bytes]], files: list[dict[str, Any]], key: bytes | None
) -> dict[str, Any]:
    manifest, objects = made
    return {
        "title": title,
        "key": None if key is None else key.hex(),
        "key_domain": domain_of(key),
        "artefact": "blake3:" + name(manifest, key),
        "objects": {place: b64(data) for place, data in objects.items()},
        "files": {entry["path"]: {"sha256": entry["sha256"], "mode": entry["mode"]} for entry in files},
    }


def good_manifest() -> dict[str, Any]:
    data, other = b"0123456789", b"abcdef"
    tensor = {"name": "t", "dtype": "U8", "shape": [2, 4], "offset": 0, "length": 8}
    entry = file_entry("a/b", data + other, [[0, 10, 0, 0], [10, 6, 1, 0]], tensors=[tensor])
    manifest, _ = tree(
        "model", [entry], [[data, 0, 0, data, "plain"], [other, 0, 10, other, "plain"]], [data + other]
    )
    value: dict[str, Any] = json.loads(manifest)
    return value


def run_frame(descriptor: bytes, length: int) -> bytes:
    """A frame with this descriptor that states the length of TEXT and holds a run of `length` bytes."""
    sized = (len(TEXT) - 256).to_bytes(2, "little")
    return b"\x28\xb5\x2f\xfd" + descriptor + sized + (1 | 1 << 1 | length << 3).to_bytes(3, "little") + b"a"


def broken_values() -> Iterator[tuple[str, dict[str, Any]]]:
    """Manifests that are encoded rightly and break one rule."""
    rules: list[tuple[str, Any]] = [
        ("version 1", lambda m: m.update(version=1)),
        ("version 3", lambda m: m.update(version=3)),
        ("unknown kind", lambda m: m.update(kind="weights")),
        ("key domain of another form", lambda m: m.update(key_domain="tenant")),
        ("another key domain", lambda m: m.update(key_domain=domain_of(KEY))),
        ("a key that is not listed", lambda m: m.update(note="x")),
        ("a key is missing", lambda m: m.pop("kind")),
        ("size too small", lambda m: m["files"][0].update(size=15)),
        ("size is a string", lambda m: m["files"][0].update(size="16")),
        ("size is true", lambda m: m["chunks"][0].__setitem__(1, True)),
        ("mode 0o600", lambda m: m["files"][0].update(mode=0o600)),
        ("sha256 in upper case", lambda m: m["files"][0].update(sha256=m["files"][0]["sha256"].upper())),
        ("gap between extents", lambda m: m["files"][0]["extents"].__setitem__(1, [11, 5, 1, 0])),
        ("extents overlap", lambda m: m["files"][0]["extents"].__setitem__(1, [9, 6, 1, 0])),
        ("extent of no length", lambda m: m["files"][0]["extents"].append([16, 0, 1, 0])),
        ("extent runs over its chunk", lambda m: m["files"][0]["extents"].__setitem__(1, [10, 6, 1, 1])),
        ("extent before its chunk", lambda m: m["files"][0]["extents"].__setitem__(1, [10, 6, 1, -1])),
        ("no such chunk", lambda m: m["files"][0]["extents"].__setitem__(1, [10, 6, 2, 0])),
        ("chunk of index -1", lambda m: m["files"][0]["extents"].__setitem__(1, [10, 6, -1, 0])),
        (
            "tensor name twice",
            lambda m: m["files"][0]["tensors"].append(dict(m["files"][0]["tensors"][0], offset=8)),
        ),
        ("tensor outside of the file", lambda m: m["files"][0]["tensors"][0].update(offset=9)),
        ("tensor of another length", lambda m: m["files"][0]["tensors"][0].update(shape=[3, 3])),
        ("unknown dtype", lambda m: m["files"][0]["tensors"][0].update(dtype="U4")),
        ("bits that fill no bytes", lambda m: m["files"][0]["tensors"][0].update(dtype="F4", shape=[17])),
        ("shape of 65 sizes", lambda m: m["files"][0]["tensors"][0].update(shape=[1] * 64 + [8])),
        (
            "size in a shape above 2^53",
            lambda m: m["files"][0]["tensors"][0].update(shape=[2**53 + 1, 0], length=0),
        ),
        ("digest occurs twice", lambda m: m["chunks"].__setitem__(1, [m["chunks"][0][0], *m["chunks"][1][1:]])),
        ("digest of 63 digits", lambda m: m["chunks"][0].__setitem__(0, "0" * 63)),
        ("chunk of no bytes", lambda m: m["chunks"].append(["0" * 64, 0, 0, 0, 0, "plain"])),
        ("plain, stored in another length", lambda m: m["chunks"][0].__setitem__(4, 9)),
        ("zstd, no smaller", lambda m: m["chunks"][0].__setitem__(5, "zstd")),
        ("unknown codec", lambda m: m["chunks"][0].__setitem__(5, "lz4")),
        ("no such pack", lambda m: m["chunks"][0].__setitem__(2, 1)),
        ("chunk over the end of its pack", lambda m: m["chunks"][1].__setitem__(3, 11)),
        ("chunk too large", lambda m: m["chunks"][0].__setitem__(slice(1, 5), [4194305, 0, 0, 4194305])),
        ("chunk of no file", lambda m: m["chunks"].append(["1" * 64, 1, 0, 0, 1, "plain"])),
        ("pack of no chunk", lambda m: m["packs"].append(["2" * 64, 1])),
        ("pack too large", lambda m: m["packs"][0].__setitem__(1, 67108865)),
        ("pack occurs twice", lambda m: (m["packs"].append(m["packs"][0]), m["chunks"][1].__setitem__(2, 1))),
        ("path occurs twice", lambda m: m["files"].append(m["files"][0])),
        ("path is a directory too", lambda m: m["files"].append(dict(m["files"][0], path="a"))),
    ]
    paths = ["", "/a", "a/", "a//b", "./a", "a/./b", "../a", "a/..", "a\0b", "x" * 256, "a/" * 2048 + "b"]
    rules += [(f"path {path[:20]!r}", lambda m, path=path: m["files"][0].update(path=path)) for path in paths]
    for title, change in rules:
        value = good_manifest()
        change(value)
        yield title, value


def manifests() -> Iterator[dict[str, str]]:
    for title, value in broken_values():
        yield {"breaks": title, "manifest": b64(encoded(value))}
    good = encoded(good_manifest())
    texts = {
        "white space": good.replace(b",", b", ", 1),
        "line end": good + b"\n",
        "another order of keys": encoded(dict(reversed(list(good_manifest().items())))),
        "a key twice": good.replace(b'{"version":2', b'{"version":2,"version":2', 1),
        "needless escape": good.replace(b'"a/b"', b'"a\\/b"'),
        "escape in upper case": good.replace(b'"a/b"', b'"a\\u001F"'),
        "escape of U+007F": good.replace(b'"a/b"', b'"a\\u007f"'),
        "leading zero": good.replace(b'"size":16', b'"size":016'),
        "fraction": good.replace(b'"size":16', b'"size":16.0'),
        "exponent": good.replace(b'"size":16', b'"size":16e0'),
        "minus zero": good.replace(b"[0,10,0,0]", b"[-0,10,0,0]"),
        "null": good.replace(b'"tensors":[', b'"tensors":null,"x":[', 1),
        "extent of three numbers": good.replace(b"[0,10,0,0]", b"[0,10,0]"),
        "extent of five numbers": good.replace(b"[0,10,0,0]", b"[0,10,0,0,0]"),
        "not UTF-8": good.replace(b'"a/b"', b'"a\xff"'),
        "lone surrogate": good.replace(b'"a/b"', b'"\\ud800"'),
        "cut short": good[:-1],
        "empty": b"",
        "an array": b"[" + good + b"]",
        "byte order mark": b"\xef\xbb\xbf" + good,
        "nested deeply": b"[" * 10_000,
    }
    for title, data in texts.items():
        yield {"breaks": title, "manifest": b64(data)}


def stored() -> Iterator[dict[str, Any]]:
    plain, size = TEXT, len(TEXT)
    frame = zstandard.ZstdCompressor().compress(plain)
    good = {"one frame": frame, "with a checksum": zstandard.ZstdCompressor(write_checksum=True).compress(plain)}
    bad = {
        "empty": b"",
        "noise": bytes(range(200)),
        "cut short": frame[:-1],
        "a byte behind it": frame + b"\0",
        "two frames": frame * 2,
        "skippable frame before it": b"\x50\x2a\x4d\x18\x02\0\0\0ab" + frame,
        "another length": zstandard.ZstdCompressor().compress(plain + b"x"),
        "no content size": zstandard.ZstdCompressor(write_content_size=False).compress(plain),
        "window of 8 MiB": run_frame(bytes([0x40, (23 - 10) << 3]), size),
        "wants a dictionary": run_frame(b"\x61\x07", size),
        "states more than it holds": run_frame(b"\x60", 9),
        "holds more than it states": run_frame(b"\x60", size + 1),
        "reserved block type": run_frame(b"\x60", size)[:-4] + b"\x07\0\0",
        "wrong checksum": good["with a checksum"][:-1] + bytes([good["with a checksum"][-1] ^ 1]),
    }
    rle = run_frame(b"\x60", size)
    yield {"title": "a run of one byte", "plain_bytes": size, "stored": b64(rle), "plain": b64(b"a" * size)}
    for title, data in good.items():
        yield {"title": title, "plain_bytes": size, "stored": b64(data), "plain": b64(plain)}
    for title, data in bad.items():
        yield {"title": title, "plain_bytes": size, "stored": b64(data), "plain": None}


def refs() -> Iterator[dict[str, Any]]:
    private = Ed25519PrivateKey.from_private_bytes(KEY)
    public = private.public_key().public_bytes_raw()
    other = Ed25519PrivateKey.from_private_bytes(KEY[::-1])
    inner: dict[str, Any] = {
        "version": 1,
        "name": "minilm",
        "tenant": "default",
        "key_domain": "public",
        "manifest": "blake3:" + name(b"manifest"),
        "kind": "model",
        "total_bytes": 90_000_000,
        "file_count": 7,
        "generation": 3,
        "created_unix_ns": 1_790_000_000_000_000_000,
        "key_id": name(public)[:16],
    }

    def made(ref: dict[str, Any], signer: Ed25519PrivateKey = private, prefix: bytes = PREFIX) -> bytes:
        return encoded({"ref": ref, "signature": signer.sign(prefix + encoded(ref)).hex()})

    right = made(inner)
    cases = [
        ("signed", right, True),
        ("another generation than was signed", right.replace(b'"generation":3', b'"generation":4'), False),
        ("signed by another key", made(inner, other), False),
        ("signed without the prefix", made(inner, prefix=b""), False),
        ("white space", right.replace(b",", b", ", 1), False),
        ("no signature", encoded({"ref": inner}), False),
        ("signature in upper case", right[:-130] + right[-130:].upper(), False),
        ("generation 0", made(inner | {"generation": 0}), False),
        ("a name of another form", made(inner | {"name": "../x"}), False),
        ("version 2", made(inner | {"version": 2}), False),
    ]
    for title, data, believed in cases:
        yield {"title": title, "public_key": public.hex(), "ref": b64(data), "believed": believed}


def main() -> int:
    made = {"trees": trees(), "manifests": manifests(), "stored": stored(), "refs": refs()}
    for title, vectors in made.items():
        text = json.dumps(list(vectors), indent=1, ensure_ascii=True)
        (HERE / f"{title}.json").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

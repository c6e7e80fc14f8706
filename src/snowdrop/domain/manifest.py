"""Manifest: the encoded form of a tree. A model, the code of a service and an image are all trees.

The tree is a list of files, each a list of extents over chunks; the chunks lie in packs at the origin in load
order. `snowdrop.content.manifest` encodes, decodes and validates; here are only the values.
"""

from typing import Literal

import msgspec

from snowdrop.domain.ids import Digest

FORMAT_VERSION = 2
CHUNK_BYTES_MAX = 4 << 20
PACK_BYTES_MAX = 64 << 20
MANIFEST_BYTES_MAX = 64 << 20
FILES_MAX = 1_000_000
BRACKETS_MAX = 2_000_000
COMMAS_MAX = 8_000_000
"""Most `[` and `{`, and most `,`, in an encoded manifest: checked before anything is allocated for its values."""
PATH_BYTES_MAX = 4096

Codec = Literal["plain", "zstd"]
TreeKind = Literal["model", "code", "image"]


class ChunkRef(msgspec.Struct, frozen=True, array_like=True):
    """One chunk and where its bytes lie at the origin.

    `digest` is the BLAKE3-256 of the plaintext in the manifest's key domain, 64 hex digits; `stored_bytes` is its
    length inside the pack: `plain_bytes` if `codec` is "plain", otherwise less.
    """

    digest: str
    plain_bytes: int
    pack: int
    pack_offset: int
    stored_bytes: int
    codec: Codec = "plain"


class Extent(msgspec.Struct, frozen=True, array_like=True):
    """A run of a file's bytes: `length` bytes at `file_offset` are chunk `chunk` from `chunk_offset` on."""

    file_offset: int
    length: int
    chunk: int
    chunk_offset: int


class TensorEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor of a safetensors file. `offset` counts from the start of the file, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One file of the tree. `path` is relative, normalised, with `/`; `mode` holds permission bits only."""

    path: str
    size: int
    mode: int
    sha256: str
    extents: tuple[Extent, ...]
    tensors: tuple[TensorEntry, ...] = ()


class PackRef(msgspec.Struct, frozen=True, array_like=True):
    """An object of many chunks at the origin, named by the BLAKE3-256 of its bytes in its key domain."""

    digest: str
    size: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """An immutable tree. Its digest (BLAKE3 of the canonical encoding, in its key domain) names the artefact.

    `key_domain` says in whose name chunks, packs and manifest are hashed: "public", or `t-` and the id of a
    tenant's key for private content. Chunks are listed in load order. A pack may hold chunks of other manifests
    too.
    """

    version: int
    kind: TreeKind
    key_domain: str
    files: tuple[FileEntry, ...]
    chunks: tuple[ChunkRef, ...]
    packs: tuple[PackRef, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all files, before dedupe."""
        return sum(entry.size for entry in self.files)


class ArtefactRef(msgspec.Struct, frozen=True, kw_only=True):
    """Enough to fetch an artefact: the manifest's digest and its sizes, for display and placement.

    `key_domain` is the manifest's: it says where at the origin the manifest lies.
    """

    manifest: Digest
    kind: TreeKind
    total_bytes: int
    file_count: int
    key_domain: str = "public"

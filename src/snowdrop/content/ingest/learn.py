"""Learning what the origin has from its manifests, so that a push re-uses chunks of other artefacts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from blake3 import blake3

from snowdrop.content.ingest.index import IngestIndex, Known, Place
from snowdrop.content.keys import Hasher
from snowdrop.content.layout import manifest_key, manifest_prefix
from snowdrop.content.manifest import decode_manifest
from snowdrop.content.origin import Origin
from snowdrop.domain.errors import CorruptContentError, IntegrityError, InvalidInputError, NotFoundError
from snowdrop.domain.ids import Digest, parse_digest
from snowdrop.domain.manifest import MANIFEST_BYTES_MAX, FileEntry, Manifest, TreeKind

MANIFESTS_PER_PUSH_MAX = 20_000
_AT_ONCE = 64


def learn(index: IngestIndex, origin: Origin, hasher: Hasher, threads: ThreadPoolExecutor) -> None:
    """Reads the manifests that are new at the origin; forgets what is gone, passes over what is damaged."""
    listed = set(islice(_listed(origin, hasher.domain), MANIFESTS_PER_PUSH_MAX))
    known = index.manifests()
    index.forget_manifests(known - listed)
    fresh = sorted(listed - known)
    for start in range(0, len(fresh), _AT_ONCE):
        digests = [Digest(digest) for digest in fresh[start : start + _AT_ONCE]]
        manifests = threads.map(lambda digest: read_manifest(origin, digest, hasher), digests)
        for digest, manifest in zip(digests, manifests, strict=True):
            if manifest is None:
                index.learn(digest, None, (), ())
                continue
            packs = [(pack.digest, pack.size) for pack in manifest.packs]
            index.learn(digest, tree_digest(manifest.kind, manifest.files), _chunks(manifest), packs)


def read_manifest(origin: Origin, digest: Digest, hasher: Hasher) -> Manifest | None:
    """A manifest at the origin; None if it is not there, not what its name says, or not of this version."""
    try:
        key = manifest_key(hasher.domain, digest)
        size = origin.size(key)
        if size > MANIFEST_BYTES_MAX:
            return None
        data = bytearray(size)
        origin.read_range(key, 0, memoryview(data))
        return decode_manifest(bytes(data), expected=digest, hasher=hasher)
    except (CorruptContentError, IntegrityError, NotFoundError):
        return None


def same_tree(
    index: IngestIndex,
    origin: Origin,
    hasher: Hasher,
    kind: TreeKind,
    files: Iterable[FileEntry],
    *,
    has_pack: Callable[[str, int], bool],
) -> tuple[Digest, Manifest] | None:
    """A manifest of this very tree, there with all its packs: pushing a tree again changes nothing."""
    for digest in index.trees(tree_digest(kind, files)):
        if origin.exists(manifest_key(hasher.domain, digest)):
            manifest = read_manifest(origin, digest, hasher)
            if manifest is not None and all(has_pack(pack.digest, pack.size) for pack in manifest.packs):
                return digest, manifest
    return None


def tree_digest(kind: TreeKind, files: Iterable[FileEntry]) -> bytes:
    """The same for two trees exactly if they have the same files; however these are cut and stored."""
    rows = [[kind], *([entry.path, entry.mode, entry.size, entry.sha256] for entry in files)]
    return blake3(json.dumps(rows).encode()).digest()


def _listed(origin: Origin, domain: str) -> Iterable[str]:
    prefix = manifest_prefix(domain)
    for key in origin.list(prefix):
        name = key.rpartition("/")[2]
        try:
            digest = parse_digest("blake3:" + name)
        except InvalidInputError:
            continue
        if manifest_key(domain, digest) == key:
            yield digest


def _chunks(manifest: Manifest) -> Iterable[Known]:
    for chunk in manifest.chunks:
        pack = manifest.packs[chunk.pack].digest
        yield Known(
            chunk.digest, Place(chunk.plain_bytes, pack, chunk.pack_offset, chunk.stored_bytes, chunk.codec)
        )

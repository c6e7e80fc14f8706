"""Reading the tree of an image at the origin, without a store."""

from __future__ import annotations

from snowdrop.content.codec import decode
from snowdrop.content.imagetree import check_image_manifest, decode_tree
from snowdrop.content.keys import Hasher
from snowdrop.content.layout import pack_key
from snowdrop.content.origin import Origin
from snowdrop.domain.errors import IntegrityError
from snowdrop.domain.image import ImageTree
from snowdrop.domain.manifest import FileEntry, Manifest


def read_tree(origin: Origin, manifest: Manifest, hasher: Hasher) -> ImageTree:
    """The tree of an image's manifest, its chunks verified. Raises CorruptContentError, IntegrityError."""
    check_image_manifest(manifest)
    tree = decode_tree(read_file(origin, manifest, manifest.files[0], hasher))
    check_image_manifest(manifest, tree)
    return tree


def read_file(origin: Origin, manifest: Manifest, entry: FileEntry, hasher: Hasher) -> bytes:
    """A whole file of a tree from the packs at the origin. For small files: it is kept in memory."""
    data = bytearray(entry.size)
    for extent in entry.extents:
        chunk = manifest.chunks[extent.chunk]
        key = pack_key(manifest.key_domain, manifest.packs[chunk.pack].digest)
        stored = memoryview(bytearray(chunk.stored_bytes))
        origin.read_range(key, chunk.pack_offset, stored)
        plain = memoryview(bytearray(chunk.plain_bytes))
        decode(chunk.codec, stored, plain)
        if hasher.hexdigest(plain) != chunk.digest:
            raise IntegrityError(
                f"a chunk of {entry.path} is damaged at the origin", where=key, next_step="push it with --repair"
            )
        end = extent.file_offset + extent.length
        data[extent.file_offset : end] = plain[extent.chunk_offset :][: extent.length]
    return bytes(data)

"""What a session serves of an image: its names, or the one file `data` that EROFS reads from."""

from __future__ import annotations

import stat
from collections.abc import Mapping

from snowdrop.content.fuse.inodes import Entry, Inodes
from snowdrop.content.fuse.source import FileSource
from snowdrop.content.fuse.structs import FUSE_ATTR, FUSE_KSTATFS, ROOT_ID
from snowdrop.domain.image import ALIGN_BYTES, DATA_FILE, ImageTree
from snowdrop.image.mount.inodes import ImageInodes
from snowdrop.image.mount.port import View

DATA_NODE = ROOT_ID + 1
MANIFEST_DATA_INDEX = 1
"""`data` is the second file of an image's manifest."""
_SECTOR_BYTES = 512


class DataInodes:
    """A directory with one file, which only root may open: it has the contents of all others."""

    def __init__(self, tree: ImageTree) -> None:
        self._bytes = tree.data_bytes

    def lookup(self, parent: int, name: bytes) -> int:
        if parent != ROOT_ID:
            raise KeyError(parent)
        return {b".": ROOT_ID, b"..": ROOT_ID, DATA_FILE.encode(): DATA_NODE}.get(name, 0)

    def file_index(self, node: int) -> int:
        return {ROOT_ID: -1, DATA_NODE: 0}[node]

    def file_bytes(self, index: int) -> int:
        return self._bytes

    def mode(self, node: int) -> int:
        return {ROOT_ID: stat.S_IFDIR | 0o500, DATA_NODE: stat.S_IFREG | 0o400}[node]

    def attributes(self, node: int) -> bytes:
        size = self._bytes if node == DATA_NODE else ALIGN_BYTES
        return FUSE_ATTR.pack(
            *(node, size, size // _SECTOR_BYTES, 0, 0, 0, 0, 0, 0),
            *(self.mode(node), 1 if node == DATA_NODE else 2, 0, 0, 0, ALIGN_BYTES, 0),
        )

    def listing(self, node: int) -> list[Entry]:
        if node != ROOT_ID:
            raise KeyError(node)
        names = ((b".", ROOT_ID), (b"..", ROOT_ID), (DATA_FILE.encode(), DATA_NODE))
        return [Entry(name, child, stat.S_IFMT(self.mode(child))) for name, child in names]

    def is_directory(self, node: int) -> bool:
        return node == ROOT_ID

    def statistics(self) -> bytes:
        return FUSE_KSTATFS.pack(self._bytes // ALIGN_BYTES, 0, 0, 2, 0, ALIGN_BYTES, 255, ALIGN_BYTES, 0)

    def link(self, node: int) -> bytes | None:
        self.mode(node)
        return None

    def xattrs(self, node: int) -> Mapping[bytes, bytes]:
        self.mode(node)
        return {}


class ImageFiles:
    """The files of a view, as stretches of `data`. The kernel is given none of them to read by itself:

    one file holds them all, and EROFS refuses a file that is passed through.
    """

    def __init__(self, source: FileSource, tree: ImageTree, view: View) -> None:
        self._source = source
        self._offsets = [entry.offset for entry in tree.entries] if view == "tree" else [0]

    def read(self, file: int, offset: int, into: memoryview) -> bool:
        return self._source.read(MANIFEST_DATA_INDEX, self._offsets[file] + offset, into)

    async def bring(self, file: int, offset: int, length: int) -> bytes | None:
        return await self._source.bring(MANIFEST_DATA_INDEX, self._offsets[file] + offset, length)

    def backing(self, file: int) -> int | None:
        return None


def inodes_of(view: View, tree: ImageTree) -> Inodes:
    return ImageInodes(tree) if view == "tree" else DataInodes(tree)

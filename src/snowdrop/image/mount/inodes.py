"""An image's tree as inodes: numbers, names, link counts, attributes. Nothing here asks for content.

Entry `i` of the tree is inode 1 + i; a hard link is another name of its entry's inode.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping

from snowdrop.content.fuse.inodes import Entry
from snowdrop.content.fuse.structs import FUSE_ATTR, FUSE_KSTATFS, ROOT_ID
from snowdrop.domain.image import ALIGN_BYTES, EntryKind, ImageTree, TreeEntry

NAME_BYTES_MAX = 255
PREFERRED_READ_BYTES = 128 << 10
"""st_blksize: what programs size their buffers by."""
SHOWN_XATTRS = (b"user.", b"trusted.", b"security.", b"system.posix_acl_access", b"system.posix_acl_default")
"""What a mounted file system can have. The kernel has no place for others."""
TYPES: dict[EntryKind, int] = {
    "dir": stat.S_IFDIR,
    "file": stat.S_IFREG,
    "symlink": stat.S_IFLNK,
    "fifo": stat.S_IFIFO,
}
_SECTOR_BYTES = 512
_SYMLINK_MODE = 0o777
_NS = 1_000_000_000
_U64 = (1 << 64) - 1


class ImageInodes:
    """`Inodes` of a validated tree; file `i` is entry `i`."""

    def __init__(self, tree: ImageTree) -> None:
        self._entries = tree.entries
        self._data_bytes = tree.data_bytes
        self._numbers: dict[bytes, int] = {}
        self._parents: dict[int, int] = {ROOT_ID: ROOT_ID}
        self._children: dict[int, dict[bytes, int]] = {}
        self._links: dict[int, int] = {}
        self._listings: dict[int, list[Entry]] = {}
        for index, entry in enumerate(tree.entries):
            if entry.kind != "hardlink":
                self._numbers[entry.path] = ROOT_ID + index
            if entry.kind == "dir":
                self._children[ROOT_ID + index] = {}
        for entry in tree.entries[1:]:
            parent_path, _, name = entry.path.rpartition(b"/")
            parent = self._numbers[parent_path]
            node = self._numbers[entry.target if entry.kind == "hardlink" else entry.path]
            self._children[parent][name] = node
            self._links[node] = self._links.get(node, 0) + 1
            if entry.kind == "dir":
                self._parents[node] = parent
                self._links[parent] = self._links.get(parent, 0) + 1

    def numbers(self) -> list[int]:
        """All inodes, each once, the root first."""
        return list(self._numbers.values())

    def entry(self, node: int) -> TreeEntry:
        """KeyError if there is no such inode."""
        if not ROOT_ID <= node < ROOT_ID + len(self._entries):
            raise KeyError(node)
        entry = self._entries[node - ROOT_ID]
        if entry.kind == "hardlink":
            raise KeyError(node)
        return entry

    def parent(self, node: int) -> int:
        return self._parents[node]

    def children(self, node: int) -> Mapping[bytes, int]:
        return self._children[node]

    def links(self, node: int) -> int:
        """How many names it has; for a directory as on any file system, 2 and one for each directory in it."""
        names = self._links.get(node, 0)
        if node == ROOT_ID:
            return 2 + names
        return names + 1 if node in self._children else names

    def lookup(self, parent: int, name: bytes) -> int:
        children = self._children[parent]
        if name == b".":
            return parent
        if name == b"..":
            return self._parents[parent]
        return children.get(name, 0)

    def file_index(self, node: int) -> int:
        return node - ROOT_ID if self.entry(node).kind == "file" else -1

    def file_bytes(self, index: int) -> int:
        return self._entries[index].size

    def mode(self, node: int) -> int:
        entry = self.entry(node)
        permissions = _SYMLINK_MODE if entry.kind == "symlink" else entry.mode
        return TYPES[entry.kind] | permissions

    def attributes(self, node: int) -> bytes:
        entry = self.entry(node)
        size = entry.size
        if entry.kind != "file":
            size = ALIGN_BYTES if entry.kind == "dir" else len(entry.target)
        sectors = -(-size // ALIGN_BYTES) * (ALIGN_BYTES // _SECTOR_BYTES)
        seconds, nanoseconds = divmod(entry.mtime_ns, _NS)
        return FUSE_ATTR.pack(
            *(node, size, sectors),
            *(seconds & _U64,) * 3,  # before 1970: two's complement
            *(nanoseconds,) * 3,
            *(self.mode(node), self.links(node), entry.uid, entry.gid, 0, PREFERRED_READ_BYTES, 0),
        )

    def listing(self, node: int) -> list[Entry]:
        found = self._listings.get(node)
        if found is None:
            children = self._children[node]
            found = [Entry(b".", node, stat.S_IFDIR), Entry(b"..", self._parents[node], stat.S_IFDIR)]
            found += [Entry(name, child, stat.S_IFMT(self.mode(child))) for name, child in children.items()]
            self._listings[node] = found
        return found

    def is_directory(self, node: int) -> bool:
        return node in self._children

    def statistics(self) -> bytes:
        blocks = self._data_bytes // ALIGN_BYTES
        return FUSE_KSTATFS.pack(blocks, 0, 0, len(self._numbers), 0, ALIGN_BYTES, NAME_BYTES_MAX, ALIGN_BYTES, 0)

    def link(self, node: int) -> bytes | None:
        entry = self.entry(node)
        return entry.target if entry.kind == "symlink" else None

    def xattrs(self, node: int) -> Mapping[bytes, bytes]:
        return {name: value for name, value in self.entry(node).xattrs if name.startswith(SHOWN_XATTRS)}

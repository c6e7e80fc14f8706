"""A manifest as inodes: numbers, attributes, names, directory listings. Nothing here asks for content.

Numbers are stable: the root is 1, file `i` of the manifest is 2 + i, directories follow in order of their paths.
So a server that takes over another's mount means the same by them.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from types import MappingProxyType

from snowdrop.content.fuse.inodes import Entry
from snowdrop.content.fuse.structs import FUSE_ATTR, FUSE_KSTATFS, ROOT_ID
from snowdrop.content.paths import COMPONENT_BYTES_MAX
from snowdrop.domain.manifest import Manifest

UNIX_TIME_S = 315_532_800
"""1980-01-01, for all times of all files: a manifest has none, and archivers refuse what is older."""
BLOCK_BYTES = 4096
PREFERRED_READ_BYTES = 128 << 10
"""st_blksize. Programs size their buffers by it, one per open file: more would cost them memory for nothing."""
_SECTOR_BYTES = 512
_NO_XATTRS: Mapping[bytes, bytes] = MappingProxyType({})


class _Directory:
    def __init__(self, parent: int) -> None:
        self.parent = parent
        self.nodes: dict[bytes, int] = {}
        self.directories = 0
        self.listing: list[Entry] | None = None


class Tree:
    """Read-only inodes of one manifest, owned by `uid` and `gid`. All lookups are in memory; KeyError if
    unknown."""

    def __init__(self, manifest: Manifest, *, uid: int, gid: int) -> None:
        self._files = manifest.files
        self._owner = (uid, gid)
        self._directories: dict[int, _Directory] = {ROOT_ID: _Directory(ROOT_ID)}
        self._total_bytes = manifest.total_bytes
        made: dict[str, int] = {"": ROOT_ID}
        parents = {entry.path.rpartition("/")[0] for entry in manifest.files}
        first = ROOT_ID + 1 + len(manifest.files)
        for path in _with_ancestors(parents):
            node = first + len(made) - 1
            parent_path, _, name = path.rpartition("/")
            parent = made[parent_path]
            made[path] = node
            self._directories[node] = _Directory(parent)
            self._directories[parent].nodes[name.encode()] = node
            self._directories[parent].directories += 1
        for index, entry in enumerate(manifest.files):
            parent_path, _, name = entry.path.rpartition("/")
            self._directories[made[parent_path]].nodes[name.encode()] = ROOT_ID + 1 + index

    def lookup(self, parent: int, name: bytes) -> int:
        """The number of `name` in directory `parent`; 0 if there is no such name. KeyError if no directory."""
        directory = self._directories[parent]
        if name == b".":
            return parent
        if name == b"..":
            return directory.parent
        return directory.nodes.get(name, 0)

    def file_index(self, node: int) -> int:
        """Which file of the manifest `node` is; -1 for a directory. KeyError if there is no such number."""
        index = node - ROOT_ID - 1
        if 0 <= index < len(self._files):
            return index
        if node in self._directories:
            return -1
        raise KeyError(node)

    def file_bytes(self, index: int) -> int:
        return self._files[index].size

    def mode(self, node: int) -> int:
        """Type and permissions. Who is let into the mount may read all of it; nobody may write."""
        index = self.file_index(node)
        if index < 0:
            return stat.S_IFDIR | 0o555
        return stat.S_IFREG | (self._files[index].mode & 0o555) | 0o444

    def attributes(self, node: int) -> bytes:
        """The inode as a fuse_attr. Its blocks are those of the whole file: all of it is there for the reader."""
        index = self.file_index(node)
        if index < 0:
            size, links = BLOCK_BYTES, 2 + self._directories[node].directories
        else:
            size, links = self._files[index].size, 1
        sectors = -(-size // BLOCK_BYTES) * (BLOCK_BYTES // _SECTOR_BYTES)
        times = (UNIX_TIME_S,) * 3
        return FUSE_ATTR.pack(
            *(node, size, sectors),
            *times,
            *(0, 0, 0),
            *(self.mode(node), links, *self._owner, 0, PREFERRED_READ_BYTES, 0),
        )

    def listing(self, node: int) -> list[Entry]:
        """The names in a directory, `.` and `..` first. KeyError if it is none."""
        directory = self._directories[node]
        if directory.listing is None:
            entries = [Entry(b".", node, stat.S_IFDIR), Entry(b"..", directory.parent, stat.S_IFDIR)]
            entries += [
                Entry(name, child, stat.S_IFMT(self.mode(child))) for name, child in directory.nodes.items()
            ]
            directory.listing = entries
        return directory.listing

    def is_directory(self, node: int) -> bool:
        return node in self._directories

    def statistics(self) -> bytes:
        """A kstatfs: a full file system of the tree's size."""
        blocks = -(-self._total_bytes // BLOCK_BYTES)
        nodes = len(self._files) + len(self._directories)
        return FUSE_KSTATFS.pack(blocks, 0, 0, nodes, 0, BLOCK_BYTES, COMPONENT_BYTES_MAX, BLOCK_BYTES, 0)

    def link(self, node: int) -> bytes | None:
        """None: a manifest has no links."""
        self.file_index(node)
        return None

    def xattrs(self, node: int) -> Mapping[bytes, bytes]:
        self.file_index(node)
        return _NO_XATTRS


def _with_ancestors(paths: set[str]) -> list[str]:
    """`paths` and all directories above them, each after its parent, without the root."""
    found: set[str] = set()
    for path in paths:
        while path and path not in found:
            found.add(path)
            path = path.rpartition("/")[0]  # noqa: PLW2901 - walks upwards
    return sorted(found, key=lambda path: path.split("/"))

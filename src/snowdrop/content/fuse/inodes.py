"""The port between a mount's server and the names in it: a model's files, or all of an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol


class Entry(NamedTuple):
    """One name of a directory; `kind` is the type of its inode, as in S_IFREG or S_IFDIR."""

    name: bytes
    node: int
    kind: int


class Inodes(Protocol):
    """Read-only inodes by stable numbers, the root is 1. All in memory; KeyError if there is no such number.

    Stable means: whoever takes over a mount and makes them anew of the same artefact gets the same numbers.
    """

    def lookup(self, parent: int, name: bytes) -> int:
        """The number of `name` in directory `parent`; 0 if there is no such name."""

    def file_index(self, node: int) -> int:
        """The source's index of a regular file; -1 for anything else."""

    def file_bytes(self, index: int) -> int: ...

    def mode(self, node: int) -> int:
        """Type and permissions."""

    def attributes(self, node: int) -> bytes:
        """The inode as a fuse_attr."""

    def listing(self, node: int) -> list[Entry]:
        """The names in a directory, `.` and `..` first."""

    def is_directory(self, node: int) -> bool: ...

    def statistics(self) -> bytes:
        """A kstatfs."""

    def link(self, node: int) -> bytes | None:
        """What a symbolic link holds; None if it is none."""

    def xattrs(self, node: int) -> Mapping[bytes, bytes]: ...

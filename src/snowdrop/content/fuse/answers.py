"""Answers to requests that need no content: names, attributes, listings. Pure: request bytes in, answer bytes
out."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

from snowdrop.content.fuse.inodes import Entry, Inodes
from snowdrop.content.fuse.structs import (
    DIRENT_ALIGNMENT,
    FUSE_ACCESS_IN,
    FUSE_ATTR_OUT,
    FUSE_DIRENT,
    FUSE_ENTRY_OUT,
    FUSE_GETXATTR_IN,
    FUSE_GETXATTR_OUT,
    FUSE_READ_IN,
    WRITING_OPS,
    Op,
)
from snowdrop.content.paths import COMPONENT_BYTES_MAX

VALID_S = 86_400 * 365
"""How long the kernel may believe names (that there is none, too) and attributes: nothing in a tree ever
changes."""
_DIRENT_TYPE_SHIFT = 12


class Answers:
    """The read-only file system of one tree. `answer` raises OSError with the errno that the caller is to see."""

    def __init__(self, tree: Inodes) -> None:
        self._tree = tree
        self._by_op: dict[int, Callable[[int, memoryview], bytes]] = {
            Op.LOOKUP: self._lookup,
            Op.GETATTR: self._getattr,
            Op.READDIR: self._readdir,
            Op.READDIRPLUS: self._readdirplus,
            Op.STATFS: lambda _node, _body: tree.statistics(),
            Op.ACCESS: self._access,
            Op.GETXATTR: self._getxattr,
            Op.LISTXATTR: self._listxattr,
            Op.READLINK: self._readlink,
            Op.FLUSH: _done,
            Op.FSYNC: _done,
            Op.FSYNCDIR: _done,
            Op.RELEASEDIR: _done,
            Op.SYNCFS: _done,
            Op.DESTROY: _done,
            **{op: _fails(errno.EROFS) for op in WRITING_OPS},
        }

    def answer(self, op: int, node: int, body: memoryview) -> bytes:
        """The answer's body. An unknown request gets ENOSYS, which the kernel takes as "never ask again"."""
        handler = self._by_op.get(op)
        if handler is None:
            raise OSError(errno.ENOSYS, "not implemented")
        try:
            return handler(node, body)
        except KeyError as error:
            raise OSError(errno.ENOENT, "no such inode") from error

    def _lookup(self, node: int, body: memoryview) -> bytes:
        if not self._tree.is_directory(node):
            raise OSError(errno.ENOTDIR, "not a directory")
        name = _name(body)
        if len(name) > COMPONENT_BYTES_MAX:
            raise OSError(errno.ENAMETOOLONG, "name too long")  # the kernel would let 1024 bytes pass
        child = self._tree.lookup(node, name)
        if not child:
            # An entry of inode 0: there is no such name, and the kernel may remember that.
            return FUSE_ENTRY_OUT.pack(0, 0, VALID_S, 0, 0, 0) + bytes(88)
        return self._entry(child)

    def _entry(self, node: int) -> bytes:
        return FUSE_ENTRY_OUT.pack(node, 0, VALID_S, VALID_S, 0, 0) + self._tree.attributes(node)

    def _getattr(self, node: int, _body: memoryview) -> bytes:
        return FUSE_ATTR_OUT.pack(VALID_S, 0, 0) + self._tree.attributes(node)

    def _access(self, node: int, body: memoryview) -> bytes:
        (mask, _) = FUSE_ACCESS_IN.unpack_from(body)
        if mask & os.W_OK:
            raise OSError(errno.EROFS, "read-only")
        if mask & os.X_OK and not self._tree.mode(node) & 0o111:
            raise OSError(errno.EACCES, "not executable")
        return b""

    def _readlink(self, node: int, _body: memoryview) -> bytes:
        target = self._tree.link(node)
        if target is None:
            raise OSError(errno.EINVAL, "not a symbolic link")
        return target

    def _getxattr(self, node: int, body: memoryview) -> bytes:
        value = self._tree.xattrs(node).get(_name(body[FUSE_GETXATTR_IN.size :]))
        if value is None:
            raise OSError(errno.ENODATA, "no such attribute")
        return _fitting(value, body)

    def _listxattr(self, node: int, body: memoryview) -> bytes:
        return _fitting(b"".join(name + b"\0" for name in self._tree.xattrs(node)), body)

    def _readdir(self, node: int, body: memoryview) -> bytes:
        return self._listed(node, body, lambda _entry: b"")

    def _readdirplus(self, node: int, body: memoryview) -> bytes:
        return self._listed(node, body, self._entry_beside_name)

    def _entry_beside_name(self, entry: Entry) -> bytes:
        if entry.name in {b".", b".."}:
            # The kernel looks these up by itself; inode 0 says that there is nothing to remember.
            return FUSE_ENTRY_OUT.pack(0, 0, 0, 0, 0, 0) + bytes(88)
        return self._entry(entry.node)

    def _listed(self, node: int, body: memoryview, before: Callable[[Entry], bytes]) -> bytes:
        if not self._tree.is_directory(node):
            raise OSError(errno.ENOTDIR, "not a directory")
        _, offset, size, *_ = FUSE_READ_IN.unpack_from(body)
        listing = self._tree.listing(node)
        found = bytearray()
        for place in range(offset, len(listing)):
            entry = listing[place]
            record = before(entry) + FUSE_DIRENT.pack(
                entry.node, place + 1, len(entry.name), stat.S_IFMT(entry.kind) >> _DIRENT_TYPE_SHIFT
            )
            record += entry.name
            record += bytes(-len(record) % DIRENT_ALIGNMENT)
            if len(found) + len(record) > size:
                break
            found += record
        return bytes(found)


def _fitting(value: bytes, body: memoryview) -> bytes:
    """A value for a buffer of the size that was asked for; with size 0, how large one it takes."""
    (size, _) = FUSE_GETXATTR_IN.unpack_from(body)
    if size == 0:
        return FUSE_GETXATTR_OUT.pack(len(value), 0)
    if len(value) > size:
        raise OSError(errno.ERANGE, "the buffer is too small")
    return value


def _name(body: memoryview) -> bytes:
    return bytes(body).partition(b"\0")[0]


def _done(_node: int, _body: memoryview) -> bytes:
    return b""


def _fails(number: int) -> Callable[[int, memoryview], bytes]:
    def fail(_node: int, _body: memoryview) -> bytes:
        raise OSError(number, os.strerror(number))

    return fail

"""A file system as plain Python: what every operation on an image must answer, from its tree and data alone."""

from __future__ import annotations

import errno
import os
import stat
from typing import NamedTuple

from snowdrop.domain.image import ImageTree, TreeEntry

LINKS_MAX = 40
_TYPES = {"dir": stat.S_IFDIR, "file": stat.S_IFREG, "symlink": stat.S_IFLNK, "fifo": stat.S_IFIFO}


class OutsideError(Exception):
    """A path leads out of the image: what is there is not the image's."""


class Stat(NamedTuple):
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    links: int


class Reference:
    """Answers as a list, a value, or the name of an errno. Slow and plain on purpose."""

    def __init__(self, tree: ImageTree, data: bytes) -> None:
        self.by_path = {entry.path: entry for entry in tree.entries}
        self.data = data

    def perform(self, operation: tuple[object, ...]) -> object:
        name, path, *rest = operation
        try:
            return getattr(self, f"do_{name}")(path, *rest)
        except OSError as error:
            return errno.errorcode[error.errno or 0]

    def do_stat(self, path: bytes) -> Stat:
        return self._stat(self._resolve(path, follow=True))

    def do_lstat(self, path: bytes) -> Stat:
        return self._stat(self._resolve(path, follow=False))

    def do_readlink(self, path: bytes) -> bytes:
        entry = self._resolve(path, follow=False)
        if entry.kind != "symlink":
            raise OSError(errno.EINVAL, "")
        return entry.target

    def do_list(self, path: bytes) -> list[bytes]:
        entry = self._resolve(path, follow=True)
        if entry.kind != "dir":
            raise OSError(errno.ENOTDIR, "")
        return sorted(self._names(entry.path))

    def do_read(self, path: bytes, offset: int, length: int) -> bytes:
        entry = self._resolve(path, follow=True)
        if entry.kind == "dir":
            raise OSError(errno.EISDIR, "")
        if entry.kind != "file":
            return b""
        return self.data[entry.offset : entry.offset + entry.size][offset : offset + length]

    def do_xattrs(self, path: bytes) -> dict[bytes, bytes]:
        return dict(self._resolve(path, follow=False).xattrs)

    def do_getxattr(self, path: bytes, name: bytes) -> bytes:
        found = dict(self._resolve(path, follow=False).xattrs)
        if name not in found:
            raise OSError(errno.ENODATA, "")
        return found[name]

    def _names(self, path: bytes) -> list[bytes]:
        prefix = path + b"/" if path else b""
        return [
            other[len(prefix) :]
            for other in self.by_path
            if other and other.startswith(prefix) and b"/" not in other[len(prefix) :]
        ]

    def _stat(self, entry: TreeEntry) -> Stat:
        if entry.kind == "dir":
            below = [
                self.by_path[(entry.path + b"/" if entry.path else b"") + name] for name in self._names(entry.path)
            ]
            links = 2 + sum(child.kind == "dir" for child in below)
        else:
            links = 1 + sum(
                other.target == entry.path for other in self.by_path.values() if other.kind == "hardlink"
            )
        size = {"symlink": len(entry.target), "dir": 0}.get(entry.kind, entry.size)
        mode = _TYPES[entry.kind] | (0o777 if entry.kind == "symlink" else entry.mode)
        return Stat(mode, entry.uid, entry.gid, entry.mtime_ns, size, links)

    def _resolve(self, path: bytes, *, follow: bool) -> TreeEntry:
        """As path_resolution(7): component by component, links replaced by what they hold."""
        pending = [part for part in path.split(b"/") if part]
        at = b""
        links = 0
        while pending:
            part = pending.pop(0)
            if self._kind(at) != "dir":
                raise OSError(errno.ENOTDIR, "")
            if len(part) > 255:
                raise OSError(errno.ENAMETOOLONG, "")
            if part == b".":
                continue
            if part == b"..":
                if not at:
                    raise OutsideError
                at = at.rpartition(b"/")[0]
                continue
            child = at + b"/" + part if at else part
            if child not in self.by_path:
                raise OSError(errno.ENOENT, "")
            entry = self._inode(child)
            if entry.kind == "symlink" and (pending or follow):
                links += 1
                if links > LINKS_MAX:
                    raise OSError(errno.ELOOP, "")
                if entry.target.startswith(b"/"):
                    raise OutsideError
                pending = [target for target in entry.target.split(b"/") if target] + pending
                continue
            at = child
        return self._inode(at)

    def _inode(self, path: bytes) -> TreeEntry:
        entry = self.by_path[path]
        return self.by_path[entry.target] if entry.kind == "hardlink" else entry

    def _kind(self, path: bytes) -> str:
        return self._inode(path).kind


def perform(root: bytes, operation: tuple[object, ...]) -> object:
    """The same operation on a real directory."""
    name, path, *rest = operation
    assert isinstance(path, bytes)
    try:
        return _ACTIONS[str(name)](os.path.join(root, path) if path else root, *rest)  # type: ignore[operator]
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def _real_stat(found: os.stat_result) -> Stat:
    size = 0 if stat.S_ISDIR(found.st_mode) else found.st_size
    return Stat(found.st_mode, found.st_uid, found.st_gid, found.st_mtime_ns, size, found.st_nlink)


def _real_read(path: bytes, offset: int, length: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            return os.read(fd, length)
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


def _real_xattrs(path: bytes) -> dict[bytes, bytes]:
    names = os.listxattr(path, follow_symlinks=False)
    return {os.fsencode(name): os.getxattr(path, name, follow_symlinks=False) for name in names}


_ACTIONS: dict[str, object] = {
    "stat": lambda path: _real_stat(os.stat(path)),
    "lstat": lambda path: _real_stat(os.lstat(path)),
    "readlink": os.readlink,
    "list": lambda path: sorted(os.listdir(path)),
    "read": _real_read,
    "xattrs": _real_xattrs,
    "getxattr": lambda path, name: os.getxattr(path, name, follow_symlinks=False),
}

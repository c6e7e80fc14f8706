"""An image as plain files, all of it at once: what is left where nothing can be mounted.

As root with owners and all xattrs; otherwise everything belongs to this user, and xattrs that need rights are left
out. On any failure what was written is removed again.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread

from snowdrop.content.diskio import translated
from snowdrop.domain.errors import SnowdropError
from snowdrop.domain.image import TreeEntry
from snowdrop.image.mount.inodes import SHOWN_XATTRS
from snowdrop.image.mount.port import ImageContent

STRETCH_BYTES = 8 << 20
"""Read and written at a time."""
_OWNER_ONLY = 0o700
_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL})


async def unpack(content: ImageContent, at: Path) -> None:
    """Writes all of the image into the empty directory `at`.

    Raises StorageFullError, UnavailableError and what brings the content; then `at` is empty again.
    """
    before = stat.S_IMODE(at.stat().st_mode)
    try:
        await anyio.to_thread.run_sync(_make_names, at, content.tree.entries)
        for entry in content.tree.entries:
            if entry.kind == "file" and entry.size:
                await _fill(content, _join(at, entry.path), entry)
        await anyio.to_thread.run_sync(_finish, at, content.tree.entries)
    except BaseException as error:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(partial(remove_unpacked, at, mode=before))
        if isinstance(error, OSError) and not isinstance(error, SnowdropError):
            raise translated(error, at) from error
        raise


def remove_unpacked(at: Path, *, mode: int = 0o755) -> None:
    """Empties the directory `at`, whatever permissions its content has; it gets `mode`. Blocks."""
    at.chmod(_OWNER_ONLY)
    for folder, names, _ in os.walk(at):
        for name in names:
            path = Path(folder, name)
            if not path.is_symlink():
                path.chmod(_OWNER_ONLY)
    for path in at.iterdir():
        if stat.S_ISDIR(path.lstat().st_mode):  # asks no link where it leads
            shutil.rmtree(path)
        else:
            path.unlink()
    at.chmod(mode)


def _make_names(root: Path, entries: tuple[TreeEntry, ...]) -> None:
    for entry in entries[1:]:
        path = _join(root, entry.path)
        if entry.kind == "dir":
            path.mkdir(_OWNER_ONLY)
        elif entry.kind == "file":
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        elif entry.kind == "symlink":
            path.symlink_to(os.fsdecode(entry.target))
        elif entry.kind == "fifo":
            os.mkfifo(path, 0o600)
    for entry in entries:  # a first name may stand behind its others
        if entry.kind == "hardlink":
            os.link(_join(root, entry.target), _join(root, entry.path), follow_symlinks=False)


async def _fill(content: ImageContent, path: Path, entry: TreeEntry) -> None:
    for begin in range(0, entry.size, STRETCH_BYTES):
        data = await content.read(entry.offset + begin, min(STRETCH_BYTES, entry.size - begin))
        await anyio.to_thread.run_sync(_write, path, begin, data)


def _write(path: Path, offset: int, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        done = 0
        while done < len(data):
            done += os.pwrite(fd, data[done:], offset + done)
    finally:
        os.close(fd)


def _finish(root: Path, entries: tuple[TreeEntry, ...]) -> None:
    """Owners, xattrs, permissions, times: from the leaves up, because each change touches its directory."""
    is_root = os.geteuid() == 0
    for entry in reversed(entries):
        if entry.kind == "hardlink":
            continue
        path = _join(root, entry.path)
        if is_root:
            os.chown(path, entry.uid, entry.gid, follow_symlinks=False)
        for name, value in entry.xattrs:
            _set_xattr(path, name, value, is_root=is_root)
        if entry.kind != "symlink":
            path.chmod(entry.mode)
        os.utime(path, ns=(entry.mtime_ns, entry.mtime_ns), follow_symlinks=False)


def _set_xattr(path: Path, name: bytes, value: bytes, *, is_root: bool) -> None:
    if not name.startswith(SHOWN_XATTRS):
        return
    try:
        os.setxattr(path, name, value, follow_symlinks=False)
    except OSError as error:
        if is_root or error.errno not in _UNSUPPORTED:
            raise


def _join(root: Path, path: bytes) -> Path:
    """Names in any bytes: decoded as the system does it, which gives the same bytes back."""
    return root / os.fsdecode(path)

"""Open files: who reads through the daemon, and who from the landing file by the kernel's own hand (passthrough).

The kernel allows one way at a time for an inode: an answer that mixes them makes that open fail with EIO. So
handles are counted, in the journal, before the kernel hears of them; a file turns to passthrough at the first
open after it became complete and after the last cached handle was closed.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os

from snowdrop.content.fuse.inodes import Inodes
from snowdrop.content.fuse.journal import Journal
from snowdrop.content.fuse.source import FileSource
from snowdrop.content.fuse.structs import (
    FOPEN_KEEP_CACHE,
    FOPEN_NOFLUSH,
    FOPEN_PASSTHROUGH,
    FUSE_BACKING_MAP,
    FUSE_DEV_IOC_BACKING_OPEN,
    FUSE_OPEN_IN,
    FUSE_OPEN_OUT,
    FUSE_RELEASE_IN,
    Init,
)
from snowdrop.domain.errors import SnowdropError

log = logging.getLogger("snowdrop.fuse")


class Opens:
    """OPEN and RELEASE. Used by one thread."""

    def __init__(self, device_fd: int, journal: Journal, source: FileSource) -> None:
        self._device = device_fd
        self._journal = journal
        self._source = source
        self._is_refused = False

    def open(self, tree: Inodes, node: int, body: memoryview) -> bytes:
        """The body of the answer. OSError carries the errno for the caller."""
        flags, _ = FUSE_OPEN_IN.unpack_from(body)
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            raise OSError(errno.EROFS, "read-only")
        if self._journal.flags & Init.NO_OPEN_SUPPORT:
            raise OSError(errno.ENOSYS, "opens need no answer")
        try:
            file = tree.file_index(node)
        except KeyError as error:
            raise OSError(errno.ENOENT, "no such inode") from error
        backing_id = self._backing(file) if file >= 0 and self._journal.flags & Init.PASSTHROUGH else 0
        if file >= 0:
            self._journal.opened(file, backing_id=backing_id)
        if backing_id:
            return FUSE_OPEN_OUT.pack(backing_id, FOPEN_PASSTHROUGH | FOPEN_NOFLUSH, backing_id)
        return FUSE_OPEN_OUT.pack(0, FOPEN_KEEP_CACHE | FOPEN_NOFLUSH, 0)

    def release(self, tree: Inodes, node: int, body: memoryview) -> bytes:
        handle, *_ = FUSE_RELEASE_IN.unpack_from(body)
        file = tree.file_index(node)
        if file >= 0:
            self._journal.closed(file, is_passthrough=handle != 0)
        return b""

    def _backing(self, file: int) -> int:
        """The id of the file's backing file if this open is to use it; else 0."""
        cached, passed, known = self._journal.handles(file)
        if cached and not passed:
            return 0
        if known or self._is_refused:
            return known
        return self._register(file)

    def _register(self, file: int) -> int:
        try:
            fd = self._source.backing(file)
        except SnowdropError as error:
            log.warning("no backing file for file %d: %s", file, error)
            return 0
        if fd is None:
            return 0
        try:
            # From a mutable buffer, because only then ioctl gives its own result.
            backing_map = bytearray(FUSE_BACKING_MAP.pack(fd, 0, 0))
            backing_id: int = fcntl.ioctl(self._device, FUSE_DEV_IOC_BACKING_OPEN, backing_map)
        except OSError as error:
            # A file system that cannot be read from like this (EOPNOTSUPP, ELOOP): as good without.
            log.info("the kernel does not read landing files by itself here: %s", error)
            self._is_refused = True
            return 0
        finally:
            os.close(fd)
        self._journal.set_backing(file, backing_id)
        return backing_id

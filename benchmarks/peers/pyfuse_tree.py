"""A read-only tree over pyfuse3, as its examples do it: names in memory, contents by pread of a directory's files.

`python pyfuse_tree.py SOURCE MOUNTPOINT`; says "ready" once it is mounted, ends when its input does.
"""

from __future__ import annotations

import errno
import os
import stat
import sys

import pyfuse3
import trio

VALID_S = 3600.0


class Tree(pyfuse3.Operations):
    def __init__(self, source: bytes) -> None:
        super().__init__()
        self.paths = {pyfuse3.ROOT_INODE: source}
        self.names: dict[int, dict[bytes, int]] = {}
        self.attributes: dict[int, pyfuse3.EntryAttributes] = {}
        pending = [pyfuse3.ROOT_INODE]
        while pending:
            inode = pending.pop()
            status = os.lstat(self.paths[inode])
            self.attributes[inode] = self._made(inode, status)
            if stat.S_ISDIR(status.st_mode):
                self.names[inode] = {}
                for name in sorted(os.listdir(self.paths[inode])):
                    child = len(self.paths) + 1
                    self.paths[child] = os.path.join(self.paths[inode], name)
                    self.names[inode][name] = child
                    pending.append(child)

    @staticmethod
    def _made(inode: int, status: os.stat_result) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        for name in ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_mtime_ns"):
            setattr(entry, name, getattr(status, name))
        entry.entry_timeout = entry.attr_timeout = VALID_S
        return entry

    async def lookup(self, parent_inode, name, ctx=None):
        child = self.names[parent_inode].get(name)
        if child is None:
            missing = pyfuse3.EntryAttributes()
            missing.st_ino = 0
            missing.entry_timeout = VALID_S
            return missing
        return self.attributes[child]

    async def getattr(self, inode, ctx=None):
        return self.attributes[inode]

    async def opendir(self, inode, ctx):
        return inode

    async def readdir(self, fh, start_id, token):
        for place, (name, child) in list(enumerate(self.names[fh].items(), 1))[start_id:]:
            if not pyfuse3.readdir_reply(token, name, self.attributes[child], place):
                return

    async def open(self, inode, flags, ctx):
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise pyfuse3.FUSEError(errno.EROFS)
        return pyfuse3.FileInfo(fh=os.open(self.paths[inode], os.O_RDONLY), keep_cache=True)

    async def read(self, fh, off, size):
        return os.pread(fh, size, off)

    async def release(self, fh):
        os.close(fh)


async def main() -> None:
    options = set(pyfuse3.default_options) | {"fsname=peer", "ro", "allow_other", "default_permissions"}
    pyfuse3.init(Tree(os.fsencode(sys.argv[1])), sys.argv[2], options)
    try:
        async with trio.open_nursery() as tasks:
            tasks.start_soon(pyfuse3.main)
            print("ready", flush=True)
            await trio.to_thread.run_sync(sys.stdin.read)
            pyfuse3.terminate()
            tasks.cancel_scope.cancel()
    finally:
        pyfuse3.close()


trio.run(main)

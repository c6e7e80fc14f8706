"""What goes over /dev/fuse: opcodes, flags and field layouts.

Layouts are those of the kernel's include/uapi/linux/fuse.h, protocol 7.31 to 7.45, in native byte order; each name
here is the one there in lower case. Every layout is its own `struct.Struct`, checked for its size by a test.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag

PROTOCOL_MAJOR = 7
PROTOCOL_MINOR_MIN = 31
"""Linux 5.4 speaks it: directories need no open (NO_OPENDIR_SUPPORT), content is never invalidated on its own."""
PROTOCOL_MINOR_MAX = 45
ROOT_ID = 1


class Op(IntEnum):
    """Opcodes of requests. Those that would change something are answered EROFS by their absence from the
    table."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SYNCFS = 50
    TMPFILE = 51


WRITING_OPS = frozenset(
    {
        Op.SETATTR,
        Op.SYMLINK,
        Op.MKNOD,
        Op.MKDIR,
        Op.UNLINK,
        Op.RMDIR,
        Op.RENAME,
        Op.LINK,
        Op.WRITE,
        Op.SETXATTR,
        Op.REMOVEXATTR,
        Op.CREATE,
        Op.FALLOCATE,
        Op.RENAME2,
        Op.COPY_FILE_RANGE,
        Op.TMPFILE,
    }
)
UNANSWERED_OPS = frozenset({Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT})


class Init(IntFlag):
    """Flags of the INIT exchange; those above bit 31 travel in `flags2`."""

    ASYNC_READ = 1 << 0
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22
    NO_OPENDIR_SUPPORT = 1 << 24
    EXPLICIT_INVAL_DATA = 1 << 25
    INIT_EXT = 1 << 30
    PASSTHROUGH = 1 << 37


FOPEN_KEEP_CACHE = 1 << 1
FOPEN_NOFLUSH = 1 << 5
FOPEN_PASSTHROUGH = 1 << 7

FUSE_IN_HEADER = struct.Struct("=IIQQIIIHH")
"""len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding."""
FUSE_OUT_HEADER = struct.Struct("=IiQ")
"""len, error (0 or a negative errno), unique."""
FUSE_INIT_IN = struct.Struct("=IIIII44x")
"""major, minor, max_readahead, flags, flags2. Older kernels send the first four only."""
FUSE_INIT_OUT = struct.Struct("=IIIIHHIIHHIIH22x")
"""major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran, max_pages,
map_alignment, flags2, max_stack_depth, request_timeout."""
FUSE_ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
"""ino, size, blocks, atime, mtime, ctime, atimensec, mtimensec, ctimensec, mode, nlink, uid, gid, rdev, blksize,
flags."""
FUSE_ENTRY_OUT = struct.Struct("=QQQQII")
"""nodeid, generation, entry_valid, attr_valid, entry_valid_nsec, attr_valid_nsec; a fuse_attr follows."""
FUSE_ATTR_OUT = struct.Struct("=QII")
"""attr_valid, attr_valid_nsec, dummy; a fuse_attr follows."""
FUSE_OPEN_IN = struct.Struct("=II")
"""flags, open_flags."""
FUSE_OPEN_OUT = struct.Struct("=QIi")
"""fh, open_flags, backing_id (padding before 7.40)."""
FUSE_READ_IN = struct.Struct("=QQIIQII")
"""fh, offset, size, read_flags, lock_owner, flags, padding."""
FUSE_RELEASE_IN = struct.Struct("=QIIQ")
"""fh, flags, release_flags, lock_owner."""
FUSE_KSTATFS = struct.Struct("=QQQQQIIII24x")
"""blocks, bfree, bavail, files, ffree, bsize, namelen, frsize, padding."""
FUSE_GETXATTR_IN = struct.Struct("=II")
"""size, padding."""
FUSE_GETXATTR_OUT = struct.Struct("=II")
"""size, padding."""
FUSE_ACCESS_IN = struct.Struct("=II")
"""mask, padding."""
FUSE_INTERRUPT_IN = struct.Struct("=Q")
"""unique of the request that its caller no longer waits for."""
FUSE_DIRENT = struct.Struct("=QQII")
"""ino, off, namelen, type; the name follows, padded to 8 bytes."""
FUSE_BACKING_MAP = struct.Struct("=iIQ")
"""fd, flags, padding."""

DIRENT_ALIGNMENT = 8
FUSE_MIN_READ_BUFFER = 8192


def _iow(number: int, size: int) -> int:
    return (1 << 30) | (size << 16) | (229 << 8) | number


FUSE_DEV_IOC_BACKING_OPEN = _iow(1, FUSE_BACKING_MAP.size)
FUSE_DEV_IOC_BACKING_CLOSE = _iow(2, 4)

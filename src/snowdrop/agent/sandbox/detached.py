"""Directories as detached mounts: descriptors that a process in another mount namespace can put in its tree."""

from __future__ import annotations

import ctypes
import os
import struct

from snowdrop.agent.sandbox.launcher import Mount
from snowdrop.domain.errors import SandboxError

_OPEN_TREE, _MOUNT_SETATTR, _AT_FDCWD = 428, 442, -100
_OPEN_TREE_CLONE, _AT_EMPTY_PATH, _AT_RECURSIVE = 0x1, 0x1000, 0x8000
_READ_ONLY_NOSUID_NODEV = 0x1 | 0x2 | 0x4
_PRIVATE = 1 << 18

_libc = ctypes.CDLL(None, use_errno=True)


def detached(mount: Mount) -> int:
    """A clone of the source's mount, read-only, nosuid and nodev; the caller closes it. Raises SandboxError.

    Needs CAP_SYS_ADMIN in the agent's own mount namespace.
    """
    if not mount.read_only:
        raise SandboxError("a fork is given read-only mounts only", where=mount.target)
    held = isinstance(mount.source, int)
    base = mount.source if isinstance(mount.source, int) else _AT_FDCWD
    path = b"" if held else os.fsencode(str(mount.source))
    flags = _OPEN_TREE_CLONE | _AT_RECURSIVE | os.O_CLOEXEC | (_AT_EMPTY_PATH if held else 0)
    fd = int(_libc.syscall(_OPEN_TREE, base, path, flags))
    if fd < 0:
        raise _failed("open_tree", mount)
    attributes = struct.pack("4Q", _READ_ONLY_NOSUID_NODEV, 0, _PRIVATE, 0)
    done = _libc.syscall(
        _MOUNT_SETATTR, fd, b"", _AT_EMPTY_PATH | _AT_RECURSIVE, attributes, ctypes.c_size_t(len(attributes))
    )
    if done < 0:
        error = _failed("mount_setattr", mount)
        os.close(fd)
        raise error
    return fd


def _failed(call: str, mount: Mount) -> SandboxError:
    return SandboxError(f"{call}: {os.strerror(ctypes.get_errno())}", where=mount.target)

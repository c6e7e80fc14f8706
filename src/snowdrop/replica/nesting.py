"""Fresh namespaces inside a sandbox: what a fork of a warm parent does before any user code runs in it.

System calls by ctypes, since Python 3.11 has no wrappers for them. Every failure raises OSError.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

from snowdrop.wire.warm import OWN_FOLDERS

NEW_NAMESPACES = 0x1000_0000 | 0x2000_0000 | 0x4000_0000 | 0x0800_0000 | 0x0400_0000 | 0x0200_0000 | 0x0002_0000
"""CLONE_NEWUSER, NEWPID, NEWNET, NEWIPC, NEWUTS, NEWCGROUP and NEWNS: the one combination the filter lets pass."""

_NOSUID_NODEV = 0x2 | 0x4
_PROC_FLAGS = _NOSUID_NODEV | 0x8
_PTS_FLAGS = 0x2 | 0x8
_READ_ONLY = 0x20 | 0x1000 | 0x1 | _NOSUID_NODEV
"""MS_REMOUNT, MS_BIND, MS_RDONLY."""
MOUNT_FLAGS = (_NOSUID_NODEV, _PROC_FLAGS, _PTS_FLAGS, _READ_ONLY)
"""All that the filter of a parent lets mount(2) be called with."""

_MOVE_MOUNT, _MOVE_EMPTY_PATH, _AT_FDCWD = 429, 0x4, -100
_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 4, 22, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 36, 38, 47
_CAPABILITIES_MAX = 64
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1

_libc = ctypes.CDLL(None, use_errno=True)


def unshare_all() -> None:
    """A user namespace that maps us to ourselves, and one of each other kind owned by it."""
    uid, gid = os.getuid(), os.getgid()
    set_dumpable(True)  # else our own files of /proc, where ids are mapped, are not ours
    _check(_libc.unshare(NEW_NAMESPACES), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


def mount_own(*, tmp_bytes_max: int, shm_bytes_max: int) -> None:
    """Own /proc, terminals, /tmp and /dev/shm over those of the parent."""
    _mount("proc", "/proc", _PROC_FLAGS, "")
    _mount("devpts", "/dev/pts", _PTS_FLAGS, "newinstance,ptmxmode=0666,mode=620")
    _mount("tmpfs", "/dev/shm", _NOSUID_NODEV, f"size={shm_bytes_max},mode=1777")  # noqa: S108 (inside)
    _mount("tmpfs", "/tmp", _NOSUID_NODEV, f"size={tmp_bytes_max},mode=1777")  # noqa: S108 (inside)
    home = Path("/tmp/home")  # noqa: S108 (inside)
    home.mkdir()
    home.chmod(0o1777)


def mount_given(mounts: Sequence[tuple[str, int]], folder: Path) -> None:
    """Detached mounts at their targets: below `folder`, made anew and closed afterwards, or at what is there.

    Those below our own directories are made there.
    """
    _mount("tmpfs", str(folder), _NOSUID_NODEV, "size=1048576,mode=0755")
    for target, fd in mounts:
        if Path(target).parent == folder:
            Path(target).mkdir()
        elif any(Path(target).is_relative_to(own) for own in OWN_FOLDERS):
            Path(target).mkdir(parents=True, exist_ok=True)
        moved = _libc.syscall(_MOVE_MOUNT, fd, b"", _AT_FDCWD, os.fsencode(target), _MOVE_EMPTY_PATH)
        _check(moved, f"move_mount {target}")
    path = os.fsencode(folder)
    _check(_libc.mount(b"none", path, None, ctypes.c_ulong(_READ_ONLY), None), f"remount {folder}")


def raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        answer = fcntl.ioctl(sock, _SIOCGIFFLAGS, struct.pack("16sh22x", b"lo", 0))
        flags = struct.unpack_from("h", answer, 16)[0]
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags | _IFF_UP))


def drop_capabilities() -> None:
    """All sets, for ever."""
    for number in range(_CAPABILITIES_MAX):
        if _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) != 0:
            break  # EINVAL: the kernel has no more
    _check(_libc.prctl(_PR_CAP_AMBIENT, 4, 0, 0, 0), "prctl ambient")
    header = struct.pack("Ii", 0x2008_0522, 0)
    _check(_libc.capset(header, struct.pack("6I", *(0,) * 6)), "capset")


def install_filter(programs: Sequence[bytes]) -> None:
    """System call filters beside those that hold already; the kernel takes the strictest answer."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl no_new_privs")
    for program in programs:
        code = ctypes.create_string_buffer(program, len(program))
        fprog = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
        _check(_libc.prctl(_PR_SET_SECCOMP, 2, fprog, 0, 0), "prctl seccomp")


def set_dumpable(value: bool) -> None:
    """Not dumpable: no process of the same user reads our memory, environment or descriptors."""
    _check(_libc.prctl(_PR_SET_DUMPABLE, int(value), 0, 0, 0), "prctl dumpable")


def adopt_orphans() -> None:
    """Processes whose parent ends become our children."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl subreaper")


def close_all_but(kept: set[int]) -> None:
    """Closes every descriptor above stderr that is not in `kept`."""
    below = 3
    for fd in sorted(kept):
        os.closerange(below, fd)
        below = max(below, fd + 1)
    os.closerange(below, os.sysconf("SC_OPEN_MAX"))


def _mount(kind: str, target: str, flags: int, data: str) -> None:
    name = kind.encode()
    done = _libc.mount(name, os.fsencode(target), name, ctypes.c_ulong(flags), data.encode() or None)
    _check(done, f"mount {target}")


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")

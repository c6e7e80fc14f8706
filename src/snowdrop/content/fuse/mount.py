"""Making and removing mounts: as root with mount(2), otherwise with fusermount3 of Debian's fuse3.

Whoever holds the descriptor that `mount_tree` returns keeps the mount alive; when the last copy is closed,
readers get "Transport endpoint is not connected" until the mount is removed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import NamedTuple

from snowdrop.content.fuse.handshake import READ_AHEAD_BYTES
from snowdrop.domain.errors import UnavailableError

DEVICE = Path("/dev/fuse")
MOUNTINFO = Path("/proc/self/mountinfo")
SOURCE = "snowdrop"
"""What the first column of /proc/mounts says of ours."""
_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 1, 2, 4
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_ROOT_MODE = "40000"
_HELPER = "fusermount3"
HELPER_S_MAX = 10.0


class MountedTree(NamedTuple):
    """A line of /proc/self/mountinfo that is one of ours."""

    path: Path
    device: str


def may_mount() -> str:
    """How this process can mount: "root", "fusermount3", or "" with no way at all."""
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return ""
    if os.geteuid() == 0:
        return "root"
    return _HELPER if shutil.which(_HELPER) else ""


def mount_tree(at: Path) -> int:
    """Mounts an empty FUSE connection at directory `at`, read-only; returns its device descriptor.

    As root everybody may read it; otherwise only this user. Every access waits until a session serves the
    descriptor. Blocks; raises UnavailableError.
    """
    try:
        return _mount_as_root(at) if os.geteuid() == 0 else _mount_with_helper(at)
    except (OSError, subprocess.SubprocessError) as error:
        raise UnavailableError(
            f"a model directory cannot be mounted: {error}",
            where=str(at),
            next_step="run `snowdrop doctor`; without a mount, files are there once they are complete",
        ) from error


def unmount_tree(at: Path) -> None:
    """Takes the mount at `at` out of sight; readers that have files open keep them. Does nothing if there is
    none."""
    if os.geteuid() == 0:
        while _libc().umount2(os.fsencode(at), _MNT_DETACH | _UMOUNT_NOFOLLOW) == 0:
            pass  # mounts may lie on top of each other
        if ctypes.get_errno() not in {errno.EINVAL, errno.ENOENT}:
            number = ctypes.get_errno()
            raise UnavailableError(f"cannot unmount: {os.strerror(number)}", where=str(at))
        return
    for _ in range(len(mounted_trees(at))):
        try:
            subprocess.run(
                [_HELPER, "-u", "-z", "-q", "--", str(at)],
                check=True,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=HELPER_S_MAX,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise UnavailableError(f"cannot unmount: {error}", where=str(at)) from error


def mounted_trees(below: Path) -> list[MountedTree]:
    """Our mounts at `below` or inside it, dead ones too. Asks the mounts themselves nothing, so it cannot hang."""
    below = _real(below)
    found: list[MountedTree] = []
    # Not by `splitlines`: of the characters that it splits at, the kernel escapes none but the newline.
    for line in MOUNTINFO.read_text(encoding="utf-8", errors="surrogateescape").split("\n")[:-1]:
        before, _, after = line.partition(" - ")
        fields, kind, source = before.split(" "), after.split(" ")[0], after.split(" ")[1]
        path = Path(unescaped(fields[4]))
        if kind.startswith("fuse") and source == SOURCE and path.is_relative_to(below):
            found.append(MountedTree(path, fields[2]))
    return found


def set_read_ahead(at: Path) -> bool:
    """Has the kernel read READ_AHEAD_BYTES ahead on the mount at `at`. Only root may; returns whether it was
    done."""
    for tree in mounted_trees(at):
        if tree.path == _real(at):
            try:
                Path(f"/sys/class/bdi/{tree.device}/read_ahead_kb").write_text(str(READ_AHEAD_BYTES >> 10))
            except OSError:
                return False
            return True
    return False


def _mount_as_root(at: Path) -> int:
    fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fd},rootmode={_ROOT_MODE},user_id=0,group_id=0,allow_other,default_permissions"
    flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV
    if _libc().mount(SOURCE.encode(), os.fsencode(at), b"fuse.snowdrop", flags, options.encode()) != 0:
        number = ctypes.get_errno()
        os.close(fd)
        raise OSError(number, os.strerror(number), str(at))
    return fd


def _mount_with_helper(at: Path) -> int:
    """fusermount3 opens the device, mounts it, and sends it back over the socket named in its environment."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        options = f"ro,nosuid,nodev,default_permissions,fsname={SOURCE},subtype=snowdrop"
        done = subprocess.run(
            [_HELPER, "-o", options, "--", str(at)],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=HELPER_S_MAX,
            pass_fds=(theirs.fileno(),),
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
        )
        if done.returncode != 0:
            raise OSError(errno.EPERM, done.stderr.decode(errors="replace").strip() or f"{_HELPER} failed")
        ours.settimeout(HELPER_S_MAX)
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    if not fds:
        raise OSError(errno.EPROTO, f"{_HELPER} sent no descriptor")
    os.set_inheritable(fds[0], False)
    return fds[0]


def _real(at: Path) -> Path:
    """As the kernel lists it. The last part is not looked at: a mount that nobody serves would not answer."""
    return at.parent.resolve() / at.name


def unescaped(text: str) -> str:
    """mountinfo writes blanks and backslashes as octal."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)

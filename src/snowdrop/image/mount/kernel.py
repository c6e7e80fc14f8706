"""Making and removing kernel mounts of images: EROFS over files, and what this node can do at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
from pathlib import Path

from snowdrop.content.fuse.mount import MOUNTINFO, may_mount, unescaped
from snowdrop.domain.errors import UnavailableError
from snowdrop.image.mount.port import Method

FILESYSTEMS = Path("/proc/filesystems")
_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 1, 2, 4
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_FILE_BACKED_SINCE = (6, 12)
"""Linux that mounts EROFS from files; before, each file would need a loop device."""


log = logging.getLogger("snowdrop.image")


def possible_methods() -> tuple[Method, ...]:
    """What this process can do here, the best first. `unpack` always works."""
    found: list[Method] = []
    way = may_mount()
    if way == "root" and has_erofs():
        found.append("erofs")
    if way:
        found.append("fuse")
    return (*found, "unpack")


def has_erofs() -> bool:
    """Whether the kernel can mount EROFS from files. One that has it as a module not yet loaded counts as not."""
    names = [line.split()[-1] for line in FILESYSTEMS.read_text().splitlines() if line.strip()]
    return "erofs" in names and _release(os.uname().release) >= _FILE_BACKED_SINCE


def mount_erofs(metadata: Path, data: Path | None, at: Path) -> None:
    """Mounts the file system in `metadata` at `at`, with `data` as its extra device; read-only. Blocks.

    Both files may be removed afterwards. Raises UnavailableError.
    """
    with contextlib.ExitStack() as open_files:
        options = b""
        if data is not None:
            try:
                # By descriptor: a path in the options may hold no comma.
                fd = os.open(data, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise _failed(error.errno or errno.EIO, at) from error
            open_files.callback(os.close, fd)
            options = b"device=/proc/self/fd/%d" % fd
        flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV
        if _libc().mount(os.fsencode(metadata), os.fsencode(at), b"erofs", flags, options) != 0:
            raise _failed(ctypes.get_errno(), at)


def unmount(at: Path) -> None:
    """Takes one mount at `at` out of sight; does nothing if there is none. Raises UnavailableError."""
    if _libc().umount2(os.fsencode(at), _MNT_DETACH | _UMOUNT_NOFOLLOW) != 0:
        number = ctypes.get_errno()
        if number not in {errno.EINVAL, errno.ENOENT}:
            raise UnavailableError(f"cannot unmount: {os.strerror(number)}", where=str(at))


def sweep_erofs(below: Path, work: Path) -> None:
    """Removes EROFS mounts at `below` or inside it whose metadata lay in `work`: a process that died left them."""
    below, work = below.parent.resolve() / below.name, work.resolve()
    for line in MOUNTINFO.read_text(encoding="utf-8", errors="surrogateescape").split("\n")[:-1]:
        before, _, after = line.partition(" - ")
        kind, source = after.split(" ")[:2]
        path = Path(unescaped(before.split(" ")[4]))
        if kind == "erofs" and Path(unescaped(source)).is_relative_to(work) and path.is_relative_to(below):
            try:
                unmount(path)
            except UnavailableError as error:
                log.warning("a mount of an earlier process stays: %s", error)


def _failed(number: int, at: Path) -> UnavailableError:
    return UnavailableError(
        f"an image cannot be mounted with EROFS: {os.strerror(number)}",
        where=str(at),
        next_step="run `snowdrop doctor`; the kernel's log says what it did not like",
    )


def _release(text: str) -> tuple[int, int]:
    """The first two numbers of a kernel's release; (0, 0) if it has none."""
    parts = text.split(".")
    try:
        return int(parts[0]), int(parts[1])
    except (ValueError, IndexError):
        return 0, 0


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)

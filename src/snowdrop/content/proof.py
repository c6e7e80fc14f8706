"""What outlives the data plane without being read again: the files in `tree/`, until the machine restarts.

A file enters `tree/` only after this program has verified every chunk of it. While the machine runs, its bytes are
then those of the page cache and of completed writes, whether or not the program that wrote them lives. So a new
data plane may go on believing a file that is in the tree if three things hold:

- the boot id is the one under which it was verified: a power cut, a crash of the kernel or a disk that was read
  elsewhere in between all mean another one,
- its bits say that it was durable, so no failed write back can have changed it unseen,
- inode, size, modification and change time are as they were: nobody else has written to it.

Otherwise the file leaves the tree until it has been read and hashed again. The record itself is never synced: it
is worth nothing after a crash of the machine, which the boot id tells.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import msgspec

from snowdrop.content.diskio import DiskIo


class FileMark(msgspec.Struct, frozen=True, array_like=True):
    """A file as it was when its bytes were known to be right."""

    inode: int
    size: int
    modified_ns: int
    changed_ns: int


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """`files` by path in the tree. Holds within `boot_id` only."""

    boot_id: str
    files: dict[str, FileMark]


def current_boot_id() -> str:
    """The kernel's name for the time since it was started; empty if it does not tell, which proves nothing."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def mark_of(path: Path) -> FileMark | None:
    """None if there is no regular file at `path`."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return FileMark(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def read_proof(path: Path, boot_id: str) -> dict[str, FileMark]:
    """The files that are still proven; none if the record is missing, unreadable or of another boot."""
    try:
        proof = msgspec.json.decode(path.read_bytes(), type=Proof)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return {}
    return proof.files if boot_id and proof.boot_id == boot_id else {}


def write_proof(path: Path, boot_id: str, files: dict[str, FileMark], io: DiskIo) -> None:
    """Replaces the record. It is not synced."""
    data = msgspec.json.encode(Proof(boot_id=boot_id, files=files))
    temporary = path.with_suffix(".tmp")
    io.create(temporary, 0, 0o600)
    fd = io.open(temporary, os.O_WRONLY)
    try:
        io.write(fd, memoryview(data), 0)
    finally:
        os.close(fd)
    io.replace(temporary, path)

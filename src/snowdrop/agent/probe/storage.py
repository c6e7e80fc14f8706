"""Probes of file systems and memory: what content and images need."""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from snowdrop.agent.probe.base import PROBE_S_MAX, ProbeFailed, run_trial
from snowdrop.agent.sandbox.detect import parse_mountinfo, parse_own_cgroups

BLOCK_BYTES = 4096
DISK_FREE_BYTES_MIN = 5 << 30
MEMORY_BYTES_MIN = 1 << 30
TRIAL_BYTES = 64 << 20
F_ADD_SEALS, F_SEAL_FUTURE_WRITE = 1033, 0x10


def fuse() -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            return run_trial("fuse", folder)
        except ProbeFailed as error:
            advice = "modprobe fuse, and give this user /dev/fuse; without root: apt-get install fuse3"
            raise ProbeFailed(str(error), advice) from error


def erofs() -> str:
    """Makes a tiny image and mounts it."""
    maker = shutil.which("mkfs.erofs")
    if maker is None:
        raise ProbeFailed("mkfs.erofs is not installed", "apt-get install erofs-utils (or your system's package)")
    with tempfile.TemporaryDirectory() as top:
        tree, image, target = Path(top, "tree"), Path(top, "image"), Path(top, "mounted")
        tree.mkdir()
        target.mkdir()
        (tree / "probe").write_text("snowdrop")
        subprocess.run(
            [maker, "--quiet", str(image), str(tree)], check=True, capture_output=True, timeout=PROBE_S_MAX
        )
        try:
            return run_trial("erofs", str(image), str(target))
        except ProbeFailed as error:
            raise ProbeFailed(str(error), "run as root with a kernel that has erofs (modprobe erofs)") from error


def sealed_memory() -> str:
    """Makes a memory file, seals it against future writing, and tries to write."""
    fd = os.memfd_create("probe", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, BLOCK_BYTES)
        with mmap.mmap(fd, BLOCK_BYTES) as area:
            fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
            area[:4] = b"kept"
            try:
                os.pwrite(fd, b"lost", 0)
            except PermissionError:
                return "memfd sealed: writing was refused, the earlier mapping still writes"
            raise ProbeFailed("a sealed memfd was written", "a kernel of 5.1 or newer")
    finally:
        os.close(fd)


def direct_io(state: Path) -> str:
    """Writes and reads a block past the page cache in the state folder."""
    with _scratch(state) as folder, mmap.mmap(-1, BLOCK_BYTES) as block:
        block[:8] = b"snowdrop"
        fd = os.open(folder / "direct", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        try:
            os.pwritev(fd, [block], 0)
            os.fdatasync(fd)
            block[:8] = bytes(8)
            os.preadv(fd, [block], 0)
            if block[:8] != b"snowdrop":
                raise ProbeFailed("read back other bytes than were written", "check the disk")
        finally:
            os.close(fd)
    return f"wrote and read {BLOCK_BYTES} bytes in {state}"


def disk_space(state: Path) -> str:
    with _scratch(state) as folder:
        (folder / "space").write_bytes(bytes(BLOCK_BYTES))
        usage = shutil.disk_usage(folder)
    said = f"{usage.free / 1e9:.1f} GB free of {usage.total / 1e9:.1f} GB in {state}"
    if usage.free < DISK_FREE_BYTES_MIN:
        raise ProbeFailed(said, f"free at least {DISK_FREE_BYTES_MIN / 1e9:.0f} GB, or choose another --state")
    return said


def memory() -> str:
    """The memory we may use, after touching some of it."""
    with mmap.mmap(-1, TRIAL_BYTES) as area:
        for at in range(0, TRIAL_BYTES, mmap.PAGESIZE):
            area[at] = 1
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = memory_limit_bytes()
    usable = min(total, limit) if limit else total
    held = f", limited to {limit / 1e9:.1f} GB by a cgroup" if limit and limit < total else ""
    said = f"{total / 1e9:.1f} GB{held}; touched {TRIAL_BYTES >> 20} MiB"
    if usable < MEMORY_BYTES_MIN:
        raise ProbeFailed(said, f"give at least {MEMORY_BYTES_MIN / 1e9:.0f} GB")
    return said


def memory_limit_bytes() -> int | None:
    """The lowest memory limit of the cgroups that we are in; None if there is none."""
    own = parse_own_cgroups(Path("/proc/self/cgroup").read_text())
    limits = []
    for mount in parse_mountinfo(Path("/proc/self/mountinfo").read_text()):
        if mount.version == 1 and "memory" not in mount.controllers:
            continue
        name, file = ("", "memory.max") if mount.version == 2 else ("memory", "memory.limit_in_bytes")
        place = mount.mount_point / own.get(name, "/").removeprefix(mount.root).strip("/")
        for folder in (place, *place.parents):
            if not folder.is_relative_to(mount.mount_point):
                break
            with suppress(OSError, ValueError):  # "max", or a level without the file
                limits.append(int((folder / file).read_text()))
    return min(limits, default=None)


@contextmanager
def _scratch(state: Path) -> Iterator[Path]:
    """A folder inside the state folder, or where that will be made."""
    place = next(folder for folder in (state, *state.absolute().parents) if folder.is_dir())
    with tempfile.TemporaryDirectory(dir=place, prefix=".probe-") as folder:
        yield Path(folder)

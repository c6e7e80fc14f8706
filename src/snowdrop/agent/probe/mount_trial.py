"""Run by path: mounts in a private mount namespace, which ends with this process. Standard library only."""

import array
import ctypes
import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 1, 2, 4, 0x4000, 1 << 18
FUSE_PASSTHROUGH_HIGH = 1 << 5
"""Bit 37 of the flags, which are in two words."""
_libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        sys.exit(f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str, flags: int, data: str) -> None:
    parts = [part.encode() for part in (source, target, kind)]
    check(_libc.mount(*parts, ctypes.c_ulong(flags), data.encode()), f"mount of {kind} failed")


def private_namespace() -> None:
    check(_libc.unshare(CLONE_NEWNS), "no mount namespace of its own")
    mount("none", "/", "none", MS_REC | MS_PRIVATE, "")


def fuse(folder: str) -> str:
    if os.geteuid() != 0:
        return fuse_by_helper(folder)
    device = os.open("/dev/fuse", os.O_RDWR)
    private_namespace()
    mount("snowdrop", folder, "fuse", MS_NOSUID | MS_NODEV, f"fd={device},rootmode=40000,user_id=0,group_id=0")
    return f"mounted with mount(2), {_passthrough(os.read(device, 64 << 10))}"


def _passthrough(init: bytes) -> str:
    """What the kernel offers in its first request (fuse_in_header, fuse_init_in)."""
    offers = len(init) >= 60 and struct.unpack_from("=I", init, 56)[0] & FUSE_PASSTHROUGH_HIGH
    return (
        "complete files are read by the kernel itself" if offers else "all files are read through the data plane"
    )


def fuse_by_helper(folder: str) -> str:
    ours, theirs = socket.socketpair()
    command = ["fusermount3", "-o", "fsname=snowdrop", "--", folder]
    env = {**os.environ, "_FUSE_COMMFD": str(theirs.fileno())}
    subprocess.run(command, check=True, env=env, pass_fds=[theirs.fileno()])
    numbers = array.array("i")
    _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(numbers.itemsize))
    numbers.frombytes(ancillary[0][2])
    os.close(numbers[0])
    subprocess.run(["fusermount3", "-u", "-z", "--", folder], check=False, stderr=subprocess.DEVNULL)
    return "mounted with fusermount3, all files are read through the data plane"


def erofs(image: str, folder: str) -> str:
    private_namespace()
    how = "from the file itself"
    result = _libc.mount(image.encode(), folder.encode(), b"erofs", ctypes.c_ulong(MS_RDONLY), b"")
    if result != 0:
        refused = os.strerror(ctypes.get_errno())
        how = "through a loop device"
        command = ["losetup", "--find", "--show", "--read-only", image]
        made = subprocess.run(command, check=False, capture_output=True, text=True)
        if made.returncode != 0:
            sys.exit(f"mount of erofs failed: {refused}; nor is there a loop device: {made.stderr.strip()}")
        device = made.stdout.strip()
        try:
            mount(device, folder, "erofs", MS_RDONLY, "")
        finally:
            subprocess.run(["losetup", "--detach", device], check=False)
    if Path(folder, "probe").read_text() != "snowdrop":
        sys.exit("the mounted file has another content")
    return f"mounted {how}"


def user_namespace() -> str:
    uid, gid = os.geteuid(), os.getegid()
    check(_libc.unshare(CLONE_NEWUSER | CLONE_NEWNS), "no user namespace")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    with tempfile.TemporaryDirectory() as folder:
        mount("none", "/", "none", MS_REC | MS_PRIVATE, "")
        mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, "")
        check(_libc.umount2(folder.encode(), 2), "umount failed")
    return "made one and mounted in it"


ACTIONS: dict[str, Callable[..., str]] = {"fuse": fuse, "erofs": erofs, "user-namespace": user_namespace}

if __name__ == "__main__":
    try:
        print(ACTIONS[sys.argv[1]](*sys.argv[2:]))
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(str(error))

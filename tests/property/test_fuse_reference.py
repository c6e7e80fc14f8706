"""A mounted tree against a reference: the same tree on disk, bind-mounted read-only. Every operation must end
alike."""

import ctypes
import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuse_helpers import DictSource, needs_fuse, serving
from snowdrop.content.paths import clashing_path

pytestmark = needs_fuse

_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MNT_DETACH = 1, 32, 4096, 2
NAMES = ["a", "b.txt", "c d", "é", "x" * 200]

paths = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map("/".join)
contents = st.binary(max_size=300) | st.builds(
    lambda unit, times: unit * times, st.binary(min_size=1, max_size=7), st.integers(1, 40_000)
)


def _unclashed(files: dict[str, bytes]) -> dict[str, bytes]:
    kept: dict[str, bytes] = {}
    for path, content in files.items():
        if clashing_path([*kept, path]) is None:
            kept[path] = content
    return kept


trees = st.dictionaries(paths, contents, max_size=8).map(_unclashed)
places = st.sampled_from(["", *NAMES]) | paths
sizes = st.integers(0, 300_000)
operations = st.one_of(
    st.tuples(st.just("stat"), places),
    st.tuples(st.just("list"), places),
    st.tuples(st.just("read"), places, sizes, sizes),
    st.tuples(st.just("read_all"), places),
    st.tuples(
        st.just("open"),
        places,
        st.sampled_from([os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_DIRECTORY, os.O_CREAT | os.O_EXCL]),
    ),
    st.tuples(st.just("seek"), places, st.sampled_from([os.SEEK_END, os.SEEK_DATA, os.SEEK_HOLE]), sizes),
    st.tuples(st.just("access"), places, st.sampled_from([os.F_OK, os.R_OK, os.W_OK])),
    st.tuples(st.sampled_from(["unlink", "rmdir", "mkdir", "readlink", "chmod", "utime", "truncate"]), places),
    st.tuples(st.just("rename"), places, places),
    st.tuples(st.just("getxattr"), places),
)


@contextmanager
def reference(files: dict[str, bytes], folder: Path) -> Iterator[Path]:
    root, at = folder / "real", folder / "reference"
    at.mkdir()
    root.mkdir()
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
        (root / path).chmod(0o444)
    for directory in (root, *(path for path in root.rglob("*") if path.is_dir())):
        directory.chmod(0o555)
    libc = ctypes.CDLL(None, use_errno=True)
    raw = os.fsencode(at)
    assert libc.mount(os.fsencode(root), raw, b"none", ctypes.c_ulong(_MS_BIND), None) == 0
    try:
        assert libc.mount(b"none", raw, b"none", ctypes.c_ulong(_MS_BIND | _MS_REMOUNT | _MS_RDONLY), None) == 0
        yield at
    finally:
        libc.umount2(raw, _MNT_DETACH)


def perform(root: Path, operation: tuple[object, ...]) -> object:
    name, place, *rest = operation
    try:
        return _ACTIONS[str(name)](root / str(place), root, *rest)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, "?")


def _read(path: Path, _root: Path, offset: int, length: int) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


def _seek(path: Path, _root: Path, whence: int, offset: int) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            return -1  # what a directory's offsets mean is each file system's own affair
        return os.lseek(fd, offset, whence)
    finally:
        os.close(fd)


def _stat(path: Path, _root: Path) -> object:
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        return found.st_mode, found.st_nlink
    return found.st_mode, found.st_size, found.st_nlink, found.st_uid, found.st_gid


_ACTIONS: dict[str, Callable[..., object]] = {
    "stat": _stat,
    "list": lambda path, _root: sorted(os.listdir(path)),
    "read": _read,
    "read_all": lambda path, _root: path.read_bytes(),
    "open": lambda path, _root, flags: os.close(os.open(path, flags)),
    "seek": _seek,
    "access": lambda path, _root, mode: os.access(path, mode),
    "unlink": lambda path, _root: path.unlink(),
    "rmdir": lambda path, _root: path.rmdir(),
    "mkdir": lambda path, _root: path.mkdir(),
    "readlink": lambda path, _root: os.readlink(path),
    "chmod": lambda path, _root: path.chmod(0o777),
    "utime": lambda path, _root: os.utime(path, (1, 1)),
    "truncate": lambda path, _root: os.truncate(path, 0),
    "rename": lambda path, root, other: os.rename(path, root / str(other)),
    "getxattr": lambda path, _root: os.getxattr(path, b"user.none"),
}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(files=trees, steps=st.lists(operations, min_size=5, max_size=60), passthrough=st.booleans())
def test_every_operation_ends_as_on_a_read_only_disk(
    files: dict[str, bytes], steps: list[tuple[object, ...]], passthrough: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = DictSource(files, block_bytes=4096)
        with reference(files, root) as expected, serving(root / "m", files, source, passthrough=passthrough):
            for step in steps:
                assert perform(root / "m", step) == perform(expected, step), step

"""A mounted image against a reference model of a file system: random trees, random operations."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuse_helpers import needs_fuse
from image_mount_helpers import MemoryContent, built, mounting
from image_reference import OutsideError, Reference, perform
from snowdrop.domain.image import ImageTree, TreeEntry
from snowdrop.image.mount.kernel import possible_methods
from snowdrop.image.mount.port import Method

pytestmark = needs_fuse

NAMES = [b"a", b"b.txt", b"!", b"-", b"\xff\xfe", b"c d", b"e\n", b"\xc3\xa9", b"x" * 255]
names = st.sampled_from(NAMES)
modes = st.integers(0, 0o7777)
ids = st.sampled_from([0, 1, 1000, 65_534, 4_000_000_000])
times = st.integers(-(2**31 - 2) * 10**9, 2**33 * 10**9)  # what ext4 can hold, for the unpacked copy
contents = st.binary(max_size=300) | st.builds(
    lambda unit, count: unit * count, st.binary(min_size=1, max_size=7), st.integers(1, 40_000)
)
values = st.binary(max_size=200)
TRUSTED = [b"trusted.t", b"security.own", b"security.x"]
file_xattrs = st.dictionaries(st.sampled_from([*TRUSTED, b"user.u", b"user.\xffany"]), values, max_size=3)
other_xattrs = st.dictionaries(st.sampled_from(TRUSTED), values, max_size=2)
targets = st.lists(names | st.just(b".."), min_size=1, max_size=4).map(b"/".join) | st.just(b"y" * 4095)


@st.composite
def trees(draw: st.DrawFn) -> tuple[ImageTree, bytes]:
    found: dict[bytes, tuple[TreeEntry, bytes]] = {}
    directories = [b""]
    linkable: list[bytes] = []

    def entry(path: bytes, kind: str, target: bytes = b"") -> TreeEntry:
        xattrs = draw(other_xattrs if kind in {"symlink", "fifo"} else file_xattrs)
        return TreeEntry(
            *(path, kind, draw(modes) if kind != "symlink" else 0, draw(ids), draw(ids), draw(times)),
            *(0, 0, b"", target, tuple(sorted(xattrs.items()))),
        )

    found[b""] = entry(b"", "dir"), b""
    for _ in range(draw(st.integers(0, 14))):
        parent = draw(st.sampled_from(directories))
        name = draw(names)
        path = parent + b"/" + name if parent else name
        if path in found:
            continue
        kind = draw(st.sampled_from(["dir", "dir", "file", "file", "file", "symlink", "fifo", "hardlink"]))
        if kind == "hardlink":
            if linkable:
                found[path] = TreeEntry(path, "hardlink", target=draw(st.sampled_from(linkable))), b""
            continue
        found[path] = (
            entry(path, kind, draw(targets) if kind == "symlink" else b""),
            draw(contents) if kind == "file" else b"",
        )
        (directories if kind == "dir" else linkable).append(path)
    return built(list(found.values()))


paths = st.lists(names | st.just(b".."), max_size=4).map(b"/".join) | st.just(b"z" * 256)
numbers = st.integers(0, 300_000)
operations = st.one_of(
    st.tuples(st.sampled_from(["stat", "lstat", "readlink", "list", "xattrs"]), paths),
    st.tuples(st.just("read"), paths, numbers, numbers),
    st.tuples(st.just("getxattr"), paths, st.sampled_from([*TRUSTED, b"user.none"])),
)


@pytest.mark.parametrize("method", possible_methods())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(made=trees(), steps=st.lists(operations, max_size=40))
def test_every_operation_ends_as_in_the_reference_model(
    method: Method, made: tuple[ImageTree, bytes], steps: list[tuple[object, ...]]
) -> None:
    tree, data = made
    reference = Reference(tree, data)
    every = [(name, entry.path) for entry in tree.entries for name in ("lstat", "xattrs", "list", "readlink")]
    whole = [("read", entry.path, 0, entry.size + 1) for entry in tree.entries]
    with tempfile.TemporaryDirectory() as folder:
        content = MemoryContent(tree, data, Path(folder) / "local")
        with mounting(content, method, Path(folder)):
            root = bytes(Path(folder) / "root")
            for step in (*steps, *every, *whole):
                try:
                    expected = reference.perform(step)
                except OutsideError:
                    continue
                assert perform(root, step) == expected, step

"""The protocol's pure parts: layouts, INIT, inodes, answers; and the journal."""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from fuse_helpers import manifest_of
from snowdrop.content.fuse import mount, structs
from snowdrop.content.fuse.answers import Answers
from snowdrop.content.fuse.handshake import agree
from snowdrop.content.fuse.journal import SLOTS, Journal, create_journal
from snowdrop.content.fuse.structs import (
    FUSE_ACCESS_IN,
    FUSE_DIRENT,
    FUSE_GETXATTR_IN,
    FUSE_IN_HEADER,
    FUSE_INIT_IN,
    FUSE_INIT_OUT,
    FUSE_READ_IN,
    ROOT_ID,
    WRITING_OPS,
    Init,
    Op,
)
from snowdrop.content.fuse.tree import Tree
from snowdrop.domain.errors import ProtocolError

FILES = {"b.txt": b"bb", "d/e/f": b"f" * 5000, "d/g": b"", "a b": b"1"}


@pytest.fixture
def tree() -> Tree:
    return Tree(manifest_of(FILES, {"d/g": 0o700, "b.txt": 0o600}), uid=3, gid=4)


@pytest.fixture
def journal() -> Iterator[Journal]:
    fd = create_journal(2)
    opened = Journal(fd, 2)
    os.close(fd)
    yield opened
    opened.close()


def reopened(journal: Journal) -> Journal:
    """As the next server gets it."""
    fd = os.memfd_create("copy")
    try:
        os.write(fd, journal._map[:])
        return Journal(fd, 2)
    finally:
        os.close(fd)


def test_layouts_have_the_sizes_of_the_kernels_header() -> None:
    sizes = {
        "FUSE_IN_HEADER": 40, "FUSE_OUT_HEADER": 16, "FUSE_INIT_IN": 64, "FUSE_INIT_OUT": 64, "FUSE_ATTR": 88,
        "FUSE_ENTRY_OUT": 40, "FUSE_ATTR_OUT": 16, "FUSE_OPEN_IN": 8, "FUSE_OPEN_OUT": 16, "FUSE_READ_IN": 40,
        "FUSE_RELEASE_IN": 24, "FUSE_KSTATFS": 80, "FUSE_GETXATTR_IN": 8, "FUSE_GETXATTR_OUT": 8,
        "FUSE_ACCESS_IN": 8, "FUSE_INTERRUPT_IN": 8, "FUSE_DIRENT": 24, "FUSE_BACKING_MAP": 16,
    }  # fmt: skip
    assert {name: getattr(structs, name).size for name in sizes} == sizes
    assert structs.FUSE_DEV_IOC_BACKING_OPEN == 0x4010E501


def init(minor: int = 45, flags: int = (1 << 43) - 1, major: int = 7) -> bytes:
    return FUSE_INIT_IN.pack(major, minor, 131_072, flags & 0xFFFFFFFF, flags >> 32)


def test_init_takes_passthrough_only_where_it_is_offered_and_allowed() -> None:
    for offered, allowed in ((True, True), (True, False), (False, True)):
        flags = (1 << 43) - 1 if offered else ((1 << 43) - 1) & ~Init.PASSTHROUGH
        agreement = agree(init(flags=flags), passthrough_allowed=allowed)
        assert agreement is not None
        assert bool(agreement.flags & Init.PASSTHROUGH) == (offered and allowed)
        assert bool(agreement.flags & Init.NO_OPEN_SUPPORT) != (offered and allowed)
        *_, low, _, _, _, _, _, _, high, depth, _ = FUSE_INIT_OUT.unpack(agreement.reply)
        assert low | high << 32 == agreement.flags
        assert depth == (1 if offered and allowed else 0)


def test_init_of_an_older_kernel_has_four_fields_and_no_second_flags() -> None:
    old = init(minor=31, flags=((1 << 43) - 1) & ~Init.INIT_EXT)[:16]
    agreement = agree(old, passthrough_allowed=True)
    assert agreement is not None
    assert agreement.minor == 31
    assert not agreement.flags & Init.PASSTHROUGH
    assert agree(init(major=8), passthrough_allowed=True) is None
    with pytest.raises(ProtocolError, match=r"7\.26"):
        agree(init(minor=26), passthrough_allowed=True)


def test_numbers_names_and_modes(tree: Tree) -> None:
    assert [tree.lookup(ROOT_ID, name) for name in (b"b.txt", b"a b", b"no")] == [2, 5, 0]
    d = tree.lookup(ROOT_ID, b"d")
    e = tree.lookup(d, b"e")
    assert tree.lookup(e, b"..") == d
    assert tree.lookup(d, b"..") == tree.lookup(ROOT_ID, b"..") == ROOT_ID
    assert tree.lookup(e, b"f") == 3
    assert tree.mode(2) == stat.S_IFREG | 0o444
    assert tree.mode(4) == stat.S_IFREG | 0o544
    assert tree.mode(d) == stat.S_IFDIR | 0o555
    assert [entry.name for entry in tree.listing(d)] == [b".", b"..", b"e", b"g"]
    for unknown in (0, 99):
        with pytest.raises(KeyError):
            tree.attributes(unknown)


def errno_of(answers: Answers, op: int, node: int, body: bytes = bytes(64)) -> int | None:
    with pytest.raises(OSError) as caught:
        answers.answer(op, node, memoryview(body))
    return caught.value.errno


def test_what_would_change_something_is_refused_as_read_only(tree: Tree) -> None:
    answers = Answers(tree)
    assert {errno_of(answers, op, 2) for op in WRITING_OPS} == {errno.EROFS}
    assert errno_of(answers, Op.ACCESS, 2, FUSE_ACCESS_IN.pack(os.W_OK, 0)) == errno.EROFS
    assert errno_of(answers, Op.ACCESS, 2, FUSE_ACCESS_IN.pack(os.X_OK, 0)) == errno.EACCES
    assert answers.answer(Op.ACCESS, 4, memoryview(FUSE_ACCESS_IN.pack(os.X_OK, 0))) == b""
    assert errno_of(answers, Op.GETXATTR, 2) == errno.ENODATA
    assert answers.answer(Op.LISTXATTR, 2, memoryview(FUSE_GETXATTR_IN.pack(100, 0))) == b""
    assert errno_of(answers, Op.LSEEK, 2) == errno.ENOSYS
    assert errno_of(answers, 4242, 2) == errno.ENOSYS
    assert errno_of(answers, Op.GETATTR, 99) == errno.ENOENT
    assert errno_of(answers, Op.LOOKUP, 2) == errno.ENOTDIR
    assert errno_of(answers, Op.READDIR, 2) == errno.ENOTDIR


@pytest.mark.parametrize("op", [Op.READDIR, Op.READDIRPLUS])
def test_a_listing_goes_on_where_the_last_answer_ended(tree: Tree, op: Op) -> None:
    answers = Answers(tree)
    before = 128 if op == Op.READDIRPLUS else 0
    names: list[bytes] = []
    offset = 0
    for _ in range(20):
        request = FUSE_READ_IN.pack(0, offset, 200, 0, 0, 0, 0)
        answer = answers.answer(op, ROOT_ID, memoryview(request))
        if not answer:
            break
        at = 0
        while at < len(answer):
            _, offset, length, _ = FUSE_DIRENT.unpack_from(answer, at + before)
            start = at + before + FUSE_DIRENT.size
            names.append(answer[start : start + length])
            at += before + -(-(FUSE_DIRENT.size + length) // 8) * 8
    assert names == [b".", b"..", b"d", b"b.txt", b"a b"]


def test_unanswered_requests_are_handed_to_the_next_server(journal: Journal) -> None:
    taken = [journal.take(0) for _ in range(3)]
    assert None not in taken
    for slot in taken[:2]:
        assert slot is not None
        FUSE_IN_HEADER.pack_into(journal.slot(slot), 0, 40, Op.GETATTR, 7 + slot, ROOT_ID, 0, 0, 0, 0, 0)
    assert taken[0] is not None
    journal.free(taken[0])
    journal.agree(44, int(Init.PASSTHROUGH))
    following = reopened(journal)
    try:
        assert following.left_over() == [taken[1]]
        assert following.left_over() == []
        assert (following.minor, following.flags) == (44, Init.PASSTHROUGH)
        free = [following.take(0) for _ in range(SLOTS)]
        assert free.count(None) == 1
        assert taken[1] not in free
    finally:
        following.close()


def test_handles_are_counted_by_kind(journal: Journal) -> None:
    journal.opened(1, backing_id=0)
    journal.set_backing(1, 9)
    journal.opened(1, backing_id=9)
    assert journal.handles(1) == (1, 1, 9)
    assert journal.handles(0) == (0, 0, 0)
    journal.closed(1, is_passthrough=False)
    journal.closed(1, is_passthrough=False)
    following = reopened(journal)
    assert following.handles(1) == (0, 1, 9)
    following.close()


def test_the_journal_of_another_tree_is_refused(journal: Journal) -> None:
    fd = create_journal(3)
    try:
        with pytest.raises(ProtocolError):
            Journal(fd, 2)
        os.pwrite(fd, b"X", 0)
        with pytest.raises(ProtocolError):
            Journal(fd, 3)
    finally:
        os.close(fd)


def test_mounts_of_others_may_have_any_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "1 2 0:5 / /a\x0cb\u2028c rw - tmpfs x rw",
        r"3 2 0:6 / /x\040y ro shared:1 - fuse.snowdrop snowdrop ro",
        "4 2 0:7 / /z rw - tmpfs  rw",
    ]
    (tmp_path / "mountinfo").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    monkeypatch.setattr(mount, "MOUNTINFO", tmp_path / "mountinfo")
    assert mount.mounted_trees(Path("/")) == [mount.MountedTree(Path("/x y"), "0:6")]


def test_a_mount_is_found_by_a_path_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    line = f"3 2 0:6 / {tmp_path}/real/mounts/m ro - fuse.snowdrop snowdrop ro\n"
    (tmp_path / "mountinfo").write_text(line, encoding="utf-8")
    monkeypatch.setattr(mount, "MOUNTINFO", tmp_path / "mountinfo")
    for below in ("real/mounts", "link/mounts", "link/mounts/m"):
        assert [tree.device for tree in mount.mounted_trees(tmp_path / below)] == ["0:6"]
    assert mount.mounted_trees(tmp_path / "link/other") == []

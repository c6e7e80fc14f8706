"""What a layer may say, and what is refused."""

import io
import os
import subprocess
import tarfile
from typing import Any

import pytest

from image_helpers import member, names, tar
from snowdrop.domain.errors import CorruptContentError, StorageFullError
from snowdrop.domain.image import TreeEntry
from snowdrop.image.flatten import flatten, layer_path
from snowdrop.image.unpack import read_entries


def entries(data: bytes, **options: Any) -> tuple[list[TreeEntry], bytes]:
    written = io.BytesIO()
    options.setdefault("bytes_max", 1 << 30)
    found = list(read_entries(io.BytesIO(data).read, written.write, where="layer", **options))
    return found, written.getvalue()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_three_forms_say_the_same(form: int) -> None:
    data = tar(
        member("./", tarfile.DIRTYPE),
        member("d/", tarfile.DIRTYPE, mode=0o1777, uid=1000, gid=2000, mtime=12),
        member("d/f", data=b"hello", mode=0o6755),
        member("d/h", tarfile.LNKTYPE, linkname="./d/f"),
        member("d/" + "n" * 90 + "/" + "m" * 90, data=b"x"),
        member("s", tarfile.SYMTYPE, linkname="../odd/./target"),
        member("p", tarfile.FIFOTYPE),
        form=form,
    )
    found, contents = entries(data)
    assert contents == b"hellox"
    assert found[1] == TreeEntry(b"d", "dir", 0o1777, 1000, 2000, 12_000_000_000)
    assert (found[2].path, found[2].mode, found[2].size) == (b"d/f", 0o6755, 5)
    assert found[3] == TreeEntry(b"d/h", "hardlink", target=b"d/f")
    assert found[4].path == b"d/" + b"n" * 90 + b"/" + b"m" * 90
    assert found[5].target == b"../odd/./target"
    assert found[6].kind == "fifo"


def test_long_names_times_owners_and_attributes_come_from_pax_records() -> None:
    path, target = "x/" * 500 + "f", "t/" * 700
    records = {"mtime": "-1.25", "SCHILY.xattr.user.k": "v\n=w", "comment": "no matter"}
    data = tar(
        member(path, data=b"1", uid=3_000_000_000, pax_headers=records),
        member("late", data=b"", mtime=1, pax_headers={"mtime": "1700000000.123456789999"}),
        member("s", tarfile.SYMTYPE, linkname=target),
    )
    found, _ = entries(data)
    assert (found[0].path, found[0].uid, found[0].mtime_ns) == (path.encode(), 3_000_000_000, -1_250_000_000)
    assert found[0].xattrs == ((b"user.k", b"v\n=w"),)
    assert found[1].mtime_ns == 1_700_000_000_123_456_789
    assert found[2].target == target.encode()


def test_names_are_bytes() -> None:
    found, _ = entries(tar(member(os.fsdecode(b"\xff\xfe/\n"), data=b"1")))
    assert names(found) == [b"\xff\xfe/\n"]


@pytest.mark.parametrize(
    "form", ["--format=gnu", "--sparse-version=0.0", "--sparse-version=0.1", "--sparse-version=1.0"]
)
def test_sparse_files_are_as_long_as_they_say(form: str, tmp_path: Any) -> None:
    whole = bytes(1 << 20) + b"data" * 5000 + bytes(3 << 20) + b"end"
    with (tmp_path / "holes").open("wb") as stream:
        for place in range(60):  # more pieces than one header has room for
            stream.seek(place * 65536 + (4 << 20))
            stream.write(b"%d" % place)
        stream.seek(1 << 20)
        stream.write(whole[1 << 20 : (1 << 20) + 20000])
    form_words = [form] if form == "--format=gnu" else ["--format=posix", form]
    made = subprocess.run(
        ["tar", "-C", tmp_path, "--sparse", *form_words, "-cf", "-", "holes"], capture_output=True, check=True
    ).stdout
    found, contents = entries(made)
    wanted = (tmp_path / "holes").read_bytes()
    assert (found[0].path, found[0].size) == (b"holes", len(wanted))
    assert contents == wanted
    assert len(made) < len(wanted)


def damaged(data: bytes, place: int, value: bytes) -> bytes:
    """With another byte in the first header, whose sum is right again."""
    head = bytearray(data[:512])
    head[place : place + len(value)] = value
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + data[512:]


GOOD = tar(member("f", data=b"x" * 600), form=tarfile.USTAR_FORMAT)
HOSTILE = {
    "absolute": (tar(member("/etc/passwd", data=b"x")), "absolute"),
    "up": (tar(member("a/../../x", data=b"x")), r"'\.\.'"),
    "link up": (tar(member("h", tarfile.LNKTYPE, linkname="../x")), r"'\.\.'"),
    "link away": (tar(member("h", tarfile.LNKTYPE, linkname="/etc/shadow")), "absolute"),
    "character device": (tar(member("null", tarfile.CHRTYPE)), "is a device"),
    "block device": (tar(member("sda", tarfile.BLKTYPE)), "is a device"),
    "unknown type": (damaged(GOOD, 156, b"V"), "unknown type"),
    "wrong sum": (GOOD[:10] + b"!" + GOOD[11:], "sum is wrong"),
    "no tar": (b"no tar at all" * 100, "sum is wrong|is no number"),
    "cut short": (GOOD[:700], "middle of a member"),
    "cut in a header": (GOOD[:300], "middle of a member"),
    "negative size": (damaged(GOOD, 124, b"\xff" * 12), "negative|middle"),
    "endless size": (damaged(GOOD, 124, b"\x80" + b"\0" * 3 + b"\xff" * 8), "no room"),
    "owner": (damaged(GOOD, 108, b"\x80" + b"\xff" * 7), "out of bounds"),
    "something after the end": (GOOD + b"more", "follows the end"),
    "long name of a gigabyte": (damaged(damaged(GOOD, 156, b"L"), 124, b"10000000000\0"), "extension_bytes_max"),
    "header without its member": (damaged(GOOD[:1536], 156, b"L"), "belongs to a member|middle"),
    "global header": (tar(member("g", b"g", data=b"13 path=evil\n")), "global header"),
    "pax length": (tar(member("x", b"x", data=b"99 path=evil\n")), "wrong length"),
    "pax without length": (tar(member("x", b"x", data=b"path=evil\n")), "without its length"),
    "pax size": (tar(member("f", data=b"1", pax_headers={"size": "-5"})), "no number"),
    "NUL in pax path": (tar(member("x", b"x", data=b"12 path=a\0b\n")), "NUL"),
    "sparse map": (tar(member("f", data=b"1", pax_headers={
        "GNU.sparse.map": "5,1,2,1", "GNU.sparse.size": "9"})), "overlap"),
    "sparse bomb without content": (tar(member("f", data=b"1", pax_headers={
        "GNU.sparse.map": "0,0", "GNU.sparse.size": "9"})), "does not fit"),
    "sparse, endless": (tar(member("f", data=b"", pax_headers={
        "GNU.sparse.map": "", "GNU.sparse.size": "999999999999999"})), "no room"),
    "many attributes": (tar(member("f", data=b"", pax_headers={
        f"SCHILY.xattr.user.{n}": "v" * 1000 for n in range(70)})), "xattr_bytes_max"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case.replace(" ", "-"))
def test_a_hostile_layer_is_refused_by_name(case: str) -> None:
    data, message = HOSTILE[case]
    with pytest.raises((CorruptContentError, StorageFullError), match=message) as raised:
        entries(data)
    assert raised.value.where
    assert raised.value.next_step


def test_devices_are_left_out_if_that_is_wanted() -> None:
    found, _ = entries(tar(member("dev/null", tarfile.CHRTYPE), member("f", data=b"1")), skip_devices=True)
    assert names(found) == [b"f"]


@pytest.mark.parametrize("raw", [b"..", b"a/..", b"/", b"a\0b", b"x" * 300])
def test_paths_lead_down_only(raw: bytes) -> None:
    with pytest.raises(CorruptContentError):
        layer_path(raw)


def test_paths_are_normalised() -> None:
    assert [layer_path(raw) for raw in (b"./a//b/./c/", b".", b"./")] == [b"a/b/c", b"", b""]


F = TreeEntry(b"f", "file", sha256=bytes(32))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ([F, F], "twice"),
        ([TreeEntry(b"l", "symlink", target=b"../.."), TreeEntry(b"l/f", "file", sha256=bytes(32))], "out of the"),
        ([TreeEntry(b"l", "symlink", target=b"l"), TreeEntry(b"l/f", "file", sha256=bytes(32))], "symbolic links"),
        ([F, TreeEntry(b"f/g", "file", sha256=bytes(32))], "on the way"),
        ([TreeEntry(b"h", "hardlink", target=b"none")], "hard link"),
        ([TreeEntry(b"d", "dir"), TreeEntry(b"h", "hardlink", target=b"d")], "hard link"),
        ([TreeEntry(b".wh...", "file", sha256=bytes(32))], "whiteout of nothing"),
        ([TreeEntry(b"x", "dir", xattrs=((b"odd", b""),))], "no known kind"),
        ([TreeEntry(b"", "file", sha256=bytes(32))], "no directory"),
    ],
)
def test_entries_that_no_tree_can_hold_are_refused(layer: list[TreeEntry], message: str) -> None:
    with pytest.raises(CorruptContentError, match=message):
        flatten([layer])


def test_rights_that_nobody_asked_for_are_dropped() -> None:
    xattrs = (
        (b"security.capability", b"c"),
        (b"security.selinux", b"s"),
        (b"trusted.overlay.opaque", b"y"),
        (b"user.a", b""),
    )
    layer = [TreeEntry(b"su", "file", 0o6755, sha256=bytes(32), xattrs=xattrs), TreeEntry(b"d", "dir", 0o3777)]
    _, folder, dropped = flatten([layer])
    assert (dropped.mode, dropped.xattrs, folder.mode) == (0o755, ((b"user.a", b""),), 0o3777)
    kept = flatten([layer], allow_setid=True)[-1]
    assert (kept.mode, kept.xattrs) == (0o6755, (xattrs[0], xattrs[3]))


def test_links_of_the_image_lead_inside_of_it() -> None:
    layers = [
        [TreeEntry(b"usr/bin", "dir", 0o700), TreeEntry(b"bin", "symlink", 0o777, target=b"/usr/bin")],
        [TreeEntry(b"bin", "dir", 0o711), TreeEntry(b"bin/tool", "file", sha256=bytes(32))],
    ]
    found = {entry.path: entry for entry in flatten(layers)}
    assert sorted(found) == [b"", b"bin", b"usr", b"usr/bin", b"usr/bin/tool"]
    assert (found[b"bin"].kind, found[b"usr/bin"].mode) == ("symlink", 0o711)

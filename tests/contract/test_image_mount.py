"""The contract of `ImageMount`, for each method that this machine has."""

import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn

import anyio
import anyio.to_thread
import pytest

from descriptors import open_descriptors
from fuse_helpers import needs_fuse
from image_mount_helpers import MemoryContent, built, mounted, mounting
from snowdrop.content.fuse.mount import MOUNTINFO
from snowdrop.domain.errors import InvalidInputError, StorageFullError, UnavailableError
from snowdrop.domain.image import TreeEntry
from snowdrop.image.mount.kernel import possible_methods
from snowdrop.image.mount.port import Method

pytestmark = [needs_fuse, pytest.mark.anyio]

ROOT = (TreeEntry(b"", "dir", 0o755), b"")
ENTRIES_MANY = {"erofs": 100_000, "fuse": 100_000, "unpack": 5000}
"""A mount has to list them; a copy of so many would only measure the disk."""
WAIT_S_MAX = 30.0
every_method = pytest.mark.parametrize("method", possible_methods())
served_methods = pytest.mark.parametrize("method", [name for name in possible_methods() if name != "unpack"])


def content_of(folder: Path, **files: bytes) -> MemoryContent:
    entries = [(TreeEntry(name.encode(), "file", 0o755), content) for name, content in files.items()]
    tree, data = built([ROOT, *entries])
    return MemoryContent(tree, data, folder / "local")


def mounts_below(folder: Path) -> list[str]:
    return [line for line in MOUNTINFO.read_text().splitlines() if str(folder) in line]


@contextmanager
def small_disk(at: Path, size_bytes: int) -> Iterator[Path]:
    at.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", at], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", at], check=True)


@every_method
def test_a_directory_of_very_many_names_is_listed_whole(method: Method, tmp_path: Path) -> None:
    names = [b"n%06d" % number for number in range(ENTRIES_MANY[method])]
    tree, data = built([ROOT, *((TreeEntry(name, "file", 0o644), b"") for name in names)])
    with mounting(MemoryContent(tree, data, tmp_path / "local"), method, tmp_path):
        assert sorted(os.listdir(bytes(tmp_path / "root"))) == names
        for name in names[:: len(names) // 7]:
            assert (tmp_path / "root" / name.decode()).exists()
        assert not (tmp_path / "root" / "n1").exists()


@every_method
def test_programs_run_from_it_and_map_its_files(method: Method, tmp_path: Path) -> None:
    content = content_of(tmp_path, true=Path("/bin/true").read_bytes(), big=os.urandom(3_000_001))
    expected = content.data[content.tree.entries[1].offset :][:3_000_001]
    script = "import mmap,sys;f=open(sys.argv[1],'rb');sys.stdout.buffer.write(mmap.mmap(f.fileno(),0,prot=1)[:])"
    assert mmap.PROT_READ == 1
    with mounting(content, method, tmp_path):
        subprocess.run([tmp_path / "root" / "true"], check=True, timeout=WAIT_S_MAX)
        # In another process: this one serves, and a page fault of its own would wait for itself.
        mapped = subprocess.run(
            [sys.executable, "-c", script, tmp_path / "root" / "big"],
            check=True,
            capture_output=True,
            timeout=WAIT_S_MAX,
        )
    assert mapped.stdout == expected


@served_methods
def test_nothing_is_fetched_by_mounting_and_little_by_reading_a_little(method: Method, tmp_path: Path) -> None:
    content = content_of(tmp_path, a=b"x" * 8_000_000, b=b"y" * 4096)
    with mounting(content, method, tmp_path) as (mount, _):
        assert content.brought == 0
        assert sorted(os.listdir(tmp_path / "root")) == ["a", "b"]
        assert (tmp_path / "root" / "a").stat().st_size == 8_000_000
        assert content.brought == 0
        assert (tmp_path / "root" / "b").read_bytes() == b"y" * 4096
        progress = mount.progress()
        assert 0 < progress.here_bytes < 1_000_000
        assert progress.total_bytes == content.tree.data_bytes
        assert progress.needs_daemon


@served_methods
def test_it_cannot_be_written(method: Method, tmp_path: Path) -> None:
    with mounting(content_of(tmp_path, a=b"x"), method, tmp_path):
        for attempt in (
            partial((tmp_path / "root" / "a").write_bytes, b"y"),
            partial((tmp_path / "root" / "new").mkdir),
            partial((tmp_path / "root" / "a").unlink),
            partial((tmp_path / "root" / "a").chmod, 0o600),
        ):
            with pytest.raises(OSError, match="Read-only") as caught:
                attempt()
            assert caught.value.errno == errno.EROFS


@every_method
async def test_after_unmount_nothing_is_left(method: Method, tmp_path: Path) -> None:
    content = content_of(tmp_path, a=b"x" * 100_000)
    before = len(open_descriptors())
    async with mounted(content, method, tmp_path) as mount:
        await anyio.to_thread.run_sync((tmp_path / "root" / "a").read_bytes)
        await mount.unmount()
        assert os.listdir(tmp_path / "root") == []
        await mount.unmount()
    assert mounts_below(tmp_path) == []
    assert os.listdir(tmp_path) == ["root"]
    assert len(open_descriptors()) <= before + 1  # the event loop keeps one for its threads


@every_method
async def test_a_directory_that_is_not_empty_is_refused_and_left_alone(method: Method, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "mine").write_text("kept")
    with pytest.raises(BaseExceptionGroup) as caught:
        async with mounted(content_of(tmp_path, a=b"x"), method, tmp_path):
            raise AssertionError
    assert caught.group_contains(InvalidInputError)
    assert (tmp_path / "root" / "mine").read_text() == "kept"


@every_method
async def test_a_mount_that_fails_leaves_nothing(method: Method, tmp_path: Path) -> None:
    def gone() -> NoReturn:
        raise UnavailableError("the origin is gone")

    async def refused(*_: object) -> NoReturn:
        gone()

    content = content_of(tmp_path, a=b"x" * 100_000)
    content.before, content.serve = gone, refused  # type: ignore[method-assign]
    with pytest.raises(BaseExceptionGroup) as caught:
        async with mounted(content, method, tmp_path):
            raise AssertionError
    assert caught.group_contains(UnavailableError, match="origin is gone")
    assert mounts_below(tmp_path) == []
    assert os.listdir(tmp_path / "root") == []


async def test_a_mount_made_after_completion_needs_no_daemon(tmp_path: Path) -> None:
    if "erofs" not in possible_methods():
        pytest.skip("no EROFS over files in this kernel")
    content = content_of(tmp_path, a=os.urandom(200_000))
    (tmp_path / "first").mkdir()
    async with mounted(content, "erofs", tmp_path / "first") as mount:
        assert mount.progress().needs_daemon
        await mount.complete()
    (tmp_path / "second").mkdir()
    async with mounted(content, "erofs", tmp_path / "second") as mount:
        assert not mount.progress().needs_daemon
        assert content.servers[1:] == []
        read = await anyio.to_thread.run_sync((tmp_path / "second" / "root" / "a").read_bytes)
    assert read == content.data[:200_000]


@served_methods
async def test_a_read_whose_origin_is_gone_fails_within_its_bound_and_the_next_one_tries_again(
    method: Method, tmp_path: Path
) -> None:
    content = content_of(tmp_path, a=b"x" * 5000)
    content.hold, content.read_s_max = True, 0.1
    async with mounted(content, method, tmp_path):
        file = tmp_path / "root" / "a"
        with anyio.fail_after(WAIT_S_MAX):
            with pytest.raises(OSError, match="Input/output error") as caught:
                await anyio.to_thread.run_sync(file.read_bytes, abandon_on_cancel=True)
            assert caught.value.errno == errno.EIO
            content.let_go()
            assert await anyio.to_thread.run_sync(file.read_bytes, abandon_on_cancel=True) == b"x" * 5000


@served_methods
async def test_a_reader_waits_while_nobody_serves_and_is_answered_by_the_next_server(
    method: Method, tmp_path: Path
) -> None:
    content = content_of(tmp_path, a=b"x" * 5000)
    content.hold = True
    async with mounted(content, method, tmp_path):
        found: list[bytes] = []

        async def read() -> None:
            file = tmp_path / "root" / "a"
            found.append(await anyio.to_thread.run_sync(file.read_bytes, abandon_on_cancel=True))

        with anyio.fail_after(WAIT_S_MAX):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read)
                while not content.brought:
                    await anyio.sleep(0.01)
                ended = await content.kill_servers()
                assert found == []
                content.let_go()
                for view, device_fd, journal_fd in ended:
                    await content.serve(view, device_fd, journal_fd)
    assert found == [b"x" * 5000]


async def test_a_full_disk_ends_an_unpack_cleanly(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        content = content_of(tmp_path, a=b"x" * (4 << 20))
        with pytest.raises(BaseExceptionGroup) as caught:
            async with mounted(content, "unpack", disk):
                raise AssertionError
        assert caught.group_contains(StorageFullError)
        assert os.listdir(disk / "root") == []


async def test_a_full_disk_ends_an_erofs_mount_cleanly(tmp_path: Path) -> None:
    if "erofs" not in possible_methods():
        pytest.skip("no EROFS over files in this kernel")
    names = [(TreeEntry(b"n%05d" % number, "file", 0o644), b"") for number in range(5000)]
    tree, data = built([ROOT, *names])
    with small_disk(tmp_path / "disk", 64 << 10) as disk:
        with pytest.raises(BaseExceptionGroup) as caught:
            async with mounted(MemoryContent(tree, data, tmp_path / "local"), "erofs", disk):
                raise AssertionError
        assert caught.group_contains(StorageFullError)
        assert sorted(os.listdir(disk)) == ["root"]

import hashlib
import os
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from origin_servers import BIN, free_port, serving, webdav
from snowdrop.content.origin import DirectoryOrigin, MemoryOrigin, Origin, OriginOptions, open_origin
from snowdrop.content.origin.directory import OPEN_FILES_MAX
from snowdrop.domain.errors import IntegrityError, InvalidInputError, NotFoundError


class OriginContract:
    """What every origin does. A new one adds a subclass with its `origin` fixture."""

    def test_what_was_put_is_read(self, origin: Origin) -> None:
        origin.put("a/packs/00/x", b"0123456789")
        into = bytearray(4)
        origin.read_range("a/packs/00/x", 3, memoryview(into))
        assert into == b"3456"
        assert origin.exists("a/packs/00/x")
        assert origin.size("a/packs/00/x") == 10

    def test_putting_again_replaces_the_whole(self, origin: Origin) -> None:
        origin.put("k", b"long value")
        origin.put("k", memoryview(b"short"))
        assert origin.size("k") == 5

    def test_an_empty_range_is_read_from_an_empty_object(self, origin: Origin) -> None:
        origin.put("k", b"")
        origin.read_range("k", 0, memoryview(bytearray()))
        assert origin.size("k") == 0

    @pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 5000])
    def test_the_start_of_an_object_comes_with_its_length(self, origin: Origin, size: int) -> None:
        data = bytes(index % 251 for index in range(size))
        origin.put("a/k", data)
        into = bytearray(b"\xff" * 8)
        assert origin.read_start("a/k", memoryview(into)) == size
        assert into == data[:8].ljust(8, b"\xff")
        with pytest.raises(NotFoundError):
            origin.read_start("a/missing", memoryview(into))

    def test_a_missing_object_is_not_found(self, origin: Origin) -> None:
        origin.put("a/b", b"x")
        for key in ("a", "a/b/c", "missing"):
            assert not origin.exists(key)
            with pytest.raises(NotFoundError):
                origin.size(key)
            with pytest.raises(NotFoundError):
                origin.read_range(key, 0, memoryview(bytearray(1)))

    @pytest.mark.parametrize("offset", [2, 5, 50])
    def test_a_range_beyond_the_end_is_an_integrity_error(self, origin: Origin, offset: int) -> None:
        origin.put("k", b"12345")
        with pytest.raises(IntegrityError, match="k"):
            origin.read_range("k", offset, memoryview(bytearray(4)))

    def test_list_gives_the_keys_of_a_prefix(self, origin: Origin) -> None:
        for key in ("a/1", "a/2", "b/1"):
            origin.put(key, b"x")
        assert sorted(origin.list("a/")) == ["a/1", "a/2"]
        assert sorted(origin.list("")) == ["a/1", "a/2", "b/1"]

    def test_entries_tell_sizes_and_the_time_of_the_last_put(self, origin: Origin) -> None:
        origin.put("a/1", b"x" * 10)
        origin.put("b/1", b"x")
        first = list(origin.entries("a/"))
        origin.put("a/1", b"x" * 10)
        second = list(origin.entries("a/"))
        assert [(entry.key, entry.bytes) for entry in first] == [("a/1", 10)]
        assert second[0].modified_unix_ns >= first[0].modified_unix_ns > 0

    def test_a_prefix_may_end_inside_a_name(self, origin: Origin) -> None:
        for key in ("models/abc", "models/abd", "models/b"):
            origin.put(key, b"x")
        assert sorted(origin.list("models/ab")) == ["models/abc", "models/abd"]
        assert list(origin.list("nothing/here")) == []

    def test_what_was_replaced_or_deleted_is_not_read_any_more(self, origin: Origin) -> None:
        origin.put("k", b"old")
        origin.read_range("k", 0, memoryview(bytearray(3)))
        origin.put("k", b"new")
        into = bytearray(3)
        origin.read_range("k", 0, memoryview(into))
        assert into == b"new"
        origin.delete("k")
        with pytest.raises(NotFoundError):
            origin.read_range("k", 0, memoryview(into))

    def test_it_can_be_used_after_close(self, origin: Origin) -> None:
        origin.put("k", b"x")
        origin.read_range("k", 0, memoryview(bytearray(1)))
        origin.close()
        origin.read_range("k", 0, memoryview(bytearray(1)))
        origin.close()

    def test_delete_removes_and_may_be_repeated(self, origin: Origin) -> None:
        origin.put("k", b"x")
        origin.delete("k")
        origin.delete("k")
        assert not origin.exists("k")

    @pytest.mark.parametrize("key", ["../out", "/abs", "", "a//b"])
    def test_a_key_that_leaves_the_origin_is_refused(self, origin: Origin, key: str) -> None:
        with pytest.raises(InvalidInputError):
            origin.put(key, b"x")


class TestMemoryOrigin(OriginContract):
    @pytest.fixture
    def origin(self) -> Origin:
        return MemoryOrigin()


class TestDirectoryOrigin(OriginContract):
    @pytest.fixture
    def origin(self, tmp_path: Path) -> Iterator[Origin]:
        origin = DirectoryOrigin(tmp_path / "origin")
        yield origin
        origin.close()


KEYS = {"AWS_ACCESS_KEY_ID": "access-key", "AWS_SECRET_ACCESS_KEY": "a-secret-of-some-length"}


@pytest.fixture(scope="module")
def signing_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3 that refuses what is not signed with KEYS."""
    port, root = free_port(), tmp_path_factory.mktemp("s3")
    (root / "bucket").mkdir()
    command = [BIN / "nanio", "serve", "--data-dir", root, "--host", "127.0.0.1", "--port", port]
    keys = {"NANIO_ACCESS_KEY": KEYS["AWS_ACCESS_KEY_ID"], "NANIO_SECRET_KEY": KEYS["AWS_SECRET_ACCESS_KEY"]}
    with serving([str(part) for part in command], port, os.environ | keys) as url:
        yield url


@pytest.fixture(scope="module")
def moto_s3() -> Iterator[str]:
    port = free_port()
    with serving([str(BIN / "moto_server"), "-H", "127.0.0.1", "-p", str(port)], port, dict(os.environ)) as url:
        request = urllib.request.Request(f"{url}/bucket", data=b"", method="PUT")
        urllib.request.urlopen(request).close()
        yield url


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """A place of its own for each test in a bucket that several share."""
    return hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]


class TestS3ThatChecksSignatures(OriginContract):
    @pytest.fixture
    def origin(self, signing_s3: str, keys: None, prefix: str) -> Iterator[Origin]:
        origin = open_origin(f"s3://bucket/{prefix}/deep", OriginOptions(endpoint=signing_s3, region="us-east-1"))
        yield origin
        origin.close()


class TestS3OfMoto(OriginContract):
    @pytest.fixture
    def origin(self, moto_s3: str, keys: None, prefix: str) -> Iterator[Origin]:
        origin = open_origin(f"s3://bucket/{prefix}", OriginOptions(endpoint=moto_s3))
        yield origin
        origin.close()


class TestHttp(OriginContract):
    @pytest.fixture
    def origin(self) -> Iterator[Origin]:
        with webdav() as url:
            origin = open_origin(url)
            yield origin
            origin.close()


def test_what_a_killed_put_left_is_not_listed_and_is_swept_when_old(tmp_path: Path) -> None:
    origin = DirectoryOrigin(tmp_path)
    origin.put("a/k", b"kept")
    leftover = tmp_path / "a/k.put-1.tmp"
    leftover.write_bytes(b"half")
    written_ns = leftover.stat().st_mtime_ns
    assert [entry.key for entry in origin.entries("")] == ["a/k"]
    assert origin.sweep(written_ns) == (0, 0)
    assert origin.sweep(written_ns + 1, dry_run=True) == (1, 4)
    assert origin.sweep(written_ns + 1) == (1, 4)
    assert not leftover.exists()
    assert origin.exists("a/k")


def test_open_files_of_a_directory_are_few_and_see_other_writers(tmp_path: Path) -> None:
    reader, writer = DirectoryOrigin(tmp_path), DirectoryOrigin(tmp_path)
    into = bytearray(1)
    assert _open_below(tmp_path) == 0
    for index in range(OPEN_FILES_MAX + 8):
        writer.put(f"k{index}", b"a")
        reader.read_range(f"k{index}", 0, memoryview(into))
    assert 0 < _open_below(tmp_path) <= OPEN_FILES_MAX
    writer.put("k39", b"b")
    reader.read_range("k39", 0, memoryview(into))
    assert into == b"b"
    writer.delete("k39")
    with pytest.raises(NotFoundError):
        reader.read_range("k39", 0, memoryview(into))
    reader.close()
    assert _open_below(tmp_path) == 0


def _open_below(folder: Path) -> int:
    """How many files below `folder` this process has open."""
    targets = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the listing itself
            targets.append(descriptor.readlink())
    return sum(target.is_relative_to(folder) for target in targets)


def test_a_file_url_opens_a_directory(tmp_path: Path) -> None:
    (tmp_path / "with space").mkdir()
    open_origin(f"file://{tmp_path}/with%20space").put("k", b"x")
    assert (tmp_path / "with space/k").read_bytes() == b"x"


@pytest.mark.parametrize("url", ["ftp://bucket", "/plain", "file://host/x", "file:relative", ""])
def test_another_url_is_refused_with_what_is_served(url: str) -> None:
    with pytest.raises(InvalidInputError, match="file:///"):
        open_origin(url)

"""What every source of a push does, wherever its files lie."""

from __future__ import annotations

import hashlib
import os
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from content_helpers import noise, rebuilt, safetensors_bytes
from origin_servers import BIN, free_port, serving
from remote_helpers import Hub, Pauses, WebServer
from snowdrop.content.ingest import PushOptions, Source, push_source
from snowdrop.content.ingest.directory import DirectorySource
from snowdrop.content.ingest.hub import HubSource
from snowdrop.content.ingest.prefix import PrefixSource
from snowdrop.content.origin import MemoryOrigin, open_origin
from snowdrop.domain.errors import SnowdropError
from snowdrop.domain.origin import OriginOptions

FILES = {
    "m-10.safetensors": safetensors_bytes({"a": ("U8", [200_000], noise(200_000))}),
    "m-2.safetensors": safetensors_bytes({"b": ("U8", [900], noise(900))}),
    "config.json": b'{"a": 1}',
    "sub dir/\u00fcn\u00ef+%20.txt": noise(5000, 3),
    "empty": b"",
}
IN_LOAD_ORDER = ["config.json", "empty", "sub dir/\u00fcn\u00ef+%20.txt", "m-2.safetensors", "m-10.safetensors"]
KEYS = {"AWS_ACCESS_KEY_ID": "access-key", "AWS_SECRET_ACCESS_KEY": "a-secret-of-some-length"}


class SourceContract:
    """A new source adds a subclass with its `source` fixture, which has FILES."""

    def test_files_come_in_load_order_with_their_sizes(self, source: Source) -> None:
        files = source.files()
        assert [file.path for file in files] == IN_LOAD_ORDER
        assert [file.size for file in files] == [len(FILES[path]) for path in IN_LOAD_ORDER]
        assert len({file.version for file in files}) == len(files)

    def test_what_it_says_of_its_files_is_true(self, source: Source) -> None:
        for file in source.files():
            data = FILES[file.path]
            assert file.sha256 in {"", hashlib.sha256(data).hexdigest()}
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            assert file.git_blob in {"", blob}

    def test_any_range_of_any_file_is_read_in_place_by_many_threads(self, source: Source) -> None:
        cuts = [(0, 1), (0, 8), (3, 900), (4999, 5000), (100_000, 200_000), (0, 200_064)]

        def read(path: str, begin: int, end: int) -> None:
            around = bytearray(b"#" * (end - begin + 2))
            source.read(files[path], begin, memoryview(around)[1:-1])
            assert around[1:-1] == FILES[path][begin:end]
            assert around[:1] + around[-1:] == b"##"

        files = {file.path: file for file in source.files()}
        wanted = [(path, *cut) for path, data in FILES.items() for cut in cuts if cut[1] <= len(data)] * 3
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda one: read(*one), wanted))
        for file in files.values():
            source.settle(file)

    def test_more_than_the_file_has_is_an_error(self, source: Source) -> None:
        file = next(file for file in source.files() if file.path == "config.json")
        with pytest.raises(SnowdropError):
            source.read(file, 4, memoryview(bytearray(100)))

    def test_it_is_the_same_place_and_version_when_it_is_asked_again(self, source: Source) -> None:
        identity = source.identity
        assert source.files() == source.files()
        assert source.identity == identity

    def test_it_becomes_a_tree(self, source: Source) -> None:
        origin = MemoryOrigin()
        assert rebuilt(origin, push_source(source, origin, PushOptions()).artefact) == FILES


class TestDirectory(SourceContract):
    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        for path, data in FILES.items():
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_bytes(data)
        return DirectorySource(tmp_path, ignored=())


class TestHub(SourceContract):
    @pytest.fixture
    def source(self) -> Iterator[Source]:
        hub = Hub(dict(FILES))
        yield HubSource("hf://org/model", endpoint=hub.url, token="hf_x", attempts=Pauses().attempts)
        hub.close()


class TestWebServer(SourceContract):
    @pytest.fixture
    def source(self) -> Iterator[Source]:
        lines = [f"{hashlib.sha256(data).hexdigest()}  {path}\n" for path, data in FILES.items()]
        server = WebServer(FILES | {"SHA256SUMS": "".join(lines).encode()})
        yield PrefixSource(f"{server.url}/models/", OriginOptions(), attempts=Pauses().attempts)
        server.close()


@pytest.fixture(scope="module")
def moto_s3() -> Iterator[str]:
    port = free_port()
    with serving([str(BIN / "moto_server"), "-H", "127.0.0.1", "-p", str(port)], port, dict(os.environ)) as url:
        urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", data=b"", method="PUT")).close()
        yield url


class TestS3(SourceContract):
    @pytest.fixture
    def source(self, moto_s3: str, monkeypatch: pytest.MonkeyPatch) -> Source:
        for name, value in KEYS.items():
            monkeypatch.setenv(name, value)
        options = OriginOptions(endpoint=moto_s3, region="us-east-1")
        origin = open_origin("s3://bucket/models/m", options)
        for path, data in FILES.items():
            origin.put(path, data)
        origin.close()
        return PrefixSource("s3://bucket/models/m", options, attempts=Pauses().attempts)

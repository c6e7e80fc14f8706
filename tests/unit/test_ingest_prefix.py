import hashlib
from collections.abc import Iterator

import pytest

from content_helpers import noise, rebuilt, safetensors_bytes
from remote_helpers import S3, Answer, Pauses, Request, WebServer, cut_after, etag, instead
from snowdrop.content.ingest import IngestIndex, PushOptions, push_source
from snowdrop.content.ingest.directory import DirectorySource
from snowdrop.content.ingest.prefix import PrefixSource
from snowdrop.content.ingest.source import EVERYTHING, Filter
from snowdrop.content.ingest.sources import SourceOptions, open_source
from snowdrop.content.origin import MemoryOrigin
from snowdrop.domain.errors import (
    IntegrityError,
    InvalidInputError,
    NotFoundError,
    SnowdropError,
    UnauthorisedError,
    UnavailableError,
)
from snowdrop.domain.origin import OriginOptions

BIG = safetensors_bytes({f"t{i}": ("U8", [1 << 20], noise(1 << 20, i)) for i in range(8)})
FILES = {"config.json": b'{"a": 1}', "model.safetensors": BIG, "sub dir/ünï.txt": b"names", "empty": b""}


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snowdrop.content.ingest.read.SPAN_BYTES", 1 << 20)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")


@pytest.fixture
def s3() -> Iterator[S3]:
    server = S3({f"models/m/{path}": data for path, data in FILES.items()} | {"models/other": b"no"})
    yield server
    server.close()


@pytest.fixture
def web() -> Iterator[WebServer]:
    server = WebServer(dict(FILES))
    yield server
    server.close()


def sums(files: dict[str, bytes]) -> bytes:
    return "".join(f"{hashlib.sha256(data).hexdigest()}  {path}\n" for path, data in files.items()).encode()


def bucket(s3: S3, chosen: Filter = EVERYTHING) -> PrefixSource:
    options = OriginOptions(endpoint=s3.url)
    return PrefixSource("s3://bucket/models/m", options, chosen=chosen, attempts=Pauses().attempts)


def site(web: WebServer, path: str = "/models/") -> PrefixSource:
    return PrefixSource(f"{web.url}{path}", OriginOptions(), attempts=Pauses().attempts)


def pushed(source: PrefixSource, index: IngestIndex | None = None) -> dict[str, bytes]:
    origin = MemoryOrigin()
    return rebuilt(origin, push_source(source, origin, PushOptions(), index=index).artefact)


def test_a_prefix_becomes_the_same_tree(s3: S3) -> None:
    assert pushed(bucket(s3)) == FILES
    assert pushed(bucket(s3, Filter(("*.json",)))) == {"config.json": FILES["config.json"]}


def test_objects_that_stand_for_folders_are_left_out(s3: S3) -> None:
    s3.objects["models/m/sub dir/"] = b""
    s3.objects["models/m/"] = b""
    assert pushed(bucket(s3)) == FILES


def test_the_files_that_sha256sums_names_become_a_tree(web: WebServer) -> None:
    web.files["SHA256SUMS"] = b"# made by hand\n" + sums(FILES).replace(b"  model", b" *./model")
    assert pushed(site(web)) == FILES


def test_one_file_of_a_web_server_is_a_tree(web: WebServer) -> None:
    assert pushed(site(web, "/models/model.safetensors")) == {"model.safetensors": BIG}


def test_a_web_server_without_a_list_says_what_to_make(web: WebServer) -> None:
    with pytest.raises(NotFoundError, match="SHA256SUMS") as caught:
        pushed(site(web))
    assert "sha256sum" in caught.value.next_step


def test_what_differs_from_its_sum_is_refused(web: WebServer) -> None:
    web.files["SHA256SUMS"] = sums(FILES | {"config.json": b"other"})
    with pytest.raises(IntegrityError) as caught:
        pushed(site(web))
    assert caught.value.where.endswith("config.json")


@pytest.mark.parametrize(
    "text",
    [
        b"x",
        b"\xff\xfe",
        sums({"a": b""}) * 2,
        sums({"../up": b""}),
        sums({"/etc/passwd": b""}),
        sums({"a//b": b""}),
        sums({"missing": b""}),
        b"0" * 63 + b"  a\n",
    ],
)
def test_a_hostile_list_is_refused(web: WebServer, text: bytes) -> None:
    web.files |= {"SHA256SUMS": text, "a": b""}
    with pytest.raises((InvalidInputError, NotFoundError)):
        pushed(site(web))
    assert not web.counted("etc|up")


@pytest.mark.parametrize("key", ["../climbs", "a/../../b", "a//b", "./a", "a\0b", "x" * 300, "config.json/below"])
def test_a_hostile_key_is_refused_or_cannot_be_listed(s3: S3, key: str) -> None:
    s3.objects[f"models/m/{key}"] = b"x"
    origin = MemoryOrigin()
    with pytest.raises(SnowdropError):
        push_source(bucket(s3), origin, PushOptions())
    assert origin.objects == {}


def test_an_object_that_changes_while_it_is_read_is_refused(s3: S3) -> None:
    def change(_: Request, right: Answer) -> Answer:
        s3.objects["models/m/model.safetensors"] = BIG[:-1] + b"y"
        return right

    s3.faults.append(("safetensors", change))
    with pytest.raises(InvalidInputError, match="changed while"):
        pushed(bucket(s3))


def test_an_object_without_etag_that_changes_its_size_is_refused(web: WebServer) -> None:
    def shorten(_: Request, right: Answer) -> Answer:
        web.files["model.safetensors"] = BIG + b"more"
        return right

    web.files["SHA256SUMS"] = sums(FILES)
    web.faults.append(("safetensors", shorten))
    with pytest.raises(InvalidInputError, match="changed while"):
        pushed(site(web))


FAULTS = {
    "503": instead(503),
    "429": instead(429, retry_after="0"),
    "cut": cut_after(1000),
    "cut at once": cut_after(0),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_passes_is_tried_again(s3: S3, name: str) -> None:
    s3.faults.extend([("safetensors", FAULTS[name])] * 2)
    assert pushed(bucket(s3)) == FILES
    assert s3.faults == []


def test_what_stays_broken_is_given_up(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snowdrop.content.origin.stores.RETRIES_MAX", 0)
    web.files["SHA256SUMS"] = sums(FILES)
    web.faults.extend([("safetensors", cut_after(0))] * 2000)
    with pytest.raises(UnavailableError) as caught:
        pushed(site(web))
    assert "again" in caught.value.next_step


def test_a_refusal_is_said_as_one(s3: S3) -> None:
    s3.faults.extend([("safetensors", instead(403))] * 50)
    with pytest.raises(UnauthorisedError, match="refuses") as caught:
        pushed(bucket(s3))
    assert "credentials" in caught.value.next_step


def test_a_server_that_ignores_ranges_is_told_apart(web: WebServer) -> None:
    web.faults.extend([("safetensors", lambda _, __: Answer(200, {"etag": etag(BIG)}, BIG))] * 50)
    source = site(web, "/models/model.safetensors")
    with pytest.raises(InvalidInputError, match="ranges"):
        pushed(source)


def test_a_second_push_of_a_prefix_reads_only_what_changed(s3: S3, tmp_path: object) -> None:
    index = IngestIndex(tmp_path / "ingest.db", "memory:", "public")  # type: ignore[operator]
    origin = MemoryOrigin()
    push_source(bucket(s3), origin, PushOptions(), index=index)
    s3.objects["models/m/config.json"] = b'{"a": 2}'
    result = push_source(bucket(s3), origin, PushOptions(), index=index)
    index.close()
    assert result.read_bytes == result.new_bytes == 8
    assert rebuilt(origin, result.artefact) == FILES | {"config.json": b'{"a": 2}'}


def test_an_empty_prefix_is_refused(s3: S3) -> None:
    s3.objects.clear()
    with pytest.raises(InvalidInputError, match="nothing to push"):
        pushed(bucket(s3))


@pytest.mark.parametrize("text", ["ftp://host/x", "git+ssh://x", "://", "https://host/x?signature=1", "s3://"])
def test_what_is_no_source_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        open_source(text, SourceOptions())
    assert caught.value.next_step


def test_a_path_is_a_directory() -> None:
    assert isinstance(open_source("models/x", SourceOptions()), DirectorySource)

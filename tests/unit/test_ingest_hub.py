import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from content_helpers import noise, rebuilt, safetensors_bytes
from remote_helpers import COMMIT, Answer, Hub, Pauses, Request, cut_after, instead, ranged
from snowdrop.content.ingest import IngestIndex, PushOptions, PushResult, push_source
from snowdrop.content.ingest.hub import HubSource, parse_hub_url
from snowdrop.content.ingest.source import EVERYTHING, Filter
from snowdrop.content.origin import MemoryOrigin
from snowdrop.domain.errors import (
    CorruptContentError,
    IntegrityError,
    InvalidInputError,
    NotFoundError,
    SnowdropError,
    UnauthorisedError,
    UnavailableError,
)

BIG = safetensors_bytes({f"t{i}": ("U8", [1 << 20], noise(1 << 20, i)) for i in range(8)})
FILES = {
    "config.json": b'{"a": 1}',
    "model.safetensors": BIG,
    "sub dir/ünï code.txt": b"names",
    "empty": b"",
    ".gitattributes": b"*.safetensors filter=lfs",
}
PUSHED = {path: data for path, data in FILES.items() if path != ".gitattributes"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub(dict(FILES))
    yield hub
    hub.close()


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snowdrop.content.ingest.read.SPAN_BYTES", 1 << 20)


@pytest.fixture(autouse=True)
def no_token_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)


def source_of(
    hub: Hub, url: str = "hf://org/model", *, token: str | None = None, chosen: Filter = EVERYTHING
) -> HubSource:
    return HubSource(url, endpoint=hub.url, token=token, chosen=chosen, attempts=Pauses().attempts)


def push(
    hub: Hub, origin: MemoryOrigin, url: str = "hf://org/model", index: IngestIndex | None = None
) -> PushResult:
    return push_source(source_of(hub, url), origin, PushOptions(), index=index)


def test_a_repository_becomes_the_same_tree(hub: Hub) -> None:
    origin = MemoryOrigin()
    result = push(hub, origin)
    assert rebuilt(origin, result.artefact) == PUSHED
    assert result.read_bytes == result.artefact.total_bytes == sum(map(len, PUSHED.values()))


def test_nothing_is_written_to_this_machine_and_nothing_is_read_twice(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    push(hub, MemoryOrigin())
    assert not (tmp_path / "cache").exists()
    sent = [request.headers["range"] for request in hub.storage.requests]
    begun = [int(text.removeprefix("bytes=").partition("-")[0]) for text in sent]
    # The header is read before anything is written, and again as the file's first chunk.
    assert len(begun) == len(set(begun)) + 1


def test_the_revision_is_pinned_to_its_commit(hub: Hub) -> None:
    source = source_of(hub, "hf://org/model@v1.0")
    source.files()
    assert source.name == f"hf://org/model@{COMMIT}"
    assert hub.counted("tree") == {f"/api/models/org/model/tree/{COMMIT}": 3}


def test_a_file_is_looked_up_at_the_hub_once(hub: Hub) -> None:
    hub.files["model.safetensors"] = safetensors_bytes({"t": ("U8", [30 << 20], bytes(30 << 20))})
    push(hub, MemoryOrigin())
    asked = hub.counted("resolve.*safetensors").total()
    # Threads that begin at once may each ask before the first answer is there.
    assert asked < hub.storage.counted("blob").total()
    assert asked <= 9


def test_a_second_push_reads_nothing_from_the_hub_but_headers(hub: Hub, tmp_path: Path) -> None:
    origin, index = MemoryOrigin(), IngestIndex(tmp_path / "ingest.db", "memory:", "public")
    first = push(hub, origin, index=index)
    second = push(hub, origin, index=index)
    index.close()
    assert (second.artefact, second.read_bytes) == (first.artefact, 0)


def test_an_interrupted_push_goes_on_inside_a_file(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snowdrop.content.ingest.packs.PACK_BYTES_MAX", 2 << 20)
    origin, index = MemoryOrigin(), IngestIndex(tmp_path / "ingest.db", "memory:", "public")
    puts = origin.put

    def failing(key: str, data: bytes | memoryview) -> None:
        if len(origin.objects) == 3:
            raise UnavailableError("origin: gone")
        puts(key, data)

    monkeypatch.setattr(origin, "put", failing)
    with pytest.raises(UnavailableError):
        push(hub, origin, index=index)
    monkeypatch.setattr(origin, "put", puts)
    result = push(hub, origin, index=index)
    index.close()
    assert 0 < result.read_bytes < len(BIG)
    assert rebuilt(origin, result.artefact) == PUSHED


def test_the_token_goes_to_the_hub_and_nowhere_else(hub: Hub) -> None:
    hub.token = "hf_secret"
    origin = MemoryOrigin()
    with pytest.raises(UnauthorisedError, match="token") as caught:
        push_source(source_of(hub), origin, PushOptions())
    assert "--token" in caught.value.next_step
    with pytest.raises(UnauthorisedError) as caught:
        push_source(source_of(hub, token="hf_wrong"), origin, PushOptions())
    assert "hf_wrong" not in str(caught.value)
    artefact = push_source(source_of(hub, token="hf_secret"), origin, PushOptions()).artefact
    assert rebuilt(origin, artefact) == PUSHED
    assert not any("authorization" in request.headers for request in hub.storage.requests)


def test_the_token_of_the_environment_is_used(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_env"
    monkeypatch.setenv("HF_TOKEN", "hf_env")
    assert source_of(hub).files()


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("hf://org/other", NotFoundError),
        ("hf://org/model@nope", NotFoundError),
        ("hf://../x", InvalidInputError),
        ("hf://", InvalidInputError),
        ("hf://a/b/c", InvalidInputError),
    ],
)
def test_what_is_not_there_is_said(hub: Hub, url: str, error: type[SnowdropError]) -> None:
    with pytest.raises(error) as caught:
        push(hub, MemoryOrigin(), url)
    assert caught.value.next_step


def test_revisions_are_read_from_the_url() -> None:
    assert parse_hub_url("hf://gpt2") == ("gpt2", "main")
    assert parse_hub_url("hf://org/name@refs/pr/3") == ("org/name", "refs/pr/3")


def test_a_gated_repository_names_its_page(hub: Hub) -> None:
    hub.faults.append(("tree", instead(403, x_error_code="GatedRepo")))
    with pytest.raises(UnauthorisedError, match="gated") as caught:
        push(hub, MemoryOrigin())
    assert f"{hub.url}/org/model" in caught.value.next_step


FAULTS = {
    "429 with Retry-After": ("resolve.*safetensors", instead(429, retry_after="7")),
    "429 with a rate limit": ("resolve.*safetensors", instead(429, ratelimit='"resolvers";r=0;t=7')),
    "500": ("config", instead(500)),
    "503 at the API": ("revision", instead(503)),
    "502 of the listing": ("tree", instead(502)),
    "429 of the listing": ("tree", instead(429, retry_after="1")),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_passes_is_tried_again(hub: Hub, name: str) -> None:
    pauses, origin = Pauses(), MemoryOrigin()
    hub.faults.extend([FAULTS[name]] * 2)
    source = HubSource("hf://org/model", endpoint=hub.url, attempts=pauses.attempts)
    assert rebuilt(origin, push_source(source, origin, PushOptions()).artefact) == PUSHED
    assert hub.faults == []
    if "safetensors" in FAULTS[name][0]:
        assert min(pauses.taken_s) >= 7


def shortened(request: Request) -> str:
    """The last byte of half of the range that was asked for."""
    begin, _, end = request.headers["range"].removeprefix("bytes=").partition("-")
    return str((int(begin) + int(end)) // 2)


STORAGE_FAULTS = {
    "cut short": cut_after(500_000),
    "cut at once": cut_after(0),
    "503": instead(503),
    "another range": lambda request, right: ranged(
        request._replace(headers={"range": "bytes=7-1000006"}), BIG, dict(right.headers)
    ),
    "less than was asked for": lambda request, right: ranged(
        request._replace(headers={"range": request.headers["range"].partition("-")[0] + "-" + shortened(request)}),
        BIG,
        dict(right.headers),
    ),
    "too much": lambda _, right: right._replace(
        body=right.body + b"x", headers={**right.headers, "content-length": str(len(right.body) + 1)}
    ),
}


@pytest.mark.parametrize("name", STORAGE_FAULTS)
def test_a_broken_answer_is_not_believed_and_asked_again(hub: Hub, name: str) -> None:
    origin = MemoryOrigin()
    hub.storage.faults.extend([("blob", STORAGE_FAULTS[name])] * 3)
    assert rebuilt(origin, push(hub, origin).artefact) == PUSHED
    assert hub.storage.faults == []


def test_a_signature_that_has_expired_is_renewed(hub: Hub) -> None:
    origin = MemoryOrigin()

    def expire(_: Request, right: Answer) -> Answer:
        hub.signature += 1
        return right

    hub.storage.faults.extend([("blob", expire)] * 2)
    assert rebuilt(origin, push(hub, origin).artefact) == PUSHED


def test_a_hub_that_stays_broken_is_given_up_with_what_to_do(hub: Hub) -> None:
    hub.storage.faults.extend([("blob", instead(503))] * 1000)
    with pytest.raises(UnavailableError, match="503") as caught:
        push(hub, MemoryOrigin())
    assert "again" in caught.value.next_step
    assert "attempts_max" in caught.value.where


def test_a_rate_limit_of_an_hour_is_not_waited_for(hub: Hub) -> None:
    hub.faults.append(("resolve", instead(429, retry_after="3600")))
    with pytest.raises(UnavailableError, match="429") as caught:
        push(hub, MemoryOrigin())
    assert caught.value.retry_after_s == 3600


def test_a_file_that_vanished_is_named(hub: Hub) -> None:
    hub.faults.extend([("config.json", instead(404, x_error_code="EntryNotFound"))])
    with pytest.raises(NotFoundError) as caught:
        push(hub, MemoryOrigin())
    assert "config.json" in caught.value.where


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_wrong_bytes_are_refused_and_no_manifest_is_left(hub: Hub, path: str) -> None:
    hub.listed = hub.entries()
    data = bytearray(hub.files[path])
    data[-1] ^= 1
    hub.files[path] = bytes(data)
    origin = MemoryOrigin()
    with pytest.raises(IntegrityError) as caught:
        push(hub, origin)
    assert caught.value.where.endswith(path)
    assert not [key for key in origin.objects if "manifests" in key]


def test_truncated_weights_are_refused_before_anything_is_sent(hub: Hub) -> None:
    hub.files["model.safetensors"] = BIG[:-1000]
    origin = MemoryOrigin()
    with pytest.raises(CorruptContentError) as caught:
        push(hub, origin)
    assert caught.value.where.startswith("model.safetensors")
    assert origin.objects == {}


def test_a_file_that_is_longer_than_listed_is_refused(hub: Hub) -> None:
    hub.listed = hub.entries()
    hub.files["model.safetensors"] = BIG + b"more"
    with pytest.raises(InvalidInputError, match="the listing said"):
        push(hub, MemoryOrigin())


def test_a_server_without_ranges_is_told_apart(hub: Hub) -> None:
    hub.storage.faults.extend([("blob", lambda _, __: Answer(200, {}, BIG))] * 100)
    with pytest.raises(InvalidInputError, match="ranges"):
        push(hub, MemoryOrigin())


def entry(path: object, **changes: object) -> dict[str, object]:
    return {"type": "file", "path": path, "size": 1, "oid": hashlib.sha1(b"blob 1\0x").hexdigest()} | changes


HOSTILE: dict[str, list[dict[str, object]]] = {
    "climbs": [entry("../../etc/passwd")],
    "absolute": [entry("/etc/passwd")],
    "dot": [entry("a/./b")],
    "empty": [entry("")],
    "NUL": [entry("a\0b")],
    "twice": [entry("a"), entry("a")],
    "file and directory": [entry("a"), entry("a/b")],
    "long": [entry("a" * 300)],
    "surrogate": [entry("\ud800")],
    "negative size": [entry("a", size=-1)],
    "no hash": [entry("a", oid="x")],
    "lfs without hash": [entry("a", lfs={"oid": "x", "size": 1, "pointerSize": 1})],
    "no path": [{"type": "file", "size": 1, "oid": "x"}],
    "path is a number": [entry(5)],
    "no list": [{"error": "x"}],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_listing_is_refused_before_anything_is_read(hub: Hub, name: str) -> None:
    hub.listed = HOSTILE[name]
    origin = MemoryOrigin()
    with pytest.raises(SnowdropError) as caught:
        push(hub, origin)
    assert isinstance(caught.value, InvalidInputError | UnavailableError)
    assert origin.objects == {}
    assert not hub.counted("resolve")


def test_patterns_choose_files(hub: Hub) -> None:
    def paths(include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> set[str]:
        return {file.path for file in source_of(hub, chosen=Filter(include, exclude)).files()}

    assert paths() == set(PUSHED)
    assert paths(include=("*.json", "sub dir/*")) == {"config.json", "sub dir/ünï code.txt"}
    assert paths(exclude=("*.safetensors", "sub dir/")) == {"config.json", "empty"}


def test_a_repository_without_files_is_refused(hub: Hub) -> None:
    hub.listed = []
    with pytest.raises(InvalidInputError, match="nothing to push"):
        push(hub, MemoryOrigin())


def test_an_endpoint_that_nobody_serves_is_said() -> None:
    pauses = Pauses()
    source = HubSource("hf://org/model", endpoint="http://127.0.0.1:9", attempts=pauses.attempts)
    with pytest.raises(UnavailableError, match="cannot reach"):
        source.files()
    assert pauses.taken_s


def test_ranged_answers_of_the_stand_in_are_right() -> None:
    answer = ranged(Request("GET", "/", {}, {"range": "bytes=2-4"}), b"0123456789", {})
    assert (answer.status, answer.body, answer.headers["content-range"]) == (206, b"234", "bytes 2-4/10")


def test_a_push_that_fails_does_not_wait_for_those_who_wait(hub: Hub) -> None:
    """One file is refused while another one's reader was told to come back after minutes."""
    origin, waits = MemoryOrigin(), threading.Event()

    def busy(_request: Request, _right: Answer) -> Answer:
        waits.set()
        return Answer(429, {"retry-after": "250"})

    def gone(_request: Request, _right: Answer) -> Answer:
        assert waits.wait(30)
        return Answer(404, {"x-error-code": "EntryNotFound"})

    hub.faults.extend([("resolve.*config", gone), ("resolve.*n\u00ef code", busy)])
    source = HubSource("hf://org/model", endpoint=hub.url)
    with pytest.raises(NotFoundError):
        push_source(source, origin, PushOptions())
    assert waits.is_set()

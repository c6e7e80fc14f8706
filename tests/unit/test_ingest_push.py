"""Pushes that remember: resumed, repeated, deduplicated, private, compressed."""

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from content_helpers import CountingOrigin, files_of, noise, rebuilt, safetensors_bytes, write_model
from snowdrop.content.ingest import IngestIndex, PushOptions, PushProgress, PushResult, push_code, push_source
from snowdrop.content.ingest.directory import DirectorySource
from snowdrop.content.ingest.index import Progress
from snowdrop.content.ingest.packs import Packer
from snowdrop.content.keys import PUBLIC_KEYRING, Keyring, key_domain
from snowdrop.content.layout import manifest_key
from snowdrop.content.manifest import decode_manifest
from snowdrop.content.origin import DirectoryOrigin, MemoryOrigin, Origin
from snowdrop.domain.errors import IntegrityError, InvalidInputError, NotFoundError, UnavailableError
from snowdrop.domain.ids import DEFAULT_TENANT

PLAIN = PushOptions()
KEY, OTHER_KEY = b"k" * 32, b"o" * 32
RING = Keyring({key_domain(key): key for key in (KEY, OTHER_KEY)})


@pytest.fixture
def index(tmp_path: Path) -> Iterator[IngestIndex]:
    index = IngestIndex(tmp_path / "state" / "ingest.db", "memory:", "public")
    yield index
    index.close()


def push(
    source: Path, origin: Origin, index: IngestIndex | None = None, options: PushOptions = PLAIN
) -> PushResult:
    return push_source(DirectorySource(source, ignored=()), origin, options, index=index)


def shards(root: Path, count: int, *, size: int = 9 << 20) -> Path:
    root.mkdir(parents=True)
    for shard in range(count):
        tensors = {f"t{shard}": ("U8", [size], noise(size, shard)), "small": ("U8", [100], noise(100, 99))}
        (root / f"m-{shard}.safetensors").write_bytes(safetensors_bytes(tensors))
    (root / "config.json").write_text("{}")
    return root


def test_a_second_push_reads_nothing_and_changes_nothing(tmp_path: Path, index: IngestIndex) -> None:
    source, origin = write_model(tmp_path / "m"), MemoryOrigin()
    first = push(source, origin, index)
    assert first.read_bytes == first.artefact.total_bytes
    before = dict(origin.objects)
    second = push(source, origin, index)
    assert (second.artefact, second.read_bytes, second.new_bytes) == (first.artefact, 0, 0)
    assert origin.objects == before


def test_a_touched_file_is_read_again_and_found_the_same(tmp_path: Path, index: IngestIndex) -> None:
    source, origin = write_model(tmp_path / "m"), MemoryOrigin()
    first = push(source, origin, index)
    os.utime(source / "config.json", (1, 1))
    second = push(source, origin, index)
    assert second.read_bytes == (source / "config.json").stat().st_size
    assert (second.artefact, second.new_bytes) == (first.artefact, 0)


def test_the_same_size_and_time_under_another_inode_is_read(tmp_path: Path, index: IngestIndex) -> None:
    source, origin = write_model(tmp_path / "m"), MemoryOrigin()
    push(source, origin, index)
    status = (source / "config.json").stat()
    (source / "new").write_text('{"a": 2}')
    os.utime(source / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
    (source / "new").rename(source / "config.json")
    second = push(source, origin, index)
    assert rebuilt(origin, second.artefact)["config.json"] == b'{"a": 2}'


def test_a_fine_tune_sends_only_what_it_changed(tmp_path: Path, index: IngestIndex) -> None:
    base, tuned, origin = tmp_path / "base", tmp_path / "tuned", MemoryOrigin()
    for root, seed in ((base, 0), (tuned, 5)):
        root.mkdir()
        tensors = {f"t{i}": ("U8", [3 << 20], noise(3 << 20, i)) for i in range(6)}
        tensors["head"] = ("U8", [1 << 20], noise(1 << 20, seed))
        (root / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    push(base, origin, index)
    result = push(tuned, origin, index)
    assert result.new_bytes == 1 << 20
    assert rebuilt(origin, result.artefact) == files_of(tuned)


def test_another_machine_learns_from_the_manifests_at_the_origin(tmp_path: Path) -> None:
    base, origin = shards(tmp_path / "base", 2), MemoryOrigin()
    push(base, origin)
    (base / "m-1.safetensors").unlink()
    (base / "renamed.safetensors").write_bytes((base / "m-0.safetensors").read_bytes())
    fresh = IngestIndex(tmp_path / "ingest.db", "memory:", "public")
    result = push(base, origin, fresh)
    fresh.close()
    assert result.new_bytes == 0
    assert rebuilt(origin, result.artefact) == files_of(base)


def test_a_tree_that_is_there_keeps_its_name_whatever_its_packs(tmp_path: Path, index: IngestIndex) -> None:
    """Pushed alone, and pushed after a tree that holds half of it, a tree would be cut into other packs."""
    whole, half, origin = shards(tmp_path / "whole", 2), shards(tmp_path / "half", 1), MemoryOrigin()
    alone = push(whole, origin)
    push(half, origin, index)
    assert push(whole, origin, index).artefact == alone.artefact
    other = MemoryOrigin()
    fresh = IngestIndex(tmp_path / "fresh.db", "memory:other", "public")
    push(half, other, fresh)
    after_half = push(whole, other, fresh)
    assert push(whole, other, fresh).artefact == after_half.artefact
    fresh.close()
    assert rebuilt(other, after_half.artefact) == files_of(whole)


def test_chunks_of_a_pack_that_was_collected_are_sent_again(tmp_path: Path, index: IngestIndex) -> None:
    source, origin = shards(tmp_path / "m", 2), CountingOrigin()
    first = push(source, origin, index)
    lost = max(origin.packs(), key=lambda key: len(origin.objects[key]))
    del origin.objects[lost]
    second = push(source, origin, index)
    assert second.artefact == first.artefact
    assert 9 << 20 <= second.new_bytes < 10 << 20
    assert rebuilt(origin, second.artefact) == files_of(source)


def test_a_manifest_that_was_collected_is_put_again(tmp_path: Path, index: IngestIndex) -> None:
    source, origin = write_model(tmp_path / "m"), MemoryOrigin()
    first = push(source, origin, index)
    del origin.objects[manifest_key("public", first.artefact.manifest)]
    assert push(source, origin, index).artefact == first.artefact
    assert rebuilt(origin, first.artefact) == files_of(source)


@pytest.mark.parametrize("damage", [b"no database at all", b""])
def test_a_damaged_index_is_begun_anew(tmp_path: Path, damage: bytes) -> None:
    source, origin, path = write_model(tmp_path / "m"), MemoryOrigin(), tmp_path / "ingest.db"
    path.write_bytes(damage * 500)
    index = IngestIndex(path, "memory:", "public")
    push(source, origin, index)
    assert push(source, origin, index).read_bytes == 0
    index.close()


def test_an_index_of_another_schema_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "ingest.db"
    IngestIndex(path, "memory:", "public").close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    index = IngestIndex(path, "memory:", "public")
    assert index.manifests() == set()
    index.close()


def test_origins_and_domains_share_nothing_in_the_index(tmp_path: Path, index: IngestIndex) -> None:
    source = write_model(tmp_path / "m")
    push(source, MemoryOrigin(), index)
    for url, domain in (("memory:other", "public"), ("memory:", key_domain(KEY))):
        other = IngestIndex(tmp_path / "state" / "ingest.db", url, domain)
        result = push(source, MemoryOrigin(), other, PushOptions(hasher=RING.hasher(domain)))
        assert result.new_bytes == result.read_bytes == result.artefact.total_bytes
        other.close()


CHILD = """
import os, signal, sys
from pathlib import Path
from snowdrop.content.ingest import IngestIndex, PushOptions, push_source
from snowdrop.content.ingest.directory import DirectorySource
from snowdrop.content.origin import DirectoryOrigin

source, root, db, puts = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])

class Dying(DirectoryOrigin):
    left = puts
    def put(self, key, data):
        if Dying.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        Dying.left -= 1
        super().put(key, data)

push_source(DirectorySource(source, ignored=()), Dying(root), PushOptions(), index=IngestIndex(db, "x", "public"))
"""


@pytest.mark.parametrize("puts", [0, 1, 3])
def test_a_killed_push_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, puts: int) -> None:
    source, root, db = shards(tmp_path / "m", 5), tmp_path / "origin", tmp_path / "ingest.db"
    child = [sys.executable, "-c", CHILD, str(source), str(root), str(db), str(puts)]
    assert subprocess.run(child, timeout=60, check=False).returncode == -signal.SIGKILL
    survived = sum(path.stat().st_size for path in root.rglob("*") if path.is_file() and path.suffix != ".tmp")
    index = IngestIndex(db, "x", "public")
    result = push(source, DirectoryOrigin(root), index)
    index.close()
    clean = MemoryOrigin()
    assert result.artefact == push(source, clean).artefact
    assert result.new_bytes == sum(len(clean.objects[key]) for key in clean.objects if "/packs/" in key) - survived
    read = {path: (root / path).read_bytes() for path in clean.objects}
    assert read == clean.objects


class Failing(MemoryOrigin):
    """Goes away at the n-th put."""

    def __init__(self, puts: int) -> None:
        super().__init__()
        self.left = puts

    def put(self, key: str, data: bytes | memoryview) -> None:
        if self.left <= 0:
            raise UnavailableError("origin: gone", where=key)
        self.left -= 1
        super().put(key, data)


@pytest.mark.parametrize("native", [True, False])
def test_one_large_file_goes_on_inside(
    tmp_path: Path, index: IngestIndex, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    """What is durable is neither sent nor, where SHA-256 can be resumed, read again."""
    monkeypatch.setattr("snowdrop.content.ingest.packs.PACK_BYTES_MAX", 8 << 20)
    monkeypatch.setattr("snowdrop.content.ingest.packs.PUTS_MAX", 1)
    if not native:
        monkeypatch.setattr("snowdrop.content.ingest.sha._library", lambda: None)
    source = tmp_path / "m"
    source.mkdir()
    (source / "model.gguf").write_bytes(noise(41 << 20))
    origin = Failing(3)
    with pytest.raises(UnavailableError):
        push(source, origin, index)
    assert len(origin.objects) == 3
    origin.left = 100
    result = push(source, origin, index)
    assert result.new_bytes == 17 << 20
    assert result.read_bytes == (17 << 20 if native else 41 << 20)
    assert result.artefact == push(source, MemoryOrigin()).artefact
    assert rebuilt(origin, result.artefact) == files_of(source)


def test_a_file_that_changed_between_two_attempts_is_read_whole(tmp_path: Path, index: IngestIndex) -> None:
    source, origin = shards(tmp_path / "m", 3), Failing(2)
    with pytest.raises(UnavailableError):
        push(source, origin, index)
    data = bytearray((source / "m-0.safetensors").read_bytes())
    data[-1] ^= 1
    (source / "m-0.safetensors").write_bytes(data)
    origin.left = 100
    assert rebuilt(origin, push(source, origin, index).artefact) == files_of(source)


def test_a_push_that_found_a_change_does_not_spoil_the_next(tmp_path: Path, index: IngestIndex) -> None:
    source, origin = shards(tmp_path / "m", 2), MemoryOrigin()

    def grow(step: PushProgress) -> None:
        if step.path == "m-0.safetensors" and step.done_bytes < 9 << 20:
            with (source / step.path).open("r+b") as stream:
                stream.seek(1 << 20)
                stream.write(b"changed")

    with pytest.raises(InvalidInputError, match="changed while"):
        push_source(DirectorySource(source, ignored=()), origin, PushOptions(), index=index, progress=grow)
    assert not [key for key in origin.objects if "manifests" in key]
    assert rebuilt(origin, push(source, origin, index).artefact) == files_of(source)


def test_private_names_differ_per_tenant_and_from_public_ones(tmp_path: Path) -> None:
    source, origin = write_model(tmp_path / "m"), MemoryOrigin()
    results = {
        domain: push(source, origin, None, PushOptions(hasher=RING.hasher(domain))) for domain in RING.domains
    }
    assert len({result.artefact.manifest for result in results.values()}) == 3
    assert all(result.new_bytes == result.artefact.total_bytes for result in results.values())
    names = [key.rpartition("/")[2] for key in origin.objects]
    assert len(set(names)) == len(names)
    manifests = [
        decode_manifest(origin.objects[manifest_key(domain, result.artefact.manifest)], hasher=None)
        for domain, result in results.items()
    ]
    chunks = [chunk.digest for manifest in manifests for chunk in manifest.chunks]
    assert len(set(chunks)) == len(chunks)
    for domain, result in results.items():
        assert {key.partition("/")[0] for key in origin.objects} == set(RING.domains)
        assert rebuilt(origin, result.artefact, RING.hasher(domain)) == files_of(source)


def test_a_private_push_cannot_be_decoded_without_its_key(tmp_path: Path) -> None:
    source, origin, domain = write_model(tmp_path / "m"), MemoryOrigin(), key_domain(KEY)
    artefact = push(source, origin, None, PushOptions(hasher=RING.hasher(domain))).artefact
    assert artefact.key_domain == domain
    with pytest.raises(NotFoundError, match="key"):
        PUBLIC_KEYRING.hasher(artefact.key_domain)
    data = origin.objects[manifest_key(domain, artefact.manifest)]
    for hasher in (PUBLIC_KEYRING.hasher("public"), RING.hasher(key_domain(OTHER_KEY))):
        with pytest.raises(IntegrityError):
            decode_manifest(data, expected=artefact.manifest, hasher=hasher)


def text_and_noise(root: Path) -> Path:
    root.mkdir()
    (root / "vocab.json").write_bytes(b'"token", ' * 500_000)
    (root / "noise.bin").write_bytes(noise(5 << 20))
    (root / "tiny").write_bytes(b"x")
    return root


@pytest.mark.parametrize("compress", ["zstd", "auto"])
def test_compressed_chunks_come_back_and_only_what_shrinks_is_compressed(tmp_path: Path, compress: str) -> None:
    source, origin = text_and_noise(tmp_path / "m"), MemoryOrigin()
    result = push(source, origin, None, PushOptions(compress=compress))  # type: ignore[arg-type]
    assert rebuilt(origin, result.artefact) == files_of(source)
    manifest = decode_manifest(origin.objects[manifest_key("public", result.artefact.manifest)])
    codecs = {
        entry.path: {manifest.chunks[extent.chunk].codec for extent in entry.extents} for entry in manifest.files
    }
    assert codecs == {"noise.bin": {"plain"}, "tiny": {"plain"}, "vocab.json": {"zstd"}}
    assert result.new_bytes < 6 << 20


def test_auto_leaves_alone_what_saves_little(tmp_path: Path) -> None:
    source, origin = tmp_path / "m", MemoryOrigin()
    source.mkdir()
    weights = bytearray(noise(4 << 20))
    weights[1::4] = b"\x3c" * (1 << 20)
    (source / "weights.bin").write_bytes(weights)
    assert push(source, origin, None, PushOptions(compress="auto")).new_bytes == 4 << 20
    assert push(source, origin, None, PushOptions(compress="zstd")).new_bytes < 3.6 * (1 << 20)


def test_two_packs_of_the_same_bytes_are_one(tmp_path: Path) -> None:
    """The same bytes as weights and as a plain file are cut otherwise, and make the same pack."""
    source, origin = tmp_path / "m", MemoryOrigin()
    source.mkdir()
    data = safetensors_bytes({f"t{i}": ("U8", [3 << 20], noise(3 << 20, i)) for i in range(3)})
    (source / "a.bin").write_bytes(data)
    (source / "b.safetensors").write_bytes(data)
    result = push(source, origin)
    assert result.pack_count == 1
    assert rebuilt(origin, result.artefact) == files_of(source)


def test_memory_stays_bounded_by_spans_and_packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the origin: no more than PUTS_MAX packs wait and SPANS_AHEAD_MAX spans are read ahead."""
    monkeypatch.setattr("snowdrop.content.ingest.packs.PACK_BYTES_MAX", 1 << 20)
    monkeypatch.setattr("snowdrop.content.ingest.read.SPAN_BYTES", 1 << 20)
    monkeypatch.setattr("snowdrop.content.cut.CHUNK_BYTES_MAX", 1 << 20)
    source = tmp_path / "m"
    source.mkdir()
    (source / "model.gguf").write_bytes(noise(60 << 20))

    class Watched(DirectorySource):
        read_bytes = 0

        def read(self, file, offset, into):  # type: ignore[no-untyped-def]
            super().read(file, offset, into)
            Watched.read_bytes += len(into)

    lead: list[int] = []

    class Slow(MemoryOrigin):
        stored = 0

        def put(self, key: str, data: bytes | memoryview) -> None:
            lead.append(Watched.read_bytes - Slow.stored)
            super().put(key, data)
            Slow.stored += len(data)

    push_source(Watched(source, ignored=()), Slow(), PushOptions())
    assert max(lead) <= (12 + 3 + 1 + 1) << 20


class ByHand:
    """An executor whose jobs run when the test says so."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, job: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.jobs.append((future, lambda: job(*arguments)))
        return future

    def run(self, at: int) -> None:
        future, job = self.jobs[at]
        future.set_result(job())


def test_progress_never_reaches_beyond_a_pack_that_is_not_durable(index: IngestIndex) -> None:
    """Packs become durable in any order; what is remembered of the file follows the earliest that is missing."""
    done = 0
    version = "v"

    def durable() -> tuple[tuple[str, str, Progress], ...]:
        return (("file", version, Progress(done, None, "", ())),)

    threads = ByHand()
    packer = Packer(
        MemoryOrigin(), PUBLIC_KEYRING.hasher("public"), threads, index=index, source="s", durable=durable
    )  # type: ignore[arg-type]

    def one_pack(seed: int) -> None:
        nonlocal done
        data = noise(100, seed)
        packer.add(PUBLIC_KEYRING.hasher("public").hexdigest(data), 100, "plain", memoryview(data))
        done += 100
        packer.flush()

    one_pack(0)
    one_pack(1)
    threads.run(1)
    one_pack(2)
    assert index.progress("s", "file", version) is None
    threads.run(0)
    threads.run(2)
    packer.finish()
    progress = index.progress("s", "file", version)
    assert progress is not None
    assert progress.durable_bytes == 300


def test_progress_of_another_way_of_cutting_is_not_used(
    tmp_path: Path, index: IngestIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snowdrop.content.ingest.packs.PACK_BYTES_MAX", 4 << 20)
    source = tmp_path / "m"
    source.mkdir()
    (source / "model.gguf").write_bytes(noise(20 << 20))
    origin = Failing(2)
    with pytest.raises(UnavailableError):
        push(source, origin, index)
    monkeypatch.setattr("snowdrop.content.cut.CHUNK_BYTES_MAX", 3 << 20)
    origin.left = 100
    assert rebuilt(origin, push(source, origin, index).artefact) == files_of(source)


def test_a_manifest_that_the_lease_hides_is_put_again(tmp_path: Path, index: IngestIndex) -> None:
    """Condemned objects are still readable, but do not exist for a push."""
    source, origin = write_model(tmp_path / "m"), MemoryOrigin()
    artefact = push(source, origin, index).artefact
    condemned = manifest_key("public", artefact.manifest)
    put: list[str] = []

    class Leased(MemoryOrigin):
        def exists(self, key: str) -> bool:
            return key != condemned and super().exists(key)

        def size(self, key: str) -> int:
            if key == condemned:
                raise NotFoundError("condemned", where=key)
            return super().size(key)

        def put(self, key: str, data: bytes | memoryview) -> None:
            put.append(key)
            super().put(key, data)

    leased = Leased()
    leased.objects = origin.objects
    assert push(source, leased, index).artefact == artefact
    assert put == [condemned]


def damaged(data: bytes, kind: str) -> bytes:
    return data[:-1] if kind == "short" else bytes([data[0] ^ 1]) + data[1:]


@pytest.mark.parametrize("kind", ["short", "flipped"])
def test_a_damaged_manifest_is_put_again(tmp_path: Path, index: IngestIndex, kind: str) -> None:
    source, origin = write_model(tmp_path / "m"), MemoryOrigin()
    first = push(source, origin, index)
    right = dict(origin.objects)
    key = manifest_key("public", first.artefact.manifest)
    origin.objects[key] = damaged(origin.objects[key], kind)
    for _ in range(2):
        assert push(source, origin, index).artefact == first.artefact
        assert origin.objects == right


@pytest.mark.parametrize(
    ("kind", "options"),
    [("short", PLAIN), ("short", PushOptions(repair=True)), ("flipped", PushOptions(repair=True))],
)
def test_a_damaged_pack_is_put_again(tmp_path: Path, index: IngestIndex, kind: str, options: PushOptions) -> None:
    source, origin = shards(tmp_path / "m", 2), CountingOrigin()
    first = push(source, origin, index)
    right = dict(origin.objects)
    for key in origin.packs():
        origin.objects[key] = damaged(origin.objects[key], kind)
    second = push(source, origin, index, options)
    assert second.artefact == first.artefact
    assert second.new_bytes == sum(len(data) for key, data in right.items() if "/packs/" in key)
    assert origin.objects == right
    assert push(source, origin, index, options).new_bytes == 0


def test_a_damaged_pack_that_is_cut_otherwise_now_is_not_named_again(tmp_path: Path, index: IngestIndex) -> None:
    """The chunks of a tree lie in another pack, too: its old manifest with a damaged pack must not be taken."""
    whole, half, origin = shards(tmp_path / "whole", 2), shards(tmp_path / "half", 1), CountingOrigin()
    push(half, origin, index)
    first = push(whole, origin, index)
    damage = min(origin.packs(), key=lambda key: len(origin.objects[key]))
    origin.objects[damage] = damaged(origin.objects[damage], "flipped")
    second = push(whole, origin, index, PushOptions(repair=True))
    assert rebuilt(origin, second.artefact) == files_of(whole)
    assert second.artefact.total_bytes == first.artefact.total_bytes


def test_code_is_put_right_by_deploying_it_again(tmp_path: Path) -> None:
    source, origin = tmp_path / "code", CountingOrigin()
    source.mkdir()
    (source / "service.py").write_text("x = 1\n")
    artefact = push_code(source, origin, tenant=DEFAULT_TENANT).artefact
    for key in origin.objects:
        origin.objects[key] = damaged(origin.objects[key], "flipped")
    assert push_code(source, origin, tenant=DEFAULT_TENANT).artefact == artefact
    assert rebuilt(origin, artefact) == files_of(source)

import hashlib
import os
import socket
from pathlib import Path

import pytest

from content_helpers import CountingOrigin, noise, push, safetensors_bytes, write_model
from snowdrop.content.ingest import PushProgress, push_code, push_directory
from snowdrop.content.layout import PUBLIC_DOMAIN, manifest_key
from snowdrop.content.manifest import decode_manifest
from snowdrop.content.origin import DirectoryOrigin, MemoryOrigin
from snowdrop.domain.errors import (
    CorruptContentError,
    InvalidInputError,
    NotFoundError,
    StorageFullError,
    UnavailableError,
)
from snowdrop.domain.ids import DEFAULT_TENANT
from snowdrop.domain.layout import StateLayout
from snowdrop.domain.manifest import Manifest


def manifest_of(origin: MemoryOrigin, digest: str) -> Manifest:
    return decode_manifest(origin.objects[manifest_key(PUBLIC_DOMAIN, digest)], expected=digest)


def contents(origin: MemoryOrigin, manifest: Manifest, path: str) -> bytes:
    entry = next(entry for entry in manifest.files if entry.path == path)
    data = b""
    for extent in entry.extents:
        chunk = manifest.chunks[extent.chunk]
        name = manifest.packs[chunk.pack].digest
        pack = origin.objects[f"{PUBLIC_DOMAIN}/packs/{name[:2]}/{name}"]
        plain = pack[chunk.pack_offset : chunk.pack_offset + chunk.stored_bytes]
        data += plain[extent.chunk_offset : extent.chunk_offset + extent.length]
    return data


def test_every_file_can_be_put_together_again_from_manifest_and_packs(tmp_path: Path) -> None:
    source, origin = write_model(tmp_path / "m"), MemoryOrigin()
    manifest = manifest_of(origin, push(source, origin).artefact.manifest)
    for entry in manifest.files:
        data = (source / entry.path).read_bytes()
        assert contents(origin, manifest, entry.path) == data
        assert entry.sha256 == hashlib.sha256(data).hexdigest()
    assert manifest.files[-1].path == "model.safetensors"
    assert manifest.files[-1].tensors[0].name == "big"


def test_the_same_tree_gives_the_same_digest_and_nothing_new(tmp_path: Path) -> None:
    origin = MemoryOrigin()
    first = push(write_model(tmp_path / "a"), origin)
    other = write_model(tmp_path / "b")
    (other / "config.json").chmod(0o600)
    os.utime(other / "config.json", (1, 1))
    second = push(other, origin)
    assert second.artefact == first.artefact
    assert (second.new_bytes, second.reused_bytes) == (0, first.artefact.total_bytes)


def test_an_executable_file_stays_one(tmp_path: Path) -> None:
    source, origin = write_model(tmp_path / "m"), MemoryOrigin()
    (source / "empty").chmod(0o700)
    modes = {entry.path: entry.mode for entry in manifest_of(origin, push(source, origin).artefact.manifest).files}
    assert modes["empty"] == 0o755
    assert modes["config.json"] == 0o644


def test_identical_chunks_are_stored_once(tmp_path: Path) -> None:
    origin = CountingOrigin()
    (tmp_path / "a").write_bytes(noise(1000))
    (tmp_path / "b").write_bytes(noise(1000))
    result = push(tmp_path, origin)
    assert (result.chunk_count, result.new_bytes, result.reused_bytes) == (1, 1000, 1000)


def test_a_changed_shard_leaves_the_packs_of_the_others_alone(tmp_path: Path) -> None:
    origin = MemoryOrigin()
    for shard in range(2):
        data = safetensors_bytes({f"t{shard}": ("U8", [9 << 20], noise(9 << 20, shard))})
        (tmp_path / f"m-{shard}.safetensors").write_bytes(data)
    push(tmp_path, origin)
    (tmp_path / "m-0.safetensors").write_bytes(safetensors_bytes({"t0": ("U8", [9 << 20], noise(9 << 20, 7))}))
    assert push(tmp_path, origin).reused_bytes == (tmp_path / "m-1.safetensors").stat().st_size


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    seen: list[PushProgress] = []
    source = write_model(tmp_path / "m")
    push_directory(source, MemoryOrigin(), kind="model", tenant=DEFAULT_TENANT, progress=seen.append)
    assert seen[-1].done_bytes == seen[-1].total_bytes
    assert [step.done_bytes for step in seen] == sorted(step.done_bytes for step in seen)


def test_corrupt_weights_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    source, origin = write_model(tmp_path / "m"), MemoryOrigin()
    with (source / "model.safetensors").open("ab") as stream:
        stream.truncate(1000)
    with pytest.raises(CorruptContentError) as caught:
        push(source, origin)
    assert caught.value.where.startswith("model.safetensors")
    assert origin.objects == {}


@pytest.mark.parametrize("target", ["../secret", "/etc/hostname", "missing", "nested"])
def test_links_that_lead_out_or_nowhere_are_refused_by_name(tmp_path: Path, target: str) -> None:
    source, origin = write_model(tmp_path / "m"), MemoryOrigin()
    (tmp_path / "secret").write_text("secret")
    (source / "link.txt").symlink_to(target)
    with pytest.raises(InvalidInputError, match=r"link\.txt") as caught:
        push(source, origin)
    assert caught.value.where == "link.txt"
    assert origin.objects == {}


def test_a_link_inside_is_taken_as_its_file(tmp_path: Path) -> None:
    source, origin = write_model(tmp_path / "m"), MemoryOrigin()
    (source / "link.json").symlink_to("config.json")
    manifest = manifest_of(origin, push(source, origin).artefact.manifest)
    assert contents(origin, manifest, "link.json") == (source / "config.json").read_bytes()


def test_a_fifo_is_refused_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidInputError, match="pipe is not a regular file"):
        push(tmp_path, MemoryOrigin())


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))).write_bytes(b"x")
    with pytest.raises(InvalidInputError, match="not valid UTF-8"):
        push(tmp_path, MemoryOrigin())


def test_an_empty_and_a_missing_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="nothing to push"):
        push(tmp_path, MemoryOrigin())
    with pytest.raises(NotFoundError):
        push(tmp_path / "missing", MemoryOrigin())


class Failing(MemoryOrigin):
    """Stops at the n-th put, as a kill would."""

    def __init__(self, puts: int) -> None:
        super().__init__()
        self.left = puts

    def put(self, key: str, data: bytes | memoryview) -> None:
        if self.left == 0:
            raise UnavailableError("origin: gone", where=key)
        self.left -= 1
        super().put(key, data)


@pytest.mark.parametrize("puts", [0, 1])
def test_a_push_that_ends_early_leaves_no_manifest_and_can_be_repeated(tmp_path: Path, puts: int) -> None:
    source, origin = write_model(tmp_path / "m"), Failing(puts)
    with pytest.raises(UnavailableError):
        push(source, origin)
    assert len(origin.objects) == puts
    assert not [key for key in origin.objects if "manifests" in key]
    origin.left = 100
    assert push(source, origin).artefact == push(source, MemoryOrigin()).artefact


def test_packs_are_put_before_the_manifest(tmp_path: Path) -> None:
    origin = MemoryOrigin()
    push(write_model(tmp_path / "m"), origin)
    assert ["manifests" in key for key in origin.objects] == [False] * (len(origin.objects) - 1) + [True]


def test_a_full_origin_is_a_storage_full_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, root = write_model(tmp_path / "m"), tmp_path / "origin"

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFullError) as caught:
        push(source, DirectoryOrigin(root))
    assert caught.value.next_step
    assert [path for path in root.rglob("*") if path.is_file()] == []


def test_code_leaves_out_what_is_ignored(tmp_path: Path) -> None:
    for path in (
        "service.py",
        "__pycache__/a.pyc",
        ".git/HEAD",
        ".venv/x",
        "data/big.bin",
        "data/keep.txt",
        "notes.md",
    ):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(path)
    (tmp_path / ".snowdropignore").write_text("# mine\n*.md\ndata/*.bin\n")
    origin = MemoryOrigin()
    manifest = manifest_of(origin, push_code(tmp_path, origin, tenant=DEFAULT_TENANT).artefact.manifest)
    assert [entry.path for entry in manifest.files] == ["data/keep.txt", "service.py"]
    assert manifest.kind == "code"


def test_a_state_folder_in_the_code_is_left_out_by_itself(tmp_path: Path) -> None:
    for path in ("service.py", "run/agent.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(path)
    layout = StateLayout(tmp_path / "s")
    layout.make()
    (layout.keys).mkdir()
    (layout.keys / "signer").write_text("secret")
    origin = MemoryOrigin()
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(str(layout.agent_socket))
        manifest = manifest_of(origin, push_code(tmp_path, origin, tenant=DEFAULT_TENANT).artefact.manifest)
    assert [entry.path for entry in manifest.files] == ["run/agent.py", "service.py"]


def test_code_that_is_too_large_names_its_largest_file(tmp_path: Path) -> None:
    with (tmp_path / "weights.bin").open("wb") as stream:
        stream.truncate(300 << 20)
    with pytest.raises(InvalidInputError, match=r"weights\.bin"):
        push_code(tmp_path, MemoryOrigin(), tenant=DEFAULT_TENANT)


def test_code_with_too_many_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snowdrop.content.ingest.push.CODE_FILES_MAX", 1)
    (tmp_path / "a.py").write_text("")
    (tmp_path / "b.py").write_text("")
    with pytest.raises(InvalidInputError, match="more than 1 files"):
        push_code(tmp_path, MemoryOrigin(), tenant=DEFAULT_TENANT)


def test_a_file_that_changes_under_the_push_is_refused(tmp_path: Path) -> None:
    source, origin = write_model(tmp_path / "m"), MemoryOrigin()

    def grow(step: PushProgress) -> None:
        if step.path == "model.safetensors":
            with (source / "model.safetensors").open("ab") as stream:
                stream.write(b"x")

    with pytest.raises(InvalidInputError, match="changed while"):
        push_directory(source, origin, kind="model", tenant=DEFAULT_TENANT, progress=grow)
    assert not [key for key in origin.objects if "manifests" in key]

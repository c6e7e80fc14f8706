import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from content_helpers import noise, push, safetensors_bytes, small_pool
from descriptors import open_descriptors
from snowdrop.content.area import Area
from snowdrop.content.behind import BLOCK_BYTES_MAX, plan_blocks
from snowdrop.content.diskio import DiskIo
from snowdrop.content.landing import Landing
from snowdrop.content.layout import PUBLIC_DOMAIN, manifest_key
from snowdrop.content.manifest import decode_manifest
from snowdrop.content.origin import MemoryOrigin
from snowdrop.content.placement import area_layout
from snowdrop.content.source import PackSource
from snowdrop.domain.errors import StorageFullError, UnavailableError
from snowdrop.domain.manifest import Manifest

SHARDS = 3


class WithoutDirect(DiskIo):
    """A file system that refuses O_DIRECT."""

    def open(self, path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct I/O here")
        return super().open(path, flags)


class Spy(DiskIo):
    """Notes which writes went past the page cache."""

    def __init__(self) -> None:
        self.direct: list[tuple[str, int, int]] = []
        self.buffered: list[tuple[str, int, int]] = []

    def write(self, fd: int, view: memoryview, offset: int) -> None:
        name = Path(f"/proc/self/fd/{fd}").readlink().name
        is_direct = bool(
            int(Path(f"/proc/self/fdinfo/{fd}").read_text().split("flags:")[1].split()[0], 8) & os.O_DIRECT
        )
        (self.direct if is_direct else self.buffered).append((name, offset, len(view)))
        super().write(fd, view, offset)


class Model:
    """A pushed model with its area, landing and right bytes. Shards share a tensor; one is also a plain file."""

    def __init__(self, root: Path, io: DiskIo) -> None:
        source = root / "source"
        source.mkdir()
        shared = noise(300_000, 99)
        for shard in range(SHARDS):
            tensors = {
                f"t{shard}{part}": ("U8", [size], noise(size, shard * 9 + part))
                for part, size in enumerate(((5 << 20) + 3, 70_001))
            }
            tensors["shared"] = ("U8", [len(shared)], shared)
            (source / f"m-{shard}.safetensors").write_bytes(safetensors_bytes(tensors))
        (source / "copy.bin").write_bytes(shared)
        (source / "config.json").write_bytes(b"{}")
        origin = MemoryOrigin()
        digest = push(source, origin).artefact.manifest
        self.manifest: Manifest = decode_manifest(origin.objects[manifest_key(PUBLIC_DOMAIN, digest)])
        self.right = {path.name: path.read_bytes() for path in source.iterdir()}
        self.packs = PackSource(origin, self.manifest)
        self.area = Area(self.manifest, area_layout(self.manifest), small_pool())
        self.directory = root / "landing"
        self.directory.mkdir()
        self.landing = self.reopened(io)

    def reopened(self, io: DiskIo | None = None, boot_id: str | None = None) -> Landing:
        landing = Landing(self.directory, self.manifest, io or DiskIo(), boot_id=boot_id)
        landing.open()
        return landing

    def chunk(self, chunk: int) -> memoryview:
        data = memoryview(bytearray(self.manifest.chunks[chunk].plain_bytes))
        self.packs.read(chunk, 1, data)
        return data

    def fill(self, chunks: list[int]) -> None:
        for chunk in chunks:
            self.area.scatter(chunk, self.chunk(chunk))
            self.area.mark(chunk)

    @property
    def tensor_chunks(self) -> list[int]:
        return sorted(self.area.layout.places)

    def write_small(self) -> None:
        for chunk in range(len(self.manifest.chunks)):
            if chunk not in self.area.layout.places:
                self.landing.write(chunk, self.chunk(chunk))

    def assert_tree(self) -> None:
        tree = self.landing.tree
        assert {path.name: path.read_bytes() for path in tree.iterdir()} == self.right


@pytest.fixture
def spy() -> Spy:
    return Spy()


@pytest.fixture
def model(tmp_path: Path, spy: Spy) -> Iterator[Model]:
    model = Model(tmp_path, spy)
    yield model
    model.landing.close()
    model.area.close()


def write_all(model: Model, budget: int = 6 << 20) -> list[int]:
    counts = [model.landing.write_behind(model.area, budget)]
    while counts[-1]:
        counts.append(model.landing.write_behind(model.area, budget))
    return counts


def test_blocks_cover_every_tensor_file_once_and_cross_no_grid_line(model: Model) -> None:
    covered: dict[int, int] = {}
    for block in plan_blocks(model.manifest, model.area.layout):
        assert block.file_offset == covered.get(block.file, 0)
        assert block.area_offset // BLOCK_BYTES_MAX == (block.area_offset + block.length - 1) // BLOCK_BYTES_MAX
        assert block.area_offset % 4096 == block.file_offset % 4096 == 0
        covered[block.file] = block.file_offset + block.length
        inside = {
            extent.chunk
            for extent in model.manifest.files[block.file].extents
            if extent.file_offset < block.file_offset + block.length
            and extent.file_offset + extent.length > block.file_offset
        }
        assert set(block.chunks) == inside
    tensors = {index: entry.size for index, entry in enumerate(model.manifest.files) if entry.tensors}
    assert covered == tensors


def test_what_is_filled_is_written_past_the_page_cache_and_ends_in_the_tree(model: Model, spy: Spy) -> None:
    assert model.landing.write_behind(model.area, 1 << 30) == 0
    model.fill(model.tensor_chunks[::2])
    first = sum(write_all(model))
    assert not list(model.landing.tree.glob("*.safetensors"))
    model.fill(model.tensor_chunks[1::2])
    counts = write_all(model)
    assert all(count <= 6 << 20 for count in counts)
    model.write_small()
    total = sum(len(data) for name, data in model.right.items() if name.endswith(".safetensors"))
    assert first < first + sum(counts) == total
    model.landing.sync()
    assert model.landing.is_complete
    model.assert_tree()
    past = sum(length for _, _, length in spy.direct)
    ends = [length for name, _, length in spy.buffered if name.endswith(".safetensors")]
    assert past + sum(ends) == total
    assert all(length < 4096 for length in ends)


def test_a_budget_below_a_block_still_gets_on(model: Model) -> None:
    model.fill(model.tensor_chunks)
    assert all(count <= BLOCK_BYTES_MAX for count in write_all(model, 1))
    model.write_small()
    model.landing.sync()
    assert model.landing.is_complete


def test_a_file_system_without_direct_io_serves_as_well(tmp_path: Path) -> None:
    model = Model(tmp_path, WithoutDirect())
    model.fill(model.tensor_chunks)
    write_all(model)
    model.write_small()
    model.landing.sync()
    model.assert_tree()
    again = model.reopened(WithoutDirect(), "another boot")
    for chunk in model.tensor_chunks:
        into = memoryview(bytearray(model.manifest.chunks[chunk].plain_bytes))
        again.read(chunk, 1, into)
        assert into == model.chunk(chunk)
    model.area.close()


def test_a_quarantined_chunk_is_written_again_and_comes_back(model: Model) -> None:
    model.fill(model.tensor_chunks)
    write_all(model)
    model.write_small()
    model.landing.sync()
    chunk = next(chunk for chunk in model.tensor_chunks if len(model.area.layout.places[chunk]) == 1)
    model.landing.quarantine(chunk)
    assert not model.landing.is_complete
    assert not model.landing.holds(chunk)
    assert len(list(model.landing.tree.glob("*.safetensors"))) == SHARDS - 1
    assert 0 < sum(write_all(model)) <= 2 * BLOCK_BYTES_MAX
    model.landing.sync()
    assert model.landing.is_complete
    model.assert_tree()


class FailsSync(DiskIo):
    """The next sync of a file of that name fails, once: as the kernel tells it."""

    def __init__(self) -> None:
        self.name = ""

    def sync_data(self, fd: int) -> None:
        if Path(f"/proc/self/fd/{fd}").readlink().name == self.name:
            self.name = ""
            raise OSError(errno.EIO, "lost a write")
        super().sync_data(fd)


def test_a_failed_sync_takes_back_what_was_not_durable(tmp_path: Path) -> None:
    io = FailsSync()
    model = Model(tmp_path, io)
    model.fill(model.tensor_chunks)
    write_all(model)
    model.write_small()
    io.name = "m-1.safetensors"
    with pytest.raises(UnavailableError):
        model.landing.sync()
    assert not (model.landing.tree / "m-1.safetensors").exists()
    model.landing.sync()
    assert not model.landing.is_complete
    bits = model.landing._map.read()
    lost = {extent.chunk for e in model.manifest.files if e.path == "m-1.safetensors" for extent in e.extents}
    assert not any(bits[chunk] for chunk in lost)
    write_all(model)
    model.write_small()
    for chunk in lost:
        model.landing.write(chunk, model.chunk(chunk))
    model.landing.sync()
    assert model.landing.is_complete
    model.assert_tree()
    model.area.close()


def complete(model: Model) -> None:
    model.fill(model.tensor_chunks)
    write_all(model)
    model.write_small()
    model.landing.sync()
    assert model.landing.is_complete


def test_within_a_boot_a_complete_directory_stays_proven(model: Model) -> None:
    complete(model)
    again = model.reopened()
    assert again.is_complete
    assert all(again.is_verified(chunk) for chunk in range(len(model.manifest.chunks)))
    model.assert_tree()


def test_after_a_restart_of_the_machine_nothing_is_in_the_tree_before_it_was_read(model: Model) -> None:
    complete(model)
    again = model.reopened(boot_id="another boot")
    assert not list(again.tree.iterdir())
    assert not any(again.is_verified(chunk) for chunk in range(len(model.manifest.chunks)))
    for chunk in range(len(model.manifest.chunks)):
        data = memoryview(bytearray(model.manifest.chunks[chunk].plain_bytes))
        again.read(chunk, 1, data)
        again.confirm(chunk, data)
    assert again.is_complete
    model.assert_tree()
    again.close()


def test_a_second_place_of_a_chunk_is_not_believed_for_the_first(model: Model) -> None:
    """A chunk in three files is read once; the other places are compared, and mended."""
    complete(model)
    again = model.reopened(boot_id="another boot")
    for shard in range(SHARDS):
        path = model.directory / f"partial/m-{shard}.safetensors"
        if shard:
            os.truncate(path, path.stat().st_size - 200_000)
            os.truncate(path, len(model.right[path.name]))
    for chunk in range(len(model.manifest.chunks)):
        data = memoryview(bytearray(model.manifest.chunks[chunk].plain_bytes))
        again.read(chunk, 1, data)
        if data == model.chunk(chunk):
            again.confirm(chunk, data)
        else:
            again.quarantine(chunk)
            again.write(chunk, model.chunk(chunk))
    again.sync()
    assert again.is_complete
    model.assert_tree()
    again.close()


@pytest.mark.parametrize("damage", ["other bytes", "other file", "no record", "torn record"])
def test_a_proof_holds_for_untouched_files_only(model: Model, damage: str) -> None:
    complete(model)
    path = model.landing.tree / "m-0.safetensors"
    if damage == "other bytes":
        with path.open("r+b") as stream:
            stream.write(b"x")
    elif damage == "other file":
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
    elif damage == "no record":
        (model.directory / "proof").unlink()
    else:
        os.truncate(model.directory / "proof", 50)
    again = model.reopened()
    assert not (again.tree / "m-0.safetensors").exists()
    assert not again.is_complete
    again.close()


def open_files() -> list[Path]:
    return [Path("/proc/self/fd", number) for number in open_descriptors()]


def test_descriptors_are_bounded_and_none_is_left_open(model: Model) -> None:
    complete(model)
    before = len(open_files())
    again = model.reopened()
    data = memoryview(bytearray(model.manifest.chunks[0].plain_bytes))
    for _ in range(50):
        again.read(0, 1, data)
    assert len(open_files()) <= before + 1
    again.close()
    assert len(open_files()) <= before
    with pytest.raises(UnavailableError):
        again.read(0, 1, data)


def test_a_file_in_the_tree_can_be_executed(tmp_path: Path, model: Model) -> None:
    """Nothing that is complete is open for writing: the kernel would refuse to execute it."""
    complete(model)
    for link in open_files():
        if link.exists() and str(link.readlink()).startswith(str(model.directory)):
            flags = (link.parent.parent / "fdinfo" / link.name).read_text().split("flags:")[1].split()[0]
            assert int(flags, 8) & os.O_ACCMODE == os.O_RDONLY, link.readlink()


class FullAt(DiskIo):
    """No room for calls of that kind on that name, while it is set."""

    def __init__(self) -> None:
        self.call = self.name = ""

    def replace(self, source: Path, target: Path) -> None:
        self._check("replace", source)
        super().replace(source, target)

    def write(self, fd: int, view: memoryview, offset: int) -> None:
        self._check("write", Path(f"/proc/self/fd/{fd}").readlink())
        super().write(fd, view, offset)

    def _check(self, call: str, path: Path) -> None:
        if (call, path.name) == (self.call, self.name):
            raise OSError(errno.ENOSPC, "full")


@pytest.mark.parametrize(
    ("call", "name"), [("replace", "m-1.safetensors"), ("write", "chunks.map"), ("write", "manifest.tmp")]
)
def test_a_step_of_the_disk_that_found_no_room_is_done_by_the_next_sync(
    tmp_path: Path, call: str, name: str
) -> None:
    io = FullAt()
    model = Model(tmp_path, io)
    io.call, io.name = call, name
    model.fill(model.tensor_chunks)
    write_all(model)
    model.write_small()
    with pytest.raises(StorageFullError):
        model.landing.sync()
    assert not model.landing.is_complete
    io.call = ""
    model.landing.sync()
    assert model.landing.is_complete
    model.assert_tree()
    again = model.reopened(boot_id="another boot")
    assert len(again.held_chunks()) == len(model.manifest.chunks)
    again.close()
    model.area.close()


def test_a_small_file_that_cannot_enter_the_tree_is_said_and_tried_again(tmp_path: Path) -> None:
    io = FullAt()
    model = Model(tmp_path, io)
    io.call, io.name = "replace", "config.json"
    with pytest.raises(StorageFullError):
        model.write_small()
    chunk = next(e.extents[0].chunk for e in model.manifest.files if e.path == "config.json")
    assert not model.landing.is_verified(chunk)
    io.call = ""
    model.write_small()
    assert (model.landing.tree / "config.json").read_bytes() == b"{}"
    model.area.close()


class WriteBacks(DiskIo):
    def __init__(self) -> None:
        self.begun: list[tuple[str, int, int]] = []

    def begin_write_back(self, fd: int, offset: int, length: int) -> None:
        self.begun.append((Path(f"/proc/self/fd/{fd}").readlink().name, offset, length))
        super().begin_write_back(fd, offset, length)


def test_large_pieces_of_a_directory_load_leave_for_the_disk_at_once(tmp_path: Path) -> None:
    io = WriteBacks()
    model = Model(tmp_path, io)
    for chunk in range(len(model.manifest.chunks)):
        model.landing.write(chunk, model.chunk(chunk))
    large = {
        (entry.path, extent.file_offset, extent.length)
        for entry in model.manifest.files
        for extent in entry.extents
        if extent.length >= 256 << 10
    }
    assert set(io.begun) == large
    model.landing.sync()
    model.assert_tree()
    model.area.close()


def test_a_wrong_file_that_cannot_be_renamed_is_removed_from_the_tree(tmp_path: Path) -> None:
    io = FullAt()
    model = Model(tmp_path, io)
    complete(model)
    io.call, io.name = "replace", "m-1.safetensors"
    index = next(i for i, entry in enumerate(model.manifest.files) if entry.path == "m-1.safetensors")
    chunks = {extent.chunk for extent in model.manifest.files[index].extents}
    model.landing.quarantine(max(chunks))
    assert not (model.landing.tree / "m-1.safetensors").exists()
    assert not chunks & set(model.landing.held_chunks()), "its other bytes went with it"
    io.call = ""
    write_all(model)
    model.landing.sync()
    assert model.landing.is_complete
    model.assert_tree()
    again = model.reopened(boot_id="another boot")
    assert len(again.held_chunks()) == len(model.manifest.chunks)
    again.close()
    model.area.close()

"""`load_file` and its kin give what the safetensors library gives."""

import fcntl
import gc
import json
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

from content_helpers import framed, safetensors_bytes
from descriptors import open_descriptors
from snowdrop.domain.errors import CorruptContentError, InvalidInputError, NotFoundError, StorageFullError
from snowdrop.weights import direct, files, load_directory, load_file, residency, safe_open
from snowdrop.weights.devices.cpu import CpuDevice
from snowdrop.weights.numpy import load_file as load_numpy
from snowdrop.weights.plan import Request
from snowdrop.weights.stream import floating_to, plan_of, stream

TORCH_DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz, torch.complex64, torch.uint16, torch.uint32, torch.uint64, torch.float4_e2m1fn_x2,
]  # fmt: skip
BACKENDS = ["mmap", "pread", "auto"]


def tensor_of(dtype: torch.dtype) -> torch.Tensor:
    raw = torch.arange(3 * 6 * dtype.itemsize, dtype=torch.uint8)
    return (raw % 2 if dtype is torch.bool else raw).view(dtype).reshape(3, 6)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tensors = {str(dtype).removeprefix("torch."): tensor_of(dtype) for dtype in TORCH_DTYPES}
    tensors |= {"scalar": torch.tensor(3.5), "none": torch.empty(0, 4), "large": torch.randn(700, 3000)}
    safetensors.torch.save_file(tensors, tmp_path / "all.safetensors", metadata={"format": "pt", "k": "v"})
    return tmp_path / "all.safetensors"


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    return request.param


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_load_file_gives_what_safetensors_gives(path: Path, backend: Any) -> None:
    wanted, got = safetensors.torch.load_file(path), load_file(path, backend=backend)
    assert list(got) == list(wanted)
    for name, tensor in wanted.items():
        assert (got[name].dtype, got[name].shape, got[name].device) == (tensor.dtype, tensor.shape, tensor.device)
        assert raw(got[name]) == raw(tensor), name
        assert got[name].is_contiguous()
        assert not got[name].requires_grad


def test_a_cold_file_is_read_past_the_cache(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = safetensors.torch.load_file(path)["large"].clone()
    told: list[float] = []

    def cold(fd: int, size: int) -> float:
        told.append(residency.cached_fraction(fd, size))
        return 0.1

    monkeypatch.setattr(files, "cached_fraction", cold)
    monkeypatch.setattr(direct, "BLOCK_BYTES", 64 << 10)
    monkeypatch.setattr(direct, "WINDOW_BYTES", 512 << 10)
    got = load_file(path)
    assert torch.equal(got["large"], wanted)
    assert told == [1.0], "the file was just written"
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "all.safetensors" in line]
    assert mapped == []


def test_writing_to_a_tensor_changes_no_file(path: Path, backend: Any) -> None:
    before = path.read_bytes()
    load_file(path, backend=backend)["large"].fill_(7)
    assert path.read_bytes() == before


def test_tensors_hold_no_descriptor(path: Path, backend: Any) -> None:
    before = open_descriptors()
    kept = [load_file(path, backend=backend) for _ in range(8)]
    assert open_descriptors() <= before
    assert torch.equal(kept[0]["large"], kept[7]["large"])


def test_an_empty_tensor_of_packed_values_is_loaded(tmp_path: Path, backend: Any) -> None:
    entries = {"none": {"dtype": "F4", "shape": [3, 0], "data_offsets": [0, 0]}}
    header = json.dumps(entries).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    got = load_file(tmp_path / "a.safetensors", backend=backend)
    wanted = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert (got["none"].shape, got["none"].dtype) == (wanted["none"].shape, wanted["none"].dtype)


def test_numpy_gives_what_safetensors_gives(tmp_path: Path, backend: Any) -> None:
    names = ["F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8"]
    kinds = {"F": "float", "I": "int", "U": "uint"}
    arrays = {n: np.arange(12).reshape(3, 4).astype(f"{kinds[n[0]]}{n[1:]}") for n in names}
    arrays |= {"BOOL": np.array([True, False]), "C64": np.array([1 + 2j], np.complex64), "s": np.array(2.0)}
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors")
    wanted = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    got = load_numpy(tmp_path / "a.safetensors", backend=backend)
    assert list(got) == list(wanted)
    for name, array in wanted.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape)
        assert got[name].tobytes() == array.tobytes()
        assert got[name].flags.writeable
        assert got[name].flags.aligned


def test_numpy_names_the_tensor_that_it_cannot_have(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    with pytest.raises(InvalidInputError, match="numpy has no dtype for BF16") as caught:
        load_numpy(tmp_path / "a.safetensors")
    assert caught.value.where == f"{tmp_path}/a.safetensors: tensor 'w'"


def test_a_misaligned_tensor_is_right_and_aligned(tmp_path: Path, backend: Any) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    data = safetensors_bytes({"odd": ("U8", [1], b"x"), "floats": ("F32", [3, 4], values.tobytes())})
    (tmp_path / "a.safetensors").write_bytes(data)
    got = load_file(tmp_path / "a.safetensors", backend=backend)["floats"]
    assert torch.equal(got, torch.from_numpy(values))
    assert got.data_ptr() % 4 == 0
    with safe_open(tmp_path / "a.safetensors", "pt", backend=backend) as file:
        assert torch.equal(file.get_slice("floats")[:, 1:3], torch.from_numpy(values)[:, 1:3])
    assert np.array_equal(load_numpy(tmp_path / "a.safetensors", backend=backend)["floats"], values)


class TestSafeOpen:
    def test_it_tells_what_safetensors_tells(self, path: Path) -> None:
        with safetensors.safe_open(path, "pt") as theirs, safe_open(path, "pt") as ours:
            assert ours.keys() == theirs.keys()
            assert ours.offset_keys() == theirs.offset_keys()
            assert ours.metadata() == theirs.metadata() == {"format": "pt", "k": "v"}
            assert raw(ours.get_tensor("large")) == raw(theirs.get_tensor("large"))
            mine, their = ours.get_slice("large"), theirs.get_slice("large")
            assert (mine.get_shape(), mine.get_dtype()) == (their.get_shape(), their.get_dtype())
            assert list(ours.get_tensors()) == list(theirs.get_tensors())

    def test_without_metadata_there_is_none(self, tmp_path: Path) -> None:
        safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
        with safe_open(tmp_path / "a.safetensors", "pt") as file:
            assert file.metadata() is None
        data = framed(b'{"__metadata__":{},"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x")
        (tmp_path / "b.safetensors").write_bytes(data)
        with safetensors.safe_open(tmp_path / "b.safetensors", "pt") as theirs:
            assert theirs.metadata() == {}
        with safe_open(tmp_path / "b.safetensors", "pt") as file:
            assert file.metadata() == {}

    @pytest.mark.parametrize(
        "index",
        [
            slice(None), 0, -1, slice(1, 3), (slice(None), slice(None, None, 2)), (1, 2), ..., (..., slice(1, 3)),
            None, [0, 2], (slice(None), [1, 3]), slice(2, 100), slice(-2, None), slice(3, 1), (),
            torch.tensor([0, 1]),
            (slice(100, 400), slice(7, 2000)), (slice(None), -1), (slice(None, None, 100), slice(5, 6)),
        ],
        ids=str,
    )  # fmt: skip
    @pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
    def test_slices_are_those_of_safetensors(self, path: Path, index: Any, backend: Any) -> None:
        with safetensors.safe_open(path, "pt") as theirs, safe_open(path, "pt", backend=backend) as ours:
            wanted, got = theirs.get_slice("large")[index], ours.get_slice("large")[index]
        assert got.shape == wanted.shape
        assert torch.equal(got, wanted)

    @pytest.mark.parametrize("index", [700, -701, (0, 3000), (slice(None),) * 3])
    def test_a_slice_outside_raises_as_theirs(self, path: Path, index: Any) -> None:
        with safetensors.safe_open(path, "pt") as theirs, pytest.raises(IndexError):
            theirs.get_slice("large")[index]
        with safe_open(path, "pt") as ours, pytest.raises(IndexError):
            ours.get_slice("large")[index]

    def test_numpy_slices(self, path: Path, backend: Any) -> None:
        wanted = safetensors.torch.load_file(path)["large"].numpy()
        with safe_open(path, "np", backend=backend) as file:
            piece = file.get_slice("large")
            assert np.array_equal(piece[10:20, ::7], wanted[10:20, ::7])
            assert np.array_equal(piece[::-1], wanted[::-1])
            assert piece[3, 4] == wanted[3, 4]

    def test_a_slice_of_a_cold_file_reads_only_its_bytes(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wanted = safetensors.torch.load_file(path)["large"].clone()
        read: list[tuple[int, int]] = []
        preadv = os.preadv

        def noted(fd: int, buffers: Any, offset: int) -> int:
            read.append((offset, len(buffers[0])))
            return preadv(fd, buffers, offset)

        with safe_open(path, "pt", backend="pread") as file:
            monkeypatch.setattr("os.preadv", noted)
            got = file.get_slice("large")[100:150]
        assert torch.equal(got, wanted[100:150])
        assert 0 < sum(length for _, length in read) <= 50 * 3000 * 4 + 2 * direct.ALIGNMENT

    def test_what_it_gave_outlives_it_and_afterwards_it_is_closed(self, path: Path, backend: Any) -> None:
        with safe_open(path, "pt", backend=backend) as file:
            tensor, piece = file.get_tensor("large"), file.get_slice("large")
        path.unlink()
        gc.collect()
        assert tensor.sum().isfinite()
        with pytest.raises(InvalidInputError, match="closed"):
            file.get_tensor("large")
        with pytest.raises(InvalidInputError, match="closed"):
            piece[0]

    def test_unknown_names_frameworks_and_devices_are_refused(self, path: Path) -> None:
        with safe_open(path, "pt") as file, pytest.raises(NotFoundError, match="missing"):
            file.get_tensor("missing")
        with pytest.raises(InvalidInputError, match="framework 'tf'"):
            safe_open(path, "tf")
        with pytest.raises(InvalidInputError, match="numpy has no device"):
            safe_open(path, "np", device="cuda")
        for device in ("rocket", 0 if not torch.cuda.is_available() else "cuda:77"):
            with pytest.raises(InvalidInputError, match="no device"):
                load_file(path, device=device)


class TestBadFiles:
    @pytest.mark.parametrize(
        "data", [b"", b"abc", b"version https://git-lfs.github.com/spec/v1", b"\5" + b"\0" * 7]
    )
    def test_what_safetensors_refuses_is_refused_by_name(self, tmp_path: Path, data: bytes) -> None:
        bad = tmp_path / "bad.safetensors"
        bad.write_bytes(data)
        with pytest.raises(safetensors.SafetensorError):
            safetensors.torch.load_file(bad)
        with pytest.raises(CorruptContentError, match=r"bad\.safetensors"):
            load_file(bad)

    @pytest.mark.parametrize("change", [-1, 1])
    def test_a_wrong_length_is_refused(self, path: Path, change: int) -> None:
        data = path.read_bytes()
        path.write_bytes(data[:-1] if change < 0 else data + b"x")
        with pytest.raises(CorruptContentError):
            load_file(path)

    def test_missing_files_and_directories_raise_as_open_does(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            load_file(tmp_path / "missing.safetensors")
        with pytest.raises(IsADirectoryError):
            load_file(tmp_path)

    def test_a_file_that_is_cut_while_it_is_read_is_an_error(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        preadv = os.preadv
        size = path.stat().st_size

        def cut(fd: int, buffers: Any, offset: int) -> int:
            os.truncate(path, size - direct.ALIGNMENT * 300)
            return preadv(fd, buffers, offset)

        with safe_open(path, "pt", backend="pread") as file:
            opened = file.get_slice("large")
            monkeypatch.setattr("os.preadv", cut)
            with pytest.raises(CorruptContentError, match="cut while it was read"):
                opened[:]

    def test_a_file_that_is_replaced_after_its_header_is_an_error(self, path: Path, backend: Any) -> None:
        with safe_open(path, "pt", backend=backend) as file:
            data = path.read_bytes()
            path.unlink()
            path.write_bytes(data)
            with pytest.raises(CorruptContentError, match="changed or replaced"):
                file.get_tensor("large")

    def test_a_read_error_ends_the_load(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(_fd: int, _buffers: Any, _offset: int) -> int:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr("os.preadv", fail)
        with pytest.raises(OSError, match="Input/output"):
            load_file(path, backend="pread")


class TestDirectReads:
    def test_a_file_system_without_direct_reads_is_read_through_its_cache(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wanted = safetensors.torch.load_file(path)["large"].clone()
        opened = os.open

        def refuse(file: Any, flags: int, *rest: Any) -> int:
            if flags & os.O_DIRECT:
                raise OSError(22, "Invalid argument")
            return opened(file, flags, *rest)

        monkeypatch.setattr("os.open", refuse)
        assert torch.equal(load_file(path, backend="pread")["large"], wanted)

    def test_one_that_refuses_only_the_read_as_well(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        wanted = safetensors.torch.load_file(path)["large"].clone()
        preadv = os.preadv

        def refuse(fd: int, buffers: Any, offset: int) -> int:
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(22, "Invalid argument")
            return preadv(fd, buffers, offset)

        monkeypatch.setattr("os.preadv", refuse)
        assert torch.equal(load_file(path, backend="pread")["large"], wanted)

    def test_what_is_read_ahead_is_bounded_and_dropped_tensors_free_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        each = 256 << 10
        tensors = {f"t{i:02}": torch.full((each // 4,), float(i)) for i in range(40)}
        safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
        monkeypatch.setattr(direct, "WINDOW_BYTES", each)
        made: list[int] = []
        memory = direct._memory

        def noted(size: int, *, is_dense: bool) -> memoryview:
            made.append(size)
            return memory(size, is_dense=is_dense)

        monkeypatch.setattr(direct, "_memory", noted)
        source = files.FileSource([files.DiskFile.look(tmp_path / "a.safetensors", "a")], backend="pread")
        plan = files.LoadPlan(
            tensors=tuple(files.PlannedTensor(file=0, path="a", entry=entry) for entry in source.header(0).tensors)
        )
        windows, _ = direct.plan_windows(plan)
        disk = [files.DiskFile.look(tmp_path / "a.safetensors", "a")]
        reader = direct.DirectReader(disk, windows, ahead_bytes_max=4 * each)
        for number in range(len(windows)):
            reader.take(number)
            # The limit is looked at before a window is begun, so one more may be.
            assert len(made) - (number + 1) <= 5
        reader.close()
        assert len(made) == len(windows) == 40

    def test_a_cast_holds_a_bounded_part_of_the_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        each = 256 << 10
        tensors = {f"t{i:02}": torch.full((each // 4,), float(i)) for i in range(40)}
        safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
        monkeypatch.setattr(direct, "WINDOW_BYTES", each)
        bounds = {"threads": 4, "ahead_bytes_max": 3 * each}
        monkeypatch.setattr(direct.DirectReader.__init__, "__kwdefaults__", bounds)
        owners: list[weakref.ref[Any]] = []
        memory = direct._memory

        def noted(size: int, *, is_dense: bool) -> memoryview:
            view = memory(size, is_dense=is_dense)
            owners.append(weakref.ref(view.obj))
            return view

        monkeypatch.setattr(direct, "_memory", noted)
        source = files.FileSource([files.DiskFile.look(tmp_path / "a.safetensors", "a")], backend="pread")
        plan = plan_of(source, Request())
        halves = {}
        for name, tensor in stream(source, plan, CpuDevice(), floating_to(torch.float16)):
            halves[name] = tensor
            # Three ahead, and the one whose tensor is being cast.
            assert sum(owner() is not None for owner in owners) <= 4
        assert len(owners) == 40
        assert {name: tensor[0].item() for name, tensor in halves.items()} == {f"t{i:02}": i for i in range(40)}

    def test_fewer_threads_than_wanted_read_all_of_it(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(direct, "WINDOW_BYTES", 1)
        monkeypatch.setattr(direct.DirectReader.__init__, "__kwdefaults__", {"threads": 8, "ahead_bytes_max": 1})
        start, started, room = threading.Thread.start, [0], 2

        def limited(thread: threading.Thread) -> None:
            if started[0] == room:
                raise RuntimeError("can't start new thread")
            started[0] += 1
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", limited)
        wanted, got = safetensors.torch.load_file(path), load_file(path, backend="pread")
        assert {name: raw(tensor) for name, tensor in got.items()} == {n: raw(t) for n, t in wanted.items()}
        started[0], room = 0, 0
        with pytest.raises(StorageFullError, match="no thread"):
            load_file(path, backend="pread")
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("weights")]

    def test_a_load_that_is_given_up_ends_its_threads(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(direct, "WINDOW_BYTES", 1)
        source = files.FileSource([files.DiskFile.look(path, "a")], backend="pread")
        plan = plan_of(source, Request())
        windows, _ = direct.plan_windows(plan)
        reader = direct.DirectReader([files.DiskFile.look(path, "a")], windows, ahead_bytes_max=1)
        reader.take(0)
        closing = threading.Thread(target=reader.close, daemon=True)
        closing.start()
        closing.join(30)
        assert not closing.is_alive()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("weights")]


class TestResidency:
    def test_a_written_file_is_cached_and_a_dropped_one_is_not(self, tmp_path: Path) -> None:
        size = 16 << 20
        (tmp_path / "f").write_bytes(b"x" * size)
        with (tmp_path / "f").open("rb") as opened:
            fd = opened.fileno()
            assert residency.cached_fraction(fd, size) == 1.0
            assert residency.sampled_fraction(fd, size) == 1.0
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if residency._cached_pages(fd) > 0:
                pytest.skip("this file system keeps everything in memory")
            assert residency.cached_fraction(fd, size) < 0.5

    def test_pages_that_lie_at_another_inode_are_found_by_reading(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(residency, "_cached_pages", lambda _fd: 0)
        (tmp_path / "f").write_bytes(b"x" * (1 << 20))
        with (tmp_path / "f").open("rb") as opened:
            assert residency.cached_fraction(opened.fileno(), 1 << 20) == 1.0

    def test_what_cannot_tell_counts_as_cached(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def unknown(_fd: int) -> int:
            raise OSError(38, "no such call")

        def unsupported(_fd: int, _buffers: Any, _offset: int, _flags: int) -> int:
            raise OSError(95, "not supported")

        monkeypatch.setattr(residency, "_cached_pages", unknown)
        monkeypatch.setattr("os.preadv", unsupported)
        with (tmp_path / "f").open("w+b") as opened:
            assert residency.cached_fraction(opened.fileno(), 100) == 1.0
        assert residency.cached_fraction(0, 0) == 1.0


class TestDirectory:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        for shard in (1, 2, 10):
            name = f"model-{shard:05}-of-00010.safetensors"
            safetensors.torch.save_file({f"t{shard}": torch.full((4,), float(shard))}, tmp_path / name)
        return tmp_path

    def index(self, model: Path, **weight_map: str) -> None:
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def test_all_files_in_load_order(self, model: Path, backend: Any) -> None:
        got = load_directory(model, backend=backend)
        assert {name: tensor[0].item() for name, tensor in got.items()} == {"t1": 1, "t2": 2, "t10": 10}
        assert list(got) == ["t1", "t2", "t10"]

    def test_an_index_says_which_files(self, model: Path) -> None:
        self.index(model, t1="model-00001-of-00010.safetensors", t10="model-00010-of-00010.safetensors")
        assert list(load_directory(model)) == ["t1", "t10"]

    def test_the_same_weights_under_other_names_are_left_out(self, model: Path) -> None:
        safetensors.torch.save_file({"other": torch.ones(1)}, model / "consolidated.safetensors")
        assert list(load_directory(model)) == ["t1", "t2", "t10"]

    def test_a_missing_shard_and_a_broken_promise_are_named(self, model: Path) -> None:
        self.index(model, t1="model-00001-of-00010.safetensors", t3="model-00003-of-00010.safetensors")
        with pytest.raises(NotFoundError, match="model-00003-of-00010"):
            load_directory(model)
        self.index(model, t1="model-00001-of-00010.safetensors", t2="model-00001-of-00010.safetensors")
        with pytest.raises(CorruptContentError, match="t2"):
            load_directory(model)

    @pytest.mark.parametrize("text", ["", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../x"}}'])
    def test_a_bad_index_is_refused(self, model: Path, text: str) -> None:
        (model / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CorruptContentError):
            load_directory(model)

    def test_no_files_or_no_directory(self, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError):
            load_directory(tmp_path)
        with pytest.raises(NotFoundError):
            load_directory(tmp_path / "missing")


def test_the_package_loads_no_framework_until_it_is_needed(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"w": np.ones(3, np.float32)}, tmp_path / "a.safetensors")
    program = (
        "import sys, snowdrop.weights as w; w.load_file, w.safe_open, w.load_directory, w.LoadedModel; "
        "assert not {'torch', 'numpy', 'anyio', 'aiohttp'} & set(sys.modules); "
        "from snowdrop.weights.numpy import load_file; print(load_file(sys.argv[1])['w'].sum()); "
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "a.safetensors")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "3.0\n"

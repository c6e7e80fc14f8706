import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from content_helpers import HandedOver, filled_area, safetensors_bytes
from snowdrop.content.ingest import push_directory
from snowdrop.content.layout import PUBLIC_DOMAIN, manifest_key
from snowdrop.content.manifest import decode_manifest
from snowdrop.content.origin import MemoryOrigin
from snowdrop.domain.errors import CorruptContentError, InvalidInputError, NotFoundError
from snowdrop.domain.ids import DEFAULT_TENANT
from snowdrop.domain.manifest import Manifest
from snowdrop.weights.loaded import LoadedModel
from snowdrop.wire.replica import AreaFile, ModelHandle

DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.uint16,
]  # fmt: skip


def tensor_of(dtype: torch.dtype) -> torch.Tensor:
    raw = torch.arange(3 * 5 * dtype.itemsize, dtype=torch.uint8)
    return (raw % 2 if dtype is torch.bool else raw % 100).view(dtype).reshape(3, 5)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    root.mkdir()
    tensors = {str(dtype).removeprefix("torch."): tensor_of(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(3.5), "none": torch.empty(0, 4), "large": torch.randn(600, 1000)}
    save_file(tensors, root / "model-00001-of-00002.safetensors")
    save_file({"weight": torch.randn(4, 3), "bias": torch.randn(4)}, root / "model-00002-of-00002.safetensors")
    (root / "config.json").write_text("{}")
    return root


def manifest_of(source: Path) -> Manifest:
    origin = MemoryOrigin()
    digest = push_directory(source, origin, kind="model", tenant=DEFAULT_TENANT).artefact.manifest
    return decode_manifest(origin.objects[manifest_key(PUBLIC_DOMAIN, digest)])


def from_area(source: Path, wait: list[str]) -> LoadedModel:
    """The model through a landing area, as a replica gets it."""
    area = filled_area(manifest_of(source), source)
    given = HandedOver(area, source)
    model = LoadedModel.from_handle(
        given.handle,
        given.fds,
        wait_directory=lambda: wait.append("waited"),
        renew=no_renewal,
        wait_s_max=0,
    )
    given.close()
    return model


def no_renewal() -> tuple[ModelHandle, tuple[int, ...]]:
    raise AssertionError("nothing was lost")


@pytest.fixture(params=["area", "directory"])
def model(source: Path, request: pytest.FixtureRequest) -> LoadedModel:
    return from_area(source, []) if request.param == "area" else LoadedModel.from_directory(source)


@pytest.fixture
def expected(source: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for path in sorted(source.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    # As bytes: NaNs are equal to themselves, and every dtype can be compared.
    return torch.equal(
        left.contiguous().reshape(-1).view(torch.uint8), right.contiguous().reshape(-1).view(torch.uint8)
    )


def test_tensors_equal_those_of_safetensors(model: LoadedModel, expected: dict[str, torch.Tensor]) -> None:
    got = model.state_dict()
    assert got.keys() == expected.keys()
    assert [name for name in got if not same(got[name], expected[name])] == []


def test_tensors_come_in_load_order(model: LoadedModel) -> None:
    names = [name for name, _ in model.tensors()]
    assert set(names[-2:]) == {"weight", "bias"}
    assert [name for name, _ in model.tensors(file="model-00002-of-00002.safetensors")] == names[-2:]


def test_tensors_share_the_mapping_and_outlive_the_model(source: Path, expected: dict[str, torch.Tensor]) -> None:
    model = from_area(source, [])
    one, two = model.state_dict()["large"], model.state_dict()["large"]
    assert one.data_ptr() == two.data_ptr()
    del model, two
    gc.collect()
    assert same(one, expected["large"])


def test_writing_to_a_tensor_changes_no_file(source: Path, model: LoadedModel) -> None:
    before = (source / "model-00002-of-00002.safetensors").read_bytes()
    model.state_dict()["weight"].fill_(7)
    assert (source / "model-00002-of-00002.safetensors").read_bytes() == before


def test_a_tensor_that_its_file_misaligns_is_right(tmp_path: Path) -> None:
    values = torch.arange(5, dtype=torch.float32)
    data = safetensors_bytes({"odd": ("U8", [1], b"x"), "floats": ("F32", [5], values.numpy().tobytes())})
    (tmp_path / "a.safetensors").write_bytes(data)
    assert torch.equal(LoadedModel.from_directory(tmp_path).state_dict()["floats"], values)


def test_a_module_on_the_meta_device_gets_the_tensors_themselves(model: LoadedModel) -> None:
    with torch.device("meta"):
        module = torch.nn.Linear(3, 4)
    model.load_into(module, file="model-00002-of-00002.safetensors")
    tensors = model.state_dict(file="model-00002-of-00002.safetensors")
    assert module.weight.data_ptr() == tensors["weight"].data_ptr()
    assert module.weight.requires_grad
    assert torch.equal(module(torch.ones(3)), tensors["weight"].sum(1) + tensors["bias"])


def test_strict_loading_refuses_what_does_not_fit(model: LoadedModel) -> None:
    module = torch.nn.Linear(3, 4)
    with pytest.raises(RuntimeError, match="large"):
        model.load_into(module)
    assert "large" in model.load_into(module, strict=False).unexpected_keys


def test_numpy_gives_the_same_values_and_refuses_bfloat16_by_name(model: LoadedModel) -> None:
    arrays = model.numpy(file="model-00002-of-00002.safetensors")
    assert torch.equal(torch.from_numpy(arrays["weight"]), model.state_dict()["weight"])
    with pytest.raises(InvalidInputError, match="numpy has no dtype"):
        model.numpy()


def test_small_files_do_not_wait_and_the_directory_does_once(source: Path) -> None:
    waited: list[str] = []
    model = from_area(source, waited)
    assert model.file("config.json").read_text() == "{}"
    list(model.tensors())
    assert waited == []
    assert model.file("model-00001-of-00002.safetensors").exists()
    assert model.path == source
    assert waited == ["waited"]


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", ""])
def test_a_file_outside_of_the_model_is_refused(model: LoadedModel, path: str) -> None:
    with pytest.raises(InvalidInputError):
        model.file(path)


def test_missing_files_are_not_found(model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        model.file("missing.json")
    with pytest.raises(NotFoundError, match="no tensor file"):
        model.state_dict(file="missing.safetensors")
    with pytest.raises(NotFoundError):
        LoadedModel.from_directory(tmp_path / "missing")


def test_one_name_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"t": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    model = LoadedModel.from_directory(tmp_path)
    with pytest.raises(InvalidInputError, match="more than one file"):
        model.state_dict()
    assert list(model.state_dict(file="b.safetensors")) == ["t"]


def test_a_truncated_or_empty_file_is_named(tmp_path: Path) -> None:
    save_file({"t": torch.ones(200)}, tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(data[:-4])
    with pytest.raises(CorruptContentError) as caught:
        LoadedModel.from_directory(tmp_path).state_dict()
    assert caught.value.where == "a.safetensors: tensor 't'"
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(CorruptContentError, match="empty"):
        LoadedModel.from_directory(tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "missing")
    with pytest.raises(NotFoundError, match=r"a\.safetensors cannot be read: No such file"):
        LoadedModel.from_directory(tmp_path)


def test_a_handle_that_points_outside_of_its_area_is_refused(source: Path) -> None:
    given = HandedOver(filled_area(manifest_of(source), source), source)
    handle = msgspec.structs.replace(given.handle, area_files=(AreaFile("a", 0, 1 << 40),))
    with pytest.raises(CorruptContentError):
        LoadedModel.from_handle(handle, given.fds, wait_directory=lambda: None, renew=no_renewal, wait_s_max=0)
    given.close()


def test_a_failed_wait_is_raised_and_tried_again(source: Path) -> None:
    answers: Iterator[Exception | None] = iter([NotFoundError("gone"), None])

    def wait() -> None:
        error = next(answers)
        if error is not None:
            raise error

    model = LoadedModel("m", source, [], wait)
    with pytest.raises(NotFoundError):
        _ = model.path
    assert model.path == source


def test_importing_it_loads_no_framework() -> None:
    program = "import sys, snowdrop.weights.loaded; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "numpy", "anyio", "asyncio", "aiohttp"} & set(loaded)

"""Loading into modules: what fits, what is shared, and that nothing is half-done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

from snowdrop.domain.errors import ErrorBody, IntegrityError, InvalidInputError, error_from_body
from snowdrop.weights.into import ModuleMismatchError
from snowdrop.weights.loaded import LoadedModel
from weights_helpers import FillingArea


class Net(nn.Module):
    def __init__(self, *, is_tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 8, bias=False)
        if is_tied:
            self.head.weight = self.embed.weight


def on_meta(**options: Any) -> Net:
    with torch.device("meta"):
        return Net(**options)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in Net().state_dict().items()}


def saved(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> LoadedModel:
    save_file(tensors, tmp_path / "model.safetensors")
    return LoadedModel.from_directory(tmp_path)


def test_every_parameter_and_buffer_gets_its_tensor(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    module = on_meta()
    keys = saved(tmp_path, weights).load_into(module)
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
    state = module.state_dict()
    assert {name: torch.equal(state[name], weights[name]) for name in weights} == dict.fromkeys(weights, True)
    assert module.head.weight.requires_grad
    assert module.norm.num_batches_tracked.dtype == torch.int64


def test_floats_are_cast_to_the_dtype_asked_or_to_that_of_the_module(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    model = saved(tmp_path, {n: v.bfloat16() if v.is_floating_point() else v for n, v in weights.items()})
    plain, half, own = on_meta(), on_meta(), on_meta()
    model.load_into(plain)
    model.load_into(half, dtype=torch.float16)
    model.load_into(own, dtype="module")
    assert [m.embed.weight.dtype for m in (plain, half, own)] == [torch.bfloat16, torch.float16, torch.float32]
    assert {m.norm.num_batches_tracked.dtype for m in (plain, half, own)} == {torch.int64}
    assert torch.equal(own.embed.weight, weights["embed.weight"].bfloat16().float())
    with pytest.raises(InvalidInputError, match=r"not cast to torch\.int8"):
        model.load_into(on_meta(), dtype=torch.int8)


class TestMismatches:
    @pytest.fixture
    def area(self, weights: dict[str, torch.Tensor]) -> Iterator[FillingArea]:
        area = FillingArea({"model.safetensors": save(weights)}, chunk_bytes=None)
        area.fill(0)  # the header, and nothing else
        yield area
        area.close()

    def model(self, area: FillingArea) -> LoadedModel:
        return LoadedModel("m", Path("/nowhere"), area.source(), lambda: None)

    def test_a_wrong_shape_is_named_before_any_tensor_came(self, area: FillingArea) -> None:
        module = on_meta()
        with torch.device("meta"):
            module.embed = nn.Embedding(9, 4)
            module.norm = nn.BatchNorm1d(5)
        with pytest.raises(ModuleMismatchError) as caught:
            self.model(area).load_into(module)
        problems = {field["name"]: field["problem"] for field in caught.value.fields}
        assert problems["embed.weight"] == "shape [8, 4] in the file, [9, 4] in the module"
        assert {"norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"} <= problems.keys()
        assert "head.weight" not in problems
        assert all(field["file"] == "model.safetensors" for field in caught.value.fields)
        assert not area.writer.filled[-1]

    def test_another_kind_of_dtype_is_named(self, area: FillingArea) -> None:
        module = on_meta()
        module.norm.num_batches_tracked = torch.tensor(0.5, device="meta")
        with pytest.raises(ModuleMismatchError, match=r"num_batches_tracked: torch\.int64 in the file"):
            self.model(area).load_into(module)

    def test_missing_and_unexpected_names_are_named_if_strict(
        self, area: FillingArea, weights: dict[str, torch.Tensor]
    ) -> None:
        module = on_meta()
        del module.head
        module.tail = nn.Linear(2, 2, device="meta")
        with pytest.raises(RuntimeError, match=r"head\.weight: unexpected") as caught:
            self.model(area).load_into(module)
        assert "tail.bias: missing" in str(caught.value)
        area.fill_all()
        keys = self.model(area).load_into(module, strict=False)
        assert keys.unexpected_keys == ["head.weight"]
        assert keys.missing_keys == ["tail.weight", "tail.bias"]
        assert torch.equal(module.embed.weight, weights["embed.weight"])

    def test_a_failure_in_the_middle_leaves_the_module_as_it_was(self, area: FillingArea) -> None:
        module = on_meta()
        area.fail(ErrorBody(kind="integrity", message="a chunk is wrong"))
        with pytest.raises(IntegrityError):
            self.model(area).load_into(module)
        assert all(value.is_meta for value in module.state_dict().values())

    def test_the_error_travels_as_invalid_input(self) -> None:
        error = ModuleMismatchError("no", where="here")
        assert type(error_from_body(error.body())) is InvalidInputError


class TestTied:
    def test_a_name_that_the_files_lack_gets_the_parameter_that_it_shares(
        self, tmp_path: Path, weights: dict[str, torch.Tensor]
    ) -> None:
        for missing, there in (("head.weight", "embed.weight"), ("embed.weight", "head.weight")):
            module = on_meta(is_tied=True)
            folder = tmp_path / missing
            folder.mkdir()
            saved(folder, {n: v for n, v in weights.items() if n != missing}).load_into(module)
            assert module.head.weight is module.embed.weight
            assert torch.equal(module.head.weight, weights[there])
            assert module.head.weight.requires_grad

    def test_both_names_with_the_same_values_stay_one_parameter(
        self, tmp_path: Path, weights: dict[str, torch.Tensor]
    ) -> None:
        module = on_meta(is_tied=True)
        weights["head.weight"] = weights["embed.weight"].clone()
        saved(tmp_path, weights).load_into(module)
        assert module.head.weight is module.embed.weight

    def test_the_same_nan_under_both_names_is_the_same_value(
        self, tmp_path: Path, weights: dict[str, torch.Tensor]
    ) -> None:
        module = on_meta(is_tied=True)
        weights["embed.weight"][0] = float("nan")
        weights["head.weight"] = weights["embed.weight"].clone()
        saved(tmp_path, weights).load_into(module)
        assert module.head.weight is module.embed.weight

    def test_different_values_for_one_parameter_are_refused(
        self, tmp_path: Path, weights: dict[str, torch.Tensor]
    ) -> None:
        module = on_meta(is_tied=True)
        with pytest.raises(ModuleMismatchError, match="shares one parameter"):
            saved(tmp_path, weights).load_into(module)
        assert all(value.is_meta for value in module.state_dict().values())

    def test_casting_keeps_the_tie(self, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
        module = on_meta(is_tied=True)
        weights["head.weight"] = weights["embed.weight"].clone()
        saved(tmp_path, weights).load_into(module, dtype=torch.bfloat16)
        assert module.head.weight is module.embed.weight
        assert module.head.weight.dtype == torch.bfloat16

    def test_a_frozen_parameter_stays_frozen(self, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
        module = on_meta(is_tied=True)
        module.embed.weight.requires_grad_(False)
        del weights["head.weight"]
        saved(tmp_path, weights).load_into(module)
        assert not module.head.weight.requires_grad


class Renaming(nn.Module):
    """Loads its state in a way of its own, as quantised modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        state[prefix + "scale"] = state.pop(prefix + "old_name")[0]
        super()._load_from_state_dict(state, prefix, *rest)


def test_a_module_with_its_own_way_of_loading_is_left_to_it(tmp_path: Path) -> None:
    module = nn.Sequential(Renaming(), nn.Linear(2, 2))
    tensors = {"0.old_name": torch.full((5, 3), 7.0), "1.weight": torch.ones(2, 2), "1.bias": torch.ones(2)}
    saved(tmp_path, tensors).load_into(module)
    assert module[0].scale.tolist() == [7.0] * 3
    save_file(tensors | {"1.weight": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(ModuleMismatchError, match=r"1\.weight: shape"):
        LoadedModel.from_directory(tmp_path).load_into(module)


def test_lazy_modules_take_their_shape_from_the_file(tmp_path: Path) -> None:
    module = nn.LazyLinear(3)
    saved(tmp_path, {"weight": torch.ones(3, 5), "bias": torch.ones(3)}).load_into(module)
    assert module.weight.shape == (3, 5)

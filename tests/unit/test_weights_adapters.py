import json
from collections.abc import Callable
from pathlib import Path

import pytest

from snowdrop.domain.errors import CorruptContentError, NotFoundError
from snowdrop.weights.adapters.files import INDEX, weight_files
from snowdrop.weights.adapters.transformers import pretrained
from snowdrop.weights.adapters.vllm import check_loaded, offer, weights_of
from snowdrop.weights.loaded import LoadedModel

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama in several files."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=128
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
    assert (folder / INDEX).is_file()
    return folder


def same(one: object, other: object) -> bool:
    question = torch.tensor([[1, 2, 3]])
    return bool(torch.equal(one(question).logits, other(question).logits))  # type: ignore[operator]


def test_transformers_makes_the_same_model_from_the_tensors(llama: Path) -> None:
    expected = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    model = LoadedModel.from_directory(llama)
    for kind in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
        made = pretrained(kind, model)
        assert type(made) is transformers.LlamaForCausalLM
        assert made.dtype == torch.bfloat16
        assert not made.training
        assert same(made, expected)
    assert pretrained(transformers.AutoModelForCausalLM, model, dtype=torch.float32).dtype == torch.float32


def test_weights_for_vllm_are_all_tensors_in_load_order(llama: Path) -> None:
    model = LoadedModel.from_directory(llama)
    found = dict(weights_of(str(llama)))
    assert list(found) == model.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.tensors())
    with pytest.raises(NotFoundError, match="needs a directory"):
        next(weights_of("org/name"))


def test_an_offered_model_is_read_where_it_is(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LoadedModel.from_directory(llama)
    asked: list[str | None] = []
    tensors = model.tensors

    def counted(**options: str | None) -> object:
        asked.append(options["file"])
        return tensors(**options)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "tensors", counted)
    assert offer(model) == str(llama)
    assert len(list(weights_of(str(llama)))) == len(model.keys())
    assert asked == weight_files(llama)


def test_parameters_that_no_file_has_are_an_error_but_not_of_a_quantised_model() -> None:
    check_loaded({"a", "b"}, {"a", "b", "c"}, is_quantized=False)
    check_loaded({"a"}, None, is_quantized=False)
    check_loaded({"a"}, set(), is_quantized=True)
    with pytest.raises(CorruptContentError, match="'b'"):
        check_loaded({"a", "b"}, {"a"}, is_quantized=False)


@pytest.mark.parametrize(
    ("names", "index", "expected"),
    [
        (["b.safetensors", "a.safetensors", "c.bin"], None, ["a.safetensors", "b.safetensors"]),
        (["a.safetensors", "consolidated.safetensors"], None, ["a.safetensors"]),
        (["consolidated.safetensors"], None, ["consolidated.safetensors"]),
        (["a.safetensors", "other.safetensors"], {"x": "a.safetensors", "y": "a.safetensors"}, ["a.safetensors"]),
    ],
)
def test_which_files_are_the_weights(
    tmp_path: Path, names: list[str], index: dict[str, str] | None, expected: list[str]
) -> None:
    for name in names:
        (tmp_path / name).touch()
    if index is not None:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    assert weight_files(tmp_path) == expected


@pytest.mark.parametrize(
    ("write", "error"),
    [
        (lambda folder: None, NotFoundError),
        (lambda folder: (folder / INDEX).write_text("{"), CorruptContentError),
        (
            lambda folder: (folder / INDEX).write_text('{"weight_map": {"x": "../a.safetensors"}}'),
            CorruptContentError,
        ),
    ],
)
def test_a_directory_without_weights_says_so(
    tmp_path: Path, write: Callable[[Path], object], error: type[Exception]
) -> None:
    write(tmp_path)
    with pytest.raises(error):
        weight_files(tmp_path)

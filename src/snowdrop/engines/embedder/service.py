"""A sentence embedder of the BERT family with transformers: mean or first token, as its files say, normalised."""

import json
import os
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModel

import snowdrop as sd
from snowdrop.domain.errors import InvalidInputError, NotFoundError
from snowdrop.weights.adapters.transformers import pretrained

TOKENS_MAX = 512
BATCH_MAX = 64


@sd.service(model=sd.Model("model"), concurrency=8, startup_s_max=900)
class Embedder:
    @sd.startup
    def load(self, model: sd.LoadedModel) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.network = pretrained(AutoModel, model).eval().to(self.device)
        self.tokenizer = Tokenizer.from_file(str(model.file("tokenizer.json")))
        said = settings(model, "sentence_bert_config.json").get("max_seq_length")
        limit = min(int(said or TOKENS_MAX), int(self.network.config.max_position_embeddings or TOKENS_MAX))
        self.tokenizer.enable_truncation(limit)
        self.tokenizer.enable_padding(pad_id=self.network.config.pad_token_id or 0)
        self.by_first_token = bool(settings(model, "1_Pooling/config.json").get("pooling_mode_cls_token"))

    @sd.endpoint("/v1/embeddings")
    def embeddings(self, request: sd.EmbeddingRequest) -> sd.Embeddings:
        """OpenAI's embeddings: one vector of length 1 per text."""
        vectors: list[list[float]] = []
        tokens = 0
        for start in range(0, len(request.texts), BATCH_MAX):
            some, count = self.compute(request.texts[start : start + BATCH_MAX])
            vectors += some
            tokens += count
        if request.dimensions is not None and vectors and request.dimensions != len(vectors[0]):
            raise InvalidInputError(
                f"the vectors of this model have {len(vectors[0])} numbers",
                where="dimensions",
                fields=[{"field": "dimensions", "problem": "cannot be changed for this model"}],
            )
        return sd.Embeddings(vectors=vectors, prompt_tokens=tokens)

    def compute(self, texts: list[str]) -> tuple[list[list[float]], int]:
        """Vectors, and how many tokens the texts have."""
        batch = self.tokenizer.encode_batch(texts)
        ids = torch.tensor([each.ids for each in batch], device=self.device)
        attended = torch.tensor([each.attention_mask for each in batch], device=self.device)
        with torch.inference_mode():
            states = self.network(input_ids=ids, attention_mask=attended).last_hidden_state.float()
            mask = attended.unsqueeze(-1).to(states.dtype)
            pooled = states[:, 0] if self.by_first_token else (states * mask).sum(dim=1) / mask.sum(dim=1)
            vectors: list[list[float]] = torch.nn.functional.normalize(pooled, dim=1).tolist()
        return vectors, int(attended.sum())


def settings(model: sd.LoadedModel, path: str) -> dict[str, Any]:
    """A JSON file of the model; empty if there is none."""
    try:
        found: dict[str, Any] = json.loads(model.file(path).read_text())
    except NotFoundError:
        return {}
    return found

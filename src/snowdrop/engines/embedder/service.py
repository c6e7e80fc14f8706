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
        self.tokenizer.no_padding()  # the file may ask for it
        self.tokens_max = limit
        self.by_first_token = bool(settings(model, "1_Pooling/config.json").get("pooling_mode_cls_token"))

    @sd.endpoint("/v1/embeddings")
    def embeddings(self, request: sd.EmbeddingRequest) -> sd.Embeddings:
        """OpenAI's embeddings: one vector of length 1 per text. Token ids are taken as they are, of this model."""
        given = request.tokens
        ids = self.ids_of(request.texts) if given is None else self.checked(given)
        vectors: list[list[float]] = []
        for start in range(0, len(ids), BATCH_MAX):
            vectors += self.compute(ids[start : start + BATCH_MAX])
        if request.dimensions is not None and vectors and request.dimensions != len(vectors[0]):
            raise InvalidInputError(
                f"the vectors of this model have {len(vectors[0])} numbers",
                where="dimensions",
                fields=[{"field": "dimensions", "problem": "cannot be changed for this model"}],
            )
        return sd.Embeddings(vectors=vectors, prompt_tokens=sum(map(len, ids)))

    def ids_of(self, texts: list[str]) -> list[list[int]]:
        return [each.ids for each in self.tokenizer.encode_batch(texts)]

    def checked(self, tokens: list[list[int]]) -> list[list[int]]:
        """Cut as texts are. Raises InvalidInputError for ids that the model does not have."""
        known = int(self.network.config.vocab_size)
        if any(token >= known for each in tokens for token in each):
            raise InvalidInputError(
                f"token ids of this model are below {known}: these are of another model's vocabulary",
                where="input",
                next_step="send texts, or ids from this model's own tokenizer",
                fields=[{"field": "input", "problem": "not of this model's vocabulary"}],
            )
        return [each[: self.tokens_max] for each in tokens]

    def compute(self, tokens: list[list[int]]) -> list[list[float]]:
        """One vector for each list of token ids."""
        longest, pad = max(map(len, tokens)), self.network.config.pad_token_id or 0
        ids = torch.tensor([each + [pad] * (longest - len(each)) for each in tokens], device=self.device)
        mask = [[1] * len(each) + [0] * (longest - len(each)) for each in tokens]
        attended = torch.tensor(mask, device=self.device)
        with torch.inference_mode():
            states = self.network(input_ids=ids, attention_mask=attended).last_hidden_state.float()
            mask = attended.unsqueeze(-1).to(states.dtype)
            pooled = states[:, 0] if self.by_first_token else (states * mask).sum(dim=1) / mask.sum(dim=1)
            vectors: list[list[float]] = torch.nn.functional.normalize(pooled, dim=1).tolist()
        return vectors


def settings(model: sd.LoadedModel, path: str) -> dict[str, Any]:
    """A JSON file of the model; empty if there is none."""
    try:
        found: dict[str, Any] = json.loads(model.file(path).read_text())
    except NotFoundError:
        return {}
    return found

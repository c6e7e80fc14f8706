"""Sentence embeddings with all-MiniLM-L6-v2: texts in, vectors of length 1 out."""

import os

import anyio.to_thread
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel

import snowdrop as sd

TOKENS_MAX = 256
"""The length that the model was trained with; longer texts are cut."""


@sd.service(
    image=sd.Image.from_requirements("requirements.txt"),
    model=sd.Model("minilm"),
    concurrency=16,
    scale=sd.Scale(min=0, max=4, idle_s=60),
    accelerator=["L4", "A10G", "cpu"],
)
class Embed:
    @sd.startup
    def load(self, model: sd.LoadedModel) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        config = AutoConfig.from_pretrained(model.file("config.json").parent)
        # On the meta device nothing is allocated or initialised: the weights come from the node's memory.
        with torch.device("meta"):
            network = AutoModel.from_config(config)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model.load_into(network, strict=False, device=self.device)
        make_position_buffers(network, config.max_position_embeddings)
        left = [name for name, each in [*network.named_parameters(), *network.named_buffers()] if each.is_meta]
        if left:
            raise ValueError(f"the model's files lack {', '.join(left)}")
        self.network = network.eval().to(self.device)
        self.tokenizer = Tokenizer.from_file(str(model.file("tokenizer.json")))
        self.tokenizer.enable_truncation(TOKENS_MAX)
        self.tokenizer.enable_padding()  # to the longest of a batch
        self.compute(["warm up"])

    @sd.endpoint("/embed")
    async def embed(self, texts: list[str]) -> list[list[float]]:
        """One vector of 384 numbers per text; the dot product of two is their cosine similarity."""
        return await anyio.to_thread.run_sync(self.compute, texts)

    @sd.endpoint("/v1/embeddings")
    async def embeddings(self, request: sd.EmbeddingRequest) -> sd.Embeddings:
        """The same for OpenAI's clients, who name the deployment as `model`."""
        vectors = await anyio.to_thread.run_sync(self.compute, request.texts)
        counts = [sum(each.attention_mask) for each in self.tokenizer.encode_batch(request.texts)]
        return sd.Embeddings(vectors=vectors, prompt_tokens=sum(counts))

    def compute(self, texts: list[str]) -> list[list[float]]:
        if not texts:
            return []
        with torch.inference_mode():
            return self.vectors(texts)

    def vectors(self, texts: list[str]) -> list[list[float]]:
        batch = self.tokenizer.encode_batch(texts)
        tokens = torch.tensor([each.ids for each in batch], device=self.device)
        attended = torch.tensor([each.attention_mask for each in batch], device=self.device)
        states = self.network(input_ids=tokens, attention_mask=attended).last_hidden_state
        mask = attended.unsqueeze(-1).to(states.dtype)
        mean = (states * mask).sum(dim=1) / mask.sum(dim=1)
        vectors: list[list[float]] = torch.nn.functional.normalize(mean, dim=1).tolist()
        return vectors


def make_position_buffers(network: torch.nn.Module, positions: int) -> None:
    """Buffers that no checkpoint holds, real ones instead of those on the meta device."""
    embeddings = network.embeddings
    embeddings.register_buffer("position_ids", torch.arange(positions).unsqueeze(0), persistent=False)
    token_types = torch.zeros(1, positions, dtype=torch.long)
    embeddings.register_buffer("token_type_ids", token_types, persistent=False)

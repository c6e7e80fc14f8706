"""A causal language model with transformers, one forward pass a token, where no faster engine is installed.

Requests are computed side by side in threads; they are not batched. For throughput install vLLM.
"""

import os
from collections.abc import Iterator

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import snowdrop as sd
from snowdrop.weights.adapters.transformers import pretrained

TOKENS_MAX = 1024
"""Of an answer whose request says nothing."""
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""For models that come without a template of their own."""


@sd.service(model=sd.Model("model"), concurrency=4, startup_s_max=1800)
class Chat:
    @sd.startup
    def load(self, model: sd.LoadedModel) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.network = pretrained(AutoModelForCausalLM, model).eval().to(self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(model.file("config.json").parent, local_files_only=True)
        if self.tokenizer.chat_template is None:
            self.tokenizer.chat_template = PLAIN_TEMPLATE
        ends = getattr(self.network.generation_config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        self.ends = {each for each in [*ends, self.tokenizer.eos_token_id] if each is not None}
        self.positions = int(getattr(self.network.config, "max_position_embeddings", 0) or 1 << 30)

    @sd.endpoint("/v1/chat/completions")
    def chat(self, request: sd.ChatRequest) -> Iterator[str | sd.Finish]:
        """OpenAI's chat completions."""
        messages = [{"role": each.role, "content": each.text} for each in request.messages]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        yield from self.answer(self.tokenizer(text, add_special_tokens=False).input_ids, request)

    @sd.endpoint("/v1/completions")
    def complete(self, request: sd.CompletionRequest) -> Iterator[str | sd.Finish]:
        """OpenAI's text completions."""
        yield from self.answer(self.tokenizer(request.prompt).input_ids, request)

    def answer(
        self, prompt: list[int], request: sd.ChatRequest | sd.CompletionRequest
    ) -> Iterator[str | sd.Finish]:
        """Pieces of text as their tokens come, held back while they may be the beginning of a stop text."""
        wanted = TOKENS_MAX if request.tokens_max is None else request.tokens_max
        room = min(wanted, self.positions - len(prompt))
        tokens: list[int] = []
        said, reason = "", "length"
        for token in self.tokens(prompt, request, room):
            if token in self.ends:
                reason = "stop"
                break
            tokens.append(token)
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            cut = min((at for stop in request.stops if (at := text.find(stop)) >= 0), default=None)
            if cut is not None:
                yield text[len(said) : cut]
                said, reason = text[:cut], "stop"
                break
            whole = text if not text.endswith("\ufffd") else said  # half a character: more comes
            whole = whole[: len(whole) - held_back(whole, request.stops)]
            if len(whole) > len(said):
                yield whole[len(said) :]
                said = whole
        else:
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            if len(text) > len(said):
                yield text[len(said) :]
        yield sd.Finish(
            reason="stop" if reason == "stop" else "length",
            prompt_tokens=len(prompt),
            completion_tokens=len(tokens),
        )

    def tokens(
        self, prompt: list[int], request: sd.ChatRequest | sd.CompletionRequest, room: int
    ) -> Iterator[int]:
        """At most `room` tokens, one forward pass each; ends when the caller has gone."""
        chance = torch.Generator(device=self.device)
        chance.manual_seed(request.seed) if request.seed is not None else chance.seed()
        cache = DynamicCache(config=self.network.config)
        given = torch.tensor([prompt], device=self.device)
        for _ in range(room):
            if sd.cancelled():
                return
            with torch.inference_mode():
                logits = self.network(input_ids=given, past_key_values=cache, use_cache=True).logits[0, -1].float()
            token = chosen(logits, request.temperature, request.top_p, chance)
            yield token
            given = torch.tensor([[token]], device=self.device)


def chosen(logits: torch.Tensor, temperature: float | None, top_p: float | None, chance: torch.Generator) -> int:
    """The next token: the likeliest at temperature 0, else drawn among those that make up `top_p`."""
    if temperature is not None and temperature <= 0:
        return int(logits.argmax())
    odds = torch.softmax(logits / (1.0 if temperature is None else temperature), dim=-1)
    if top_p is not None and top_p < 1:
        ordered, places = odds.sort(descending=True)
        ordered[ordered.cumsum(0) - ordered >= top_p] = 0
        return int(places[torch.multinomial(ordered, 1, generator=chance)])
    return int(torch.multinomial(odds, 1, generator=chance))


def held_back(text: str, stops: list[str]) -> int:
    """How many of the last characters may be the beginning of a stop text."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for count in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-count:]) for stop in stops):
            return count
    return 0

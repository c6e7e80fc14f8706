"""Which engine serves a model, by its files and its config.json alone."""

import re

import msgspec

from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.servers import OPENAI_PATHS

LLAMA_CPP, VLLM, TRANSFORMERS, EMBEDDER = "llama.cpp", "vllm", "transformers", "embedder"
ENGINES = (LLAMA_CPP, VLLM, TRANSFORMERS, EMBEDDER)

QUANTISATIONS = ("Q4_K_M", "Q5_K_M", "Q4_K_S", "Q6_K", "Q8_0", "Q4_1", "Q4_0", "F16", "BF16", "F32")
"""Of several variants of a GGUF model the first of these that is there: small and close to the whole one."""

_EMBEDDERS = re.compile(r"^(Bert|Roberta|XLMRoberta|MPNet|DistilBert|Electra|Albert|Camembert|ModernBert)Model$")
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a model. `config` is config.json, empty if it has none."""

    files: tuple[tuple[str, int], ...]
    architectures: tuple[str, ...] = ()
    model_type: str = ""

    @property
    def paths(self) -> frozenset[str]:
        return frozenset(path for path, _ in self.files)


class EngineChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The engine, why, and for a GGUF model its file. `openai` is what it serves of the dialect."""

    engine: str
    reason: str
    openai: tuple[str, ...]
    file: str = ""


def choose(
    facts: ModelFacts, *, has_vllm: bool = False, wanted: str | None = None, file: str | None = None
) -> EngineChoice:
    """The engine for a model, or `wanted` if that can serve it.

    `file` names one GGUF of several. Raises InvalidInputError that says what the model is and what can be done.
    """
    fitting = _fitting(facts, has_vllm=has_vllm, file=file)
    if wanted is not None:
        if wanted not in ENGINES:
            raise InvalidInputError(
                f"there is no engine {wanted!r}", where="engine", next_step=f"there are: {', '.join(ENGINES)}"
            )
        for choice in fitting:
            if choice.engine == wanted:
                return msgspec.structs.replace(choice, reason="asked for")
        raise InvalidInputError(
            f"{wanted} cannot serve this model: {_what(facts)}",
            where="engine",
            next_step=f"use {' or '.join(c.engine for c in fitting)}" if fitting else _otherwise(facts),
        )
    if not fitting:
        raise InvalidInputError(
            f"no engine is known for this model: {_what(facts)}", where="model", next_step=_otherwise(facts)
        )
    return fitting[0]


def _fitting(facts: ModelFacts, *, has_vllm: bool, file: str | None) -> list[EngineChoice]:
    """Every engine that can serve it, the best first."""
    found: list[EngineChoice] = []
    gguf, why = _gguf(facts, file)
    if gguf:
        found.append(EngineChoice(engine=LLAMA_CPP, reason=why, openai=OPENAI_PATHS[:2], file=gguf))
    has_weights = any(path.endswith(".safetensors") for path in facts.paths)
    is_embedder = "modules.json" in facts.paths or any(_EMBEDDERS.match(name) for name in facts.architectures)
    if has_weights and is_embedder and "tokenizer.json" in facts.paths:
        what = "modules.json" if "modules.json" in facts.paths else facts.architectures[0]
        found.append(EngineChoice(engine=EMBEDDER, reason=f"an embedder ({what})", openai=OPENAI_PATHS[2:]))
    causal = [name for name in facts.architectures if name.endswith(("ForCausalLM", "LMHeadModel"))]
    if has_weights and causal:
        if has_vllm:
            reason = f"{causal[0]} in safetensors, and vLLM is installed"
            found.append(EngineChoice(engine=VLLM, reason=reason, openai=OPENAI_PATHS[:2]))
        reason = f"{causal[0]} in safetensors" + ("" if has_vllm else ", and vLLM is not installed")
        found.append(EngineChoice(engine=TRANSFORMERS, reason=reason, openai=OPENAI_PATHS[:2]))
    return found


def _gguf(facts: ModelFacts, file: str | None) -> tuple[str, str]:
    """The GGUF file to load and why; of a split one the first part, which names the others."""
    sizes = {path: size for path, size in facts.files if path.endswith(".gguf") and "mmproj" not in path.lower()}
    if file is not None:
        if file not in sizes:
            raise InvalidInputError(
                f"the model has no GGUF file {file!r}",
                where="file",
                next_step=f"it has: {', '.join(sorted(sizes)) or 'none'}",
            )
        return file, f"{file} was asked for"
    firsts = sorted(path for path in sizes if not _SPLIT.search(path) or "-00001-of-" in path)
    if not firsts:
        return "", ""
    if len(firsts) == 1:
        return firsts[0], f"{firsts[0]} is GGUF"
    for name in QUANTISATIONS:
        for path in firsts:
            if re.search(rf"(^|[^A-Z0-9]){name}([^A-Z0-9_]|$)", path.upper()):
                return path, f"{path}, of {len(firsts)} GGUF files (choose another with --file)"
    smallest = min(firsts, key=lambda path: (sizes[path], path))
    return smallest, f"{smallest}, the smallest of {len(firsts)} GGUF files (choose another with --file)"


def _what(facts: ModelFacts) -> str:
    if "model_index.json" in facts.paths:
        return "it is a diffusers pipeline"
    if facts.architectures:
        return f"its architecture is {', '.join(facts.architectures)}"
    return "it has neither a GGUF file nor an architecture in a config.json"


def _otherwise(facts: ModelFacts) -> str:
    if "model_index.json" in facts.paths:
        return "write a service for it: examples/diffusion does"
    return "write a service for it, or serve it with a command: `snowdrop deploy-command --help`"

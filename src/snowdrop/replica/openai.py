"""Endpoints of a service class that speak OpenAI's dialect: the whole body is one parameter, texts become answers.

A method yields or returns text, and perhaps a Finish at the end; or it gives whole objects, which pass.
So one generator answers both kinds of request: a stream of chunks, and one object.
"""

from __future__ import annotations

import base64
import struct
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from snowdrop.domain.errors import InvalidInputError, MethodNotAllowedError, SnowdropError
from snowdrop.domain.ids import fresh_id
from snowdrop.domain.openai_errors import encoded, shape
from snowdrop.domain.openai_types import Embeddings, Finish
from snowdrop.domain.signature import Signature, encode_json
from snowdrop.domain.whole_body import check_whole_body
from snowdrop.replica.call import DONE, Items, Raised
from snowdrop.replica.exchange import SSE, Exchange, StreamForm

CHAT = "/v1/chat/completions"
EMBEDDINGS = "/v1/embeddings"
FLOAT_BYTES = 4


class _Options(msgspec.Struct):
    include_usage: bool = False


class Asked(msgspec.Struct):
    """What the form of the answer hangs on."""

    model: str = ""
    stream: bool | None = None
    stream_options: _Options | None = None
    encoding_format: str = "float"
    n: int | None = None


class BodyDecoder:
    """Decodes a whole body into the only parameter of a method."""

    def __init__(self, signature: Signature) -> None:
        check_whole_body(signature)
        self._name = signature.parameters[0].name
        self._decoder = msgspec.json.Decoder(signature.parameters[0].annotation)
        self._asked = msgspec.json.Decoder(Asked)

    def from_body(self, body: bytes) -> dict[str, Any]:
        """The argument. Raises InvalidInputError naming the field that is wrong."""
        return {self._name: self._decode(self._decoder, body)}

    def from_query(self, _pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
        raise MethodNotAllowedError("GET is not allowed", where="method", next_step="send POST with a JSON object")

    def asked(self, body: bytes) -> Asked:
        found: Asked = self._decode(self._asked, body)
        return found

    def _decode(self, decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
        try:
            return decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            text = str(error)
            field = text.rpartition("$.")[2].rstrip("`") if "$." in text else ""
            raise InvalidInputError(
                f"the request does not fit: {text}",
                where=field,
                next_step="send a JSON object as OpenAI's API describes it",
                fields=[{"field": field, "problem": text}] if field else None,
            ) from error


class Answer:
    """Writes one answer in the dialect."""

    def __init__(self, exchange: Exchange, asked: Asked) -> None:
        self._exchange = exchange
        self._asked = asked
        self._is_chat = exchange.path == CHAT
        self._id = fresh_id("chatcmpl" if self._is_chat else "cmpl")
        self._created = int(time.time())
        self._tells_usage = asked.stream_options is not None and asked.stream_options.include_usage
        self._form = StreamForm(content_type=SSE, item=_event, failure=_failure)

    async def value(self, value: object) -> None:
        """What a method returned."""
        if self._exchange.path == EMBEDDINGS:
            await self._send_json(self._embeddings(value))
        elif isinstance(value, str) and self._asked.stream:
            self._check_one()
            await self._begin()
            await self._piece(value)
            await self._finish(Finish())
        elif isinstance(value, str):
            self._check_one()
            await self._send_json(self._completion(value, Finish()))
        elif self._asked.stream:
            raise InvalidInputError(
                "this model does not answer as a stream",
                where="stream",
                next_step="leave `stream` out",
                fields=[{"field": "stream", "problem": "not supported"}],
            )
        else:
            await self._send_json(value)

    async def items(self, items: Items) -> None:
        """What a method yields, as a stream or gathered into one answer."""
        texts: list[str] = []
        finish = Finish()
        first = await items.next()  # before anything goes out: an early failure is an answer of its own
        if isinstance(first, str | Finish):
            self._check_one()
        if self._asked.stream:
            await self._begin()
        item = first
        while item is not DONE:
            if isinstance(item, Finish):
                finish = item
            elif isinstance(item, str):
                if self._asked.stream:
                    await self._piece(item)
                else:
                    texts.append(item)
            elif self._asked.stream:
                await self._write(item)
            else:
                raise Raised(
                    TypeError(f"yielded {type(item).__name__} for an answer that is no stream, not a text")
                )
            item = await items.next()
        if self._asked.stream:
            await self._finish(finish)
        else:
            await self._send_json(self._completion("".join(texts), finish))

    # --- inside -------------------------------------------------------------------------------------------

    def _check_one(self) -> None:
        """Texts become one choice; a method that makes several gives whole objects."""
        if self._asked.n not in {None, 1}:
            raise InvalidInputError(
                "this model gives one choice per request",
                where="n",
                next_step="leave `n` out, and send the request as often as you want choices",
                fields=[{"field": "n", "problem": "only 1 is supported"}],
            )

    async def _begin(self) -> None:
        await self._exchange.begin_stream(self._form)
        if self._is_chat:
            await self._write(self._chunk({"delta": {"role": "assistant", "content": ""}}))

    async def _piece(self, text: str) -> None:
        await self._write(self._chunk({"delta": {"content": text}} if self._is_chat else {"text": text}))

    async def _finish(self, finish: Finish) -> None:
        last: dict[str, Any] = {"delta": {}} if self._is_chat else {"text": ""}
        await self._write(self._chunk({**last, "finish_reason": finish.reason}))
        if self._tells_usage:
            await self._write({**self._chunk(None), "usage": _usage(finish)})
        await self._exchange.write(b"data: [DONE]\n\n", more=False)

    async def _write(self, item: object) -> None:
        await self._exchange.write(_event(item))

    def _chunk(self, choice: dict[str, Any] | None) -> dict[str, Any]:
        choices = [] if choice is None else [{"index": 0, "finish_reason": None, "logprobs": None, **choice}]
        chunk = {**self._head("chat.completion.chunk" if self._is_chat else "text_completion"), "choices": choices}
        return {**chunk, "usage": None} if self._tells_usage else chunk

    def _completion(self, text: str, finish: Finish) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
        return {
            **self._head("chat.completion" if self._is_chat else "text_completion"),
            "choices": [{"index": 0, **said, "finish_reason": finish.reason, "logprobs": None}],
            "usage": _usage(finish),
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._asked.model}

    def _embeddings(self, value: object) -> object:
        if isinstance(value, dict | msgspec.Struct) and not isinstance(value, Embeddings):
            return value
        counted = (
            value if isinstance(value, Embeddings) else Embeddings(vectors=msgspec.json.decode(encode_json(value)))
        )
        as_text = self._asked.encoding_format == "base64"
        data = [
            {"object": "embedding", "index": index, "embedding": _base64(vector) if as_text else vector}
            for index, vector in enumerate(counted.vectors)
        ]
        usage = {"prompt_tokens": counted.prompt_tokens, "total_tokens": counted.prompt_tokens}
        return {"object": "list", "data": data, "model": self._asked.model, "usage": usage}

    async def _send_json(self, value: object) -> None:
        try:
            body = encode_json(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise Raised(error) from error
        await self._exchange.answer(body)


async def respond(
    exchange: Exchange,
    asked: Asked,
    call: Callable[[], Awaitable[object]] | None,
    opened: Callable[[], Awaitable[Items]],
) -> None:
    """Answers with what `call` returns, or with the items of `opened` if the method is a generator."""
    answer = Answer(exchange, asked)
    if call is not None:
        await answer.value(await call())
        return
    items = await opened()
    try:
        await answer.items(items)
    finally:
        await items.close()


def _event(item: object) -> bytes:
    try:
        return b"data: " + encode_json(item) + b"\n\n"
    except (TypeError, ValueError, OverflowError) as error:
        raise Raised(error) from error


def _failure(error: SnowdropError, request_id: str) -> bytes:
    return b"data: " + encoded(shape(error, request_id)) + b"\n\n"


def _usage(finish: Finish) -> dict[str, int]:
    return {
        "prompt_tokens": finish.prompt_tokens,
        "completion_tokens": finish.completion_tokens,
        "total_tokens": finish.prompt_tokens + finish.completion_tokens,
    }


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()

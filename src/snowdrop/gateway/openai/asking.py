"""What the gateway reads of a request in the dialect: which model, and whether as a stream."""

from __future__ import annotations

import msgspec

from snowdrop.domain.errors import InvalidInputError
from snowdrop.gateway.bodies import IncomingBody
from snowdrop.wire.bodies import gathered

BODY_BYTES_MAX = 32 << 20
"""A request is read whole before its model is known; pictures come inside of it, as base64."""


class Asked(msgspec.Struct, frozen=True):
    """The fields that matter here; unknown ones pass."""

    model: str = ""
    stream: bool | None = None


_decoder = msgspec.json.Decoder(Asked)


async def read_whole(body: IncomingBody) -> bytes:
    """All of a body. Raises TooLargeError, and TimedOutError for a client that is too slow."""
    if body.whole is not None:
        return body.whole
    return await gathered(
        body.stream(),
        BODY_BYTES_MAX,
        what="the request's body",
        bound="openai_body_bytes_max",
        next_step="send less",
    )


def read_asked(body: bytes) -> Asked:
    """Raises InvalidInputError, with the field's name in `fields` where it is one field."""
    try:
        asked = _decoder.decode(body)
    except msgspec.ValidationError as error:
        field = str(error).rpartition("$.")[2].rstrip("`") if "$." in str(error) else ""
        raise InvalidInputError(
            f"the request does not fit: {error}",
            where=field,
            next_step="send a JSON object as OpenAI's API describes it",
            fields=[{"field": field, "problem": str(error)}] if field else None,
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidInputError(
            f"the body is no JSON: {error}", where="body", next_step="send a JSON object with `model`"
        ) from error
    if not asked.model:
        raise InvalidInputError(
            "you must provide a model parameter",
            where="model",
            next_step="name a deployment: GET /v1/models lists them",
            fields=[{"field": "model", "problem": "missing"}],
        )
    return asked

"""Errors in the shape that OpenAI's clients understand: status, type, code, and whether to try again.

{"error": {"message": "...", "type": "invalid_request_error", "param": "model", "code": "model_not_found"}}
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from snowdrop.domain.errors import ErrorBody, InvalidInputError, SnowdropError, error_from_body

SERVER_ERROR = "server_error"
INVALID_REQUEST = "invalid_request_error"
FOREIGN_BYTES_MAX = 1_000
"""What is told of an answer that is no JSON."""

_CODES = {
    "unauthorised": "invalid_api_key",
    "not_found": "model_not_found",
    "queue_full": "rate_limit_exceeded",
}
_encode = msgspec.json.Encoder().encode


class OpenAiError(msgspec.Struct, frozen=True, kw_only=True):
    """`kind`, `where`, `next_step` and `request_id` are ours; clients that do not know them pass over them."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None
    kind: str = ""
    where: str = ""
    next_step: str = ""
    request_id: str = ""


class _Theirs(msgspec.Struct):
    error: Any = None


def status_of(error: SnowdropError) -> int:
    """The HTTP status in this dialect, which has 400 for what we call 422."""
    return 400 if error.http_status == InvalidInputError.http_status else error.http_status


def shape(
    error: SnowdropError, request_id: str, *, param: str | None = None, code: str | None = None
) -> OpenAiError:
    """`error` in their shape. The message ends with what the caller can do."""
    status = status_of(error)
    kind = "rate_limit_error" if status == 429 else INVALID_REQUEST if status < 500 else SERVER_ERROR
    if param is None and error.fields:
        param = error.fields[0].get("field")
    if code is None:
        code = _CODES.get(error.kind, None if status == 400 else error.kind)
    return OpenAiError(
        message=f"{error.message}; {error.next_step}" if error.next_step else error.message,
        type=kind,
        param=param if param is not None else "model" if code == "model_not_found" else None,
        code=code,
        kind=error.kind,
        where=error.where,
        next_step=error.next_step,
        request_id=request_id,
    )


def foreign(status: int, body: bytes, request_id: str) -> bytes:
    """The failure of a server of another kind as one of this shape: as it is if it has `error`, else wrapped."""
    try:
        if msgspec.json.decode(body, type=_Theirs).error is not None:
            return body
    except (msgspec.MsgspecError, UnicodeDecodeError):
        pass
    said = body[:FOREIGN_BYTES_MAX].decode(errors="replace").strip()
    message = f"the model's server answered {status}: {said}" if said else f"the model's server answered {status}"
    kind = INVALID_REQUEST if status < 500 else SERVER_ERROR
    return encoded(OpenAiError(message=message, type=kind, code=str(status), request_id=request_id))


def encoded(error: OpenAiError) -> bytes:
    return _encode({"error": error})


def headers_of(error: SnowdropError, request_id: str) -> dict[str, str]:
    """Answer headers; the official clients do as `x-should-retry` says before they look at the status."""
    headers = {"x-request-id": request_id, "content-type": "application/json"}
    headers["x-should-retry"] = "true" if error.retryable else "false"
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    elif error.retryable and error.http_status in {429, 503}:
        headers["retry-after"] = "1"
    return headers


def ours(body: bytes) -> SnowdropError | None:
    """The typed error that a service of Snowdrop's SDK answered with; None if `body` is anything else."""
    try:
        found = msgspec.json.decode(body, type=_Theirs).error
        if not isinstance(found, dict) or "kind" not in found or "type" in found:
            return None
        return error_from_body(msgspec.convert(found, ErrorBody))
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None

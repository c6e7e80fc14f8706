"""The head of an HTTP/1.1 response: read strictly, within bounds. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

HEAD_BYTES_MAX = 32 << 10
HEADERS_MAX = 100
_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: [^\x00-\x08\x0a-\x1f\x7f]*)?")
_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(rb"[^\x00-\x08\x0a-\x1f\x7f]*")
_CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18}|\*)", re.ASCII)
_UNIQUE = frozenset({"content-length", "content-range", "transfer-encoding", "location", "content-encoding"})


class GarbledError(Exception):
    """What came is not an HTTP response that can be used; `str()` says why."""


class ResponseHead(NamedTuple):
    """`headers` by lower-case name; where one may repeat, the last is kept."""

    status: int
    minor_version: int
    headers: Mapping[str, str]

    @property
    def content_length(self) -> int | None:
        """Bytes of the body, or None if the head does not say."""
        text = self.headers.get("content-length")
        return None if text is None else int(text)

    @property
    def keeps_alive(self) -> bool:
        tokens = {token.strip().lower() for token in self.headers.get("connection", "").split(",")}
        return "close" not in tokens and (self.minor_version == 1 or "keep-alive" in tokens)

    @property
    def retry_after_s(self) -> float | None:
        """Seconds of Retry-After; a date in it is not understood."""
        text = self.headers.get("retry-after", "")
        return float(text) if text.isascii() and text.isdigit() and len(text) <= 9 else None


class ContentRange(NamedTuple):
    """`first` to `last` of `total` bytes; -1 where the server does not say."""

    first: int
    last: int
    total: int


def parse_head(data: bytes) -> ResponseHead:
    """The head in `data`, which ends with its empty line. Raises GarbledError."""
    lines = data.removesuffix(b"\r\n\r\n").split(b"\r\n")
    matched = _STATUS.fullmatch(lines[0])
    if matched is None:
        raise GarbledError(f"the status line is {lines[0][:60]!r}")
    if len(lines) - 1 > HEADERS_MAX:
        raise GarbledError(f"the answer has {len(lines) - 1} headers (headers_max={HEADERS_MAX})")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        raw_name, colon, raw_value = line.partition(b":")
        value = raw_value.strip(b" \t")
        if not colon or _NAME.fullmatch(raw_name) is None or _VALUE.fullmatch(value) is None:
            raise GarbledError(f"header line {line[:60]!r}")
        name, text = raw_name.decode("ascii").lower(), value.decode("latin-1")
        if name in _UNIQUE and headers.get(name, text) != text:
            raise GarbledError(f"two different headers {name}")
        headers[name] = text
    length = headers.get("content-length")
    if length is not None and not (length.isascii() and length.isdigit() and len(length) <= 18):
        raise GarbledError(f"content-length is {length[:60]!r}")
    return ResponseHead(int(matched[2]), int(matched[1]), headers)


def parse_content_range(text: str | None) -> ContentRange:
    """The value of Content-Range. Raises GarbledError."""
    matched = _CONTENT_RANGE.fullmatch(text or "")
    if matched is None:
        raise GarbledError(f"content-range is {(text or '')[:60]!r}")
    first, last, total = (-1 if part in {None, "*"} else int(part) for part in matched.groups())
    if first > last or (total >= 0 and last >= total):
        raise GarbledError(f"content-range is {(text or '')[:60]!r}")
    return ContentRange(first, last, total)

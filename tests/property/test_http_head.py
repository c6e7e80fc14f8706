"""Heads of answers: what is well-formed is read as it is, all else is refused; time and size are bounded."""

from __future__ import annotations

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snowdrop.content.origin.head import (
    HEADERS_MAX,
    GarbledError,
    ResponseHead,
    parse_content_range,
    parse_head,
)
from snowdrop.content.origin.target import parse_target, redirected

TOKENS = st.text(string.ascii_letters + string.digits + "-_", min_size=1, max_size=20)
VALUES = st.text([chr(code) for code in range(33, 127)], max_size=40)


@given(st.integers(100, 599), st.dictionaries(TOKENS.map(str.lower), VALUES, max_size=HEADERS_MAX))
def test_a_well_formed_head_is_read_as_it_is(status: int, headers: dict[str, str]) -> None:
    headers = {name: value for name, value in headers.items() if name != "content-length"}
    lines = [f"HTTP/1.1 {status} Some Reason", *(f"{name.upper()}:  {value} " for name, value in headers.items())]
    head = parse_head("\r\n".join([*lines, "", ""]).encode())
    assert head == ResponseHead(status, 1, headers)


@given(st.binary(max_size=400))
def test_noise_is_refused_and_raises_nothing_else(data: bytes) -> None:
    for text in (data, b"HTTP/1.1 206 X\r\n" + data + b"\r\n\r\n"):
        try:
            head = parse_head(text)
        except GarbledError:
            continue
        assert 100 <= head.status <= 599
        assert head.content_length is None or head.content_length >= 0
        assert head.retry_after_s is None or head.retry_after_s >= 0
        assert not any("\r" in value or "\n" in value or "\0" in value for value in head.headers.values())


@given(st.text(max_size=60))
def test_a_content_range_is_what_it_says_or_refused(text: str) -> None:
    try:
        got = parse_content_range(text)
    except GarbledError:
        return
    assert re.fullmatch(r"bytes [0-9*/-]+", text, re.ASCII)
    assert got.first <= got.last


@given(st.integers(0, 10**15), st.integers(0, 10**9), st.integers(1, 10**9))
def test_a_true_content_range_is_read(first: int, length: int, more: int) -> None:
    last = first + length
    assert parse_content_range(f"bytes {first}-{last}/{last + more}") == (first, last, last + more)
    assert parse_content_range(f"bytes {first}-{last}/*") == (first, last, -1)
    with pytest.raises(GarbledError):
        parse_content_range(f"bytes {first}-{last}/{last}")


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "bytes 5-4/10",
        "bytes 0-9/5",
        "bytes \u0660-\u0669/\u0661\u0660",
        "items 0-1/2",
        "bytes 0-1",
        "bytes -1-1/2",
    ],
)
def test_a_false_content_range_is_refused(text: str | None) -> None:
    with pytest.raises(GarbledError):
        parse_content_range(text)


@given(st.text(max_size=80))
def test_urls_are_taken_apart_or_refused(text: str) -> None:
    for url in (text, "http://" + text):
        try:
            target = parse_target(url)
        except GarbledError:
            continue
        line = f"GET {target.path} HTTP/1.1 Host: {target.authority}"
        assert "\r" not in line
        assert "\n" not in line
        assert " " not in target.path


def test_a_redirect_never_leaves_encryption_and_may_be_relative() -> None:
    target = parse_target("https://a.example/x/y?sig=secret")
    assert redirected(target, "z").path == "/x/z"
    assert redirected(target, "https://[::1]:8443/q").server == ("https", "::1", 8443)
    for location in (None, "", "http://a.example/", "ftp://a/", "file:///etc/passwd", "http://a.example:99999/"):
        with pytest.raises(GarbledError) as caught:
            redirected(target, location)
        assert "secret" not in str(caught.value)

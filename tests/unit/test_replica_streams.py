"""Streams of items, their forms, and how they fail early and late."""

import json
from collections.abc import AsyncIterator, Iterator

import pytest

import snowdrop as sd
from replica_helpers import post, started

pytestmark = pytest.mark.anyio


@sd.service()
class Streams:
    @sd.endpoint("/count")
    def count(self, to: int, fail_at: int = -1) -> Iterator[int]:
        for number in range(to):
            if number == fail_at:
                raise ValueError("counted enough")
            yield number

    @sd.endpoint("/words")
    async def words(self, fail_at: int = -1) -> AsyncIterator[str]:
        for index, word in enumerate(["one\n\nline", "two"]):
            if index == fail_at:
                raise ValueError("no more words")
            yield word

    @sd.endpoint("/blocks")
    def blocks(self, fail_at: int = -1) -> Iterator[bytes]:
        for index in range(3):
            if index == fail_at:
                raise ValueError("no more blocks")
            yield bytes([65 + index])


async def test_items_come_as_server_sent_events() -> None:
    async with started(Streams) as app:
        answer = await post(app, "/count", {"to": 3})
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.chunks == [b"data: 0\n\n", b"data: 1\n\n", b"data: 2\n\n"]
        assert answer.is_complete


async def test_strings_are_json_so_that_newlines_survive() -> None:
    async with started(Streams) as app:
        first = (await post(app, "/words")).chunks[0]
        assert json.loads(first.removeprefix(b"data: ")) == "one\n\nline"


async def test_items_come_as_json_lines_when_asked_for() -> None:
    async with started(Streams) as app:
        answer = await post(app, "/count", {"to": 2}, headers={"accept": "application/x-ndjson"})
        assert (answer.headers["content-type"], answer.body) == ("application/x-ndjson", b"0\n1\n")


async def test_bytes_come_as_they_are() -> None:
    async with started(Streams) as app:
        answer = await post(app, "/blocks")
        assert (answer.headers["content-type"], answer.body) == ("application/octet-stream", b"ABC")


async def test_an_empty_stream_is_a_complete_answer() -> None:
    async with started(Streams) as app:
        answer = await post(app, "/count", {"to": 0})
        assert (answer.status, answer.body, answer.is_complete) == (200, b"", True)


@pytest.mark.parametrize("path", ["/words", "/blocks"])
async def test_a_failure_before_the_first_item_is_a_500(path: str) -> None:
    async with started(Streams) as app:
        answer = await post(app, path, {"fail_at": 0})
        assert (answer.status, answer.json()["error"]["kind"]) == (500, "user_code")


@pytest.mark.parametrize(("path", "body"), [("/count", {"to": 3, "fail_at": 1}), ("/words", {"fail_at": 1})])
async def test_a_late_failure_is_an_error_event(path: str, body: object) -> None:
    async with started(Streams) as app:
        answer = await post(app, path, body)
        event, data = answer.chunks[1].decode().strip().split("\n")
        assert (answer.status, event, answer.is_complete) == (200, "event: error", True)
        assert json.loads(data.removeprefix("data: "))["error"]["message"].startswith("ValueError")


async def test_a_late_failure_among_json_lines_is_a_line() -> None:
    async with started(Streams) as app:
        answer = await post(app, "/words", {"fail_at": 1}, headers={"accept": "application/x-ndjson"})
        assert json.loads(answer.chunks[1])["error"]["message"] == "ValueError: no more words"


async def test_a_late_failure_of_a_byte_stream_leaves_it_incomplete() -> None:
    async with started(Streams) as app:
        answer = await post(app, "/blocks", {"fail_at": 1})
        assert (answer.body, answer.is_complete) == (b"A", False)

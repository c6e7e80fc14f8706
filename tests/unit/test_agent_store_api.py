"""The agent's HTTP interface to stored content, with a made-up data plane behind it."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from snowdrop.agent.store_api import EVICTED_PER_MESSAGE, add_store_routes
from snowdrop.domain.errors import PlatformDownError, StorageFullError, UnavailableError
from snowdrop.domain.ids import DEFAULT_TENANT, Digest
from snowdrop.wire.codec import Message
from snowdrop.wire.dataplane import Completed
from snowdrop.wire.upkeep import (
    AskContent,
    BadChunk,
    ContentEvicted,
    ContentTold,
    ContentVerified,
    EvictContent,
    NodeContent,
    PinContent,
    UnpinContent,
    VerifyContent,
)

pytestmark = pytest.mark.anyio
DIGEST = Digest("blake3:" + "a" * 64)
BAD = BadChunk(chunk=1, file="f", tier="disk")


class FakePlane:
    """Answers by `answers`; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Message] = []
        self.answers: Callable[[Any], Message] = lambda message: Completed(request=message.request)
        self.ensure_error: Exception | None = None
        self.released: list[str] = []

    async def ask(self, make: Callable[..., Message], _wanted: type[Message]) -> Message:
        message = make(request=1)
        self.asked.append(message)
        return self.answers(message)

    async def ensure(self, *_: object, **__: object) -> Any:
        if self.ensure_error is not None:
            raise self.ensure_error

        class Got:
            def close(self) -> None:
                return

        return Got()

    async def wait_directory(self, manifest: Digest) -> None:
        assert manifest == DIGEST

    async def release(self, holder: str) -> None:
        self.released.append(holder)


@pytest.fixture
def plane() -> FakePlane:
    return FakePlane()


@pytest.fixture
async def client(plane: FakePlane) -> AsyncIterator[TestClient[web.Request, web.Application]]:
    async def current() -> Any:
        return plane

    app = web.Application()
    add_store_routes(app, current)
    async with TestClient(TestServer(app)) as made:
        yield made


def lines_of(text: str) -> list[dict[str, Any]]:
    return [msgspec.json.decode(line) for line in text.splitlines()]


PIN = {"tenant": DEFAULT_TENANT, "manifest": DIGEST, "key_domain": "public", "name": "m"}


async def test_verification_goes_on_until_the_last_chunk(client: Any, plane: FakePlane) -> None:
    def answers(message: VerifyContent) -> Message:
        assert message.key_domain == "public"
        bad = (BAD,) if message.first == 2 else ()
        return ContentVerified(request=1, next_chunk=message.first + 2, chunk_count=5, read_bytes=7, bad=bad)

    plane.answers = answers
    async with client.post("/store/verify", json={"manifest": DIGEST, "key_domain": "public"}) as answer:
        lines = lines_of(await answer.text())
    assert [line["done"] for line in lines] == [2, 4, 6]
    assert [line.get("is_done", False) for line in lines] == [False, False, True]
    assert [len(line.get("bad", ())) for line in lines] == [0, 1, 0]


async def test_an_error_in_the_middle_is_the_last_line_and_one_at_first_the_status(
    client: Any, plane: FakePlane
) -> None:
    def answers(message: VerifyContent) -> Message:
        if message.first:
            raise UnavailableError("the disk is gone")
        return ContentVerified(request=1, next_chunk=1, chunk_count=5, read_bytes=7, bad=())

    plane.answers = answers
    body = {"manifest": DIGEST, "key_domain": "public"}
    async with client.post("/store/verify", json=body) as answer:
        lines = lines_of(await answer.text())
    assert answer.status == 200
    assert lines[-1]["error"]["message"] == "the disk is gone"

    def down(_: Any) -> Message:
        raise PlatformDownError("no data plane")

    plane.answers = down
    async with client.post("/store/verify", json=body) as answer:
        assert answer.status == 503
        assert (await answer.json())["error"]["kind"] == "platform_down"


async def test_a_pin_is_set_then_brought_and_what_fails_says_that_it_stays(client: Any, plane: FakePlane) -> None:
    async with client.post("/store/pins", json=PIN) as answer:
        assert lines_of(await answer.text())[-1] == {"is_done": True}
    assert [type(message) for message in plane.asked] == [PinContent]
    plane.ensure_error = StorageFullError("no room", next_step="make some")
    async with client.post("/store/pins", json=PIN) as answer:
        error = lines_of(await answer.text())[-1]["error"]
    assert error["kind"] == "storage_full"
    assert error["next_step"].startswith("make some; it stays pinned")
    assert len(plane.released) == 2, "nothing is held by the bringing itself"


async def test_a_pin_is_taken_back(client: Any, plane: FakePlane) -> None:
    async with client.delete(f"/store/pins/{DIGEST}") as answer:
        assert answer.status == 204
    assert plane.asked == [UnpinContent(request=1, manifest=DIGEST)]
    async with client.delete("/store/pins/nonsense") as answer:
        assert answer.status == 422


async def test_content_is_asked_for_in_pages(client: Any, plane: FakePlane) -> None:
    def item(letter: str) -> NodeContent:
        return NodeContent(
            manifest=Digest(letter), disk_bytes=1, ram_bytes=0, used_unix_ns=0, is_held=False, pin=None
        )

    pages = {"": ("a", "b"), "b": ("c",)}

    def answers(message: AskContent) -> Message:
        found = tuple(item(letter) for letter in pages[message.after])
        return ContentTold(request=1, content=found, is_last=message.after == "b")

    plane.answers = answers
    async with client.get("/store/content") as answer:
        assert [found["manifest"] for found in await answer.json()] == ["a", "b", "c"]


async def test_many_evictions_are_split_into_messages(client: Any, plane: FakePlane) -> None:
    def answers(message: EvictContent) -> Message:
        return ContentEvicted(request=1, evicted=message.manifests, disk_bytes=2, ram_bytes=1)

    plane.answers = answers
    digests = [f"blake3:{number:064x}" for number in range(EVICTED_PER_MESSAGE + 1)]
    body = {"manifests": digests, "unused_since_unix_ns": 9}
    async with client.post("/store/evict", json=body) as answer:
        told = await answer.json()
    assert told["evicted"] == digests
    assert (told["disk_bytes"], told["ram_bytes"]) == (4, 2)


async def test_a_bad_body_is_refused(client: Any) -> None:
    async with client.post("/store/verify", data=b"junk") as answer:
        assert answer.status == 422
    with pytest.raises(aiohttp.ClientError):
        async with client.get("/nothing") as answer:
            answer.raise_for_status()

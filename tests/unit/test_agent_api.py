"""Logs over the agent's socket: the last lines, one replica's, and following."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import aiohttp
import anyio
import pytest

from agent_helpers import WAIT_S_MAX, Bench
from platform_helpers import replica_key
from snowdrop.agent import api as api_module
from snowdrop.agent import context as context_module
from snowdrop.agent.api import build_agent_api
from snowdrop.agent.logs import follow
from snowdrop.wire.http import serving_unix

pytestmark = pytest.mark.anyio


class LogBench:
    def __init__(self, folder: Path) -> None:
        self.logs = folder / "logs"
        self.socket = folder / "agent.sock"
        self.alive: set[str] = set()

    def write(self, replica: str, *lines: tuple[int, str], name: str = "embed", tenant: str = "default") -> Path:
        folder = self.logs / tenant / name
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{replica}.log"
        with path.open("a") as file:
            file.writelines(f"{unix_ms} stdout {text}\n" for unix_ms, text in lines)
        return path

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[aiohttp.ClientSession]:
        app = build_agent_api(self.logs, self.alive.__contains__)
        connector = aiohttp.UnixConnector(path=str(self.socket))
        async with (
            serving_unix(app, self.socket),
            aiohttp.ClientSession("http://agent", connector=connector) as session,
        ):
            yield session

    async def texts(self, path: str = "/logs/default/embed", **query: str) -> list[str]:
        async with self.serving() as session, session.get(path, params=query) as response:
            assert response.status == 200
            return [json.loads(line)["text"] for line in (await response.text()).splitlines()]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LogBench:
    monkeypatch.setattr(api_module, "NEW_LOG_POLL_S", 0.001)
    monkeypatch.setattr(api_module, "follow", partial(follow, poll_s=0.001))
    made = LogBench(tmp_path)
    made.write("rep-1", (1, "a"), (3, "c"), (5, "e"))
    made.write("rep-2", (2, "b"), (4, "d"))
    made.write("rep-9", (9, "another's"), name="other")
    return made


async def test_the_last_lines_of_all_replicas_in_the_order_of_their_times(bench: LogBench) -> None:
    assert await bench.texts() == ["a", "b", "c", "d", "e"]
    assert await bench.texts(tail="2") == ["d", "e"]
    assert await bench.texts(tail="0") == []
    assert await bench.texts(tail="9" * 40) == ["a", "b", "c", "d", "e"]


async def test_one_replicas_lines(bench: LogBench) -> None:
    assert await bench.texts(replica="rep-2") == ["b", "d"]
    assert await bench.texts(replica="rep-2", tail="1") == ["d"]
    assert await bench.texts(replica="../other/rep-9") == []


async def test_a_line_says_whose_it_is(bench: LogBench) -> None:
    async with bench.serving() as session, session.get("/logs/default/embed?tail=1") as response:
        assert response.content_type == "application/x-ndjson"
        assert await response.json(content_type=None) == {
            "replica": "rep-1",
            "unix_ms": 5,
            "stream": "stdout",
            "text": "e",
        }


async def test_an_unknown_deployment_or_tenant_has_none(bench: LogBench) -> None:
    assert await bench.texts("/logs/default/nobody") == []
    assert await bench.texts("/logs/someone/embed") == []


@pytest.mark.parametrize("tail", ["-1", "ten", "", "1.5", "²", "0x10"])
@pytest.mark.parametrize("follow_it", ["0", "1"])
async def test_a_tail_that_is_no_number_is_the_callers_mistake(bench: LogBench, tail: str, follow_it: str) -> None:
    async with (
        bench.serving() as session,
        session.get("/logs/default/embed", params={"tail": tail, "follow": follow_it}) as response,
    ):
        assert response.status == 422
        error = (await response.json())["error"]
    assert (error["kind"], error["where"]) == ("invalid_input", "tail")


@pytest.mark.parametrize("path", ["/logs/default/%2e%2e", "/logs/default/a%00b", "/logs/default/..%2Fother"])
async def test_no_name_leads_out_of_a_deployments_folder(bench: LogBench, path: str) -> None:
    async with raw_status(bench, path) as status:
        assert status == 422


@asynccontextmanager
async def raw_status(bench: LogBench, path: str) -> AsyncIterator[int]:
    """A request whose path no client tidies."""
    async with bench.serving(), await anyio.connect_unix(str(bench.socket)) as stream:
        await stream.send(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        with anyio.fail_after(WAIT_S_MAX):
            yield int((await stream.receive()).split()[1])


class TestFollow:
    async def line(self, response: aiohttp.ClientResponse) -> str:
        with anyio.fail_after(WAIT_S_MAX):
            return str(json.loads(await response.content.readline())["text"])

    async def test_new_lines_come_also_of_replicas_that_start_later(self, bench: LogBench) -> None:
        bench.alive = {"rep-1", "rep-3"}
        async with bench.serving() as session, session.get("/logs/default/embed?follow=1&tail=1") as response:
            assert {await self.line(response), await self.line(response)} == {"d", "e"}
            bench.write("rep-1", (6, "f"))
            assert await self.line(response) == "f"
            bench.write("rep-3", (7, "g"), (8, "h"))
            assert [await self.line(response), await self.line(response)] == ["g", "h"]
            bench.write("rep-3", (9, "i"))
            assert await self.line(response) == "i"

    async def test_one_replica_only(self, bench: LogBench) -> None:
        bench.alive = {"rep-1", "rep-2"}
        async with (
            bench.serving() as session,
            session.get("/logs/default/embed?follow=1&tail=0&replica=rep-2") as response,
        ):
            bench.write("rep-1", (6, "not this"))
            bench.write("rep-2", (7, "this"))
            assert await self.line(response) == "this"

    async def test_a_deployment_that_has_no_log_yet(self, bench: LogBench) -> None:
        async with bench.serving() as session, session.get("/logs/default/fresh?follow=1") as response:
            bench.alive = {"rep-5"}
            bench.write("rep-5", (1, "first"), name="fresh")
            assert await self.line(response) == "first"


class TestKept:
    def test_a_deployments_logs_are_bounded(self, tmp_path: Path) -> None:
        bench = Bench(tmp_path)
        kept = context_module.LOGS_KEPT_MAX
        for number in range(kept + 5):
            path = bench.context.log_path(replica_key(f"rep-{number}"))
            path.write_text("x")
            path.with_name(path.name + ".1").write_text("older")
            stamp = 1_000_000_000 * (number + 1)
            os.utime(path, ns=(stamp, stamp))
        folder = bench.context.logs / "default" / "embed"
        names = {path.stem for path in folder.glob("*.log")}
        assert names == {f"rep-{number}" for number in range(5, kept + 5)}
        assert {path.name.removesuffix(".log.1") for path in folder.glob("*.log.1")} == names

    def test_another_deployment_keeps_its_own(self, tmp_path: Path) -> None:
        bench = Bench(tmp_path)
        other = bench.context.log_path(replica_key("rep-x", name="other"))
        other.write_text("x")
        for number in range(context_module.LOGS_KEPT_MAX + 1):
            bench.context.log_path(replica_key(f"rep-{number}")).write_text("x")
        assert other.exists()

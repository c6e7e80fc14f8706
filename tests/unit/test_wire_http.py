"""A server on a unix socket: who goes away cancels its handler, and breaks into nothing that is shielded."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import aiohttp
import anyio
import anyio.to_thread
import pytest
from aiohttp import web

from snowdrop.state.group_commit import GroupCommit
from snowdrop.wire.http import serving_unix

pytestmark = pytest.mark.anyio
T = TypeVar("T")


class Database:
    """Transactions in a thread, held up at a gate; counts how many run at once."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.running = self.most = 0
        self.began = threading.Event()
        self._connection = sqlite3.connect(":memory:", check_same_thread=False)
        self._one = anyio.CapacityLimiter(1)

    async def transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        def run() -> T:
            self.running += 1
            self.most = max(self.most, self.running)
            self.began.set()
            assert self.gate.wait(10)
            try:
                self._connection.execute("BEGIN")
                result = work(self._connection)
                self._connection.execute("COMMIT")
            finally:
                self.running -= 1
            return result

        return await anyio.to_thread.run_sync(run, limiter=self._one)

    def close(self) -> None:
        self._connection.close()


async def test_one_who_commits_for_others_and_goes_away_leaves_them_their_results(tmp_path: Path) -> None:
    database = Database()
    commit = GroupCommit(database.transact)
    handlers: dict[str, asyncio.Task[None]] = {}

    async def handle(request: web.Request) -> web.Response:
        name = request.match_info["name"]
        handlers[name] = request.task
        return web.json_response(await commit(lambda _db: name))

    app = web.Application()
    app.router.add_get("/{name}", handle)
    path = tmp_path / "s.sock"
    got: dict[str, str] = {}

    async def ask(http: aiohttp.ClientSession, name: str) -> None:
        async with http.get(f"http://x/{name}") as answer:
            got[name] = await answer.json()

    async with serving_unix(app, path), aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as http:
        with anyio.fail_after(10):
            async with anyio.create_task_group() as group:
                # The first one's transaction runs while the others gather; then the one that leads them goes away.
                leaving = anyio.CancelScope()

                async def leave() -> None:
                    with leaving:
                        await ask(http, "leader")

                group.start_soon(leave)
                await anyio.to_thread.run_sync(database.began.wait, 10)
                for name in ("a", "b", "c"):
                    group.start_soon(ask, http, name)
                await anyio.wait_all_tasks_blocked()
                leaving.cancel()
                while not (handlers["leader"].cancelling() or handlers["leader"].done()):
                    await anyio.sleep(0)  # the server has yet to hear of it
                database.gate.set()
    assert got == {"a": "a", "b": "b", "c": "c"}
    assert database.most == 1, "two transactions ran at once on one connection"
    database.close()


async def test_the_cancellation_is_heard_where_nothing_is_shielded(tmp_path: Path) -> None:
    waiting, cancelled = anyio.Event(), anyio.Event()

    async def handle(_request: web.Request) -> web.Response:
        try:
            waiting.set()
            await anyio.sleep_forever()
        finally:
            cancelled.set()

    app = web.Application()
    app.router.add_get("/", handle)
    path = tmp_path / "s.sock"
    async with serving_unix(app, path), aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as http:
        with anyio.fail_after(10):
            async with anyio.create_task_group() as group:
                group.start_soon(http.get, "http://x/")
                await waiting.wait()
                group.cancel_scope.cancel()
            await cancelled.wait()


async def test_what_a_handler_raises_passes_as_it_is(tmp_path: Path) -> None:
    async def handle(request: web.Request) -> web.Response:
        if request.path == "/gone":
            raise web.HTTPGone
        raise ValueError

    app = web.Application()
    app.router.add_get("/{name}", handle)
    path = tmp_path / "s.sock"
    async with serving_unix(app, path), aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as http:
        async with http.get("http://x/gone") as answer:
            assert answer.status == 410
        async with http.get("http://x/wrong") as answer:
            assert answer.status == 500

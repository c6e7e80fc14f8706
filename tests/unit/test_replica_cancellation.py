"""A caller that goes away cancels the work done for it."""

import threading
from collections.abc import AsyncIterator, Iterator

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest

import snowdrop as sd
from replica_helpers import WAIT_S_MAX, Caller, post, started
from snowdrop.replica.app import ServiceApp

pytestmark = pytest.mark.anyio

SEEN_S_MAX = 5


async def _in_flight(app: ServiceApp) -> int:
    return (await post(app, "/-/stats", method="GET")).json()["in_flight"]


async def test_an_async_handler_is_cancelled() -> None:
    begun, ended = anyio.Event(), anyio.Event()

    @sd.service()
    class Service:
        @sd.endpoint("/wait")
        async def wait(self) -> str:
            begun.set()
            try:
                await anyio.sleep_forever()
            finally:
                ended.set()
            return ""

    async with started(Service) as app, anyio.create_task_group() as group:
        caller = Caller(app)
        group.start_soon(caller.send, "/wait")
        await begun.wait()
        assert await _in_flight(app) == 1
        caller.leave()
        with anyio.fail_after(WAIT_S_MAX):
            await ended.wait()
    assert caller.answer.status == 0
    assert await _in_flight(app) == 0


async def test_a_sync_handler_sees_cancelled_and_keeps_its_slot_until_it_returns() -> None:
    begun, seen, leave = anyio.Event(), anyio.Event(), threading.Event()

    @sd.service()
    class Service:
        @sd.endpoint("/wait")
        def wait(self) -> str:
            anyio.from_thread.run_sync(begun.set)
            while not sd.cancelled() and not leave.wait(0.001):
                pass
            if sd.cancelled():
                anyio.from_thread.run_sync(seen.set)
            leave.wait(WAIT_S_MAX)
            return ""

    async with started(Service) as app:
        async with anyio.create_task_group() as group:
            caller = Caller(app)
            group.start_soon(caller.send, "/wait")
            await begun.wait()
            caller.leave()
            try:
                with anyio.fail_after(SEEN_S_MAX):
                    await seen.wait()
                assert await _in_flight(app) == 1
            finally:
                leave.set()
        assert await _in_flight(app) == 0


async def test_an_async_generator_is_closed() -> None:
    closed = anyio.Event()

    @sd.service()
    class Service:
        @sd.endpoint("/stream")
        async def stream(self) -> AsyncIterator[int]:
            try:
                yield 1
                await anyio.sleep_forever()
            finally:
                closed.set()

    async with started(Service) as app, anyio.create_task_group() as group:
        caller = Caller(app)
        group.start_soon(caller.send, "/stream")
        await caller.chunk_seen.wait()
        caller.leave()
        with anyio.fail_after(WAIT_S_MAX):
            await closed.wait()
    assert not caller.answer.is_complete


async def test_a_sync_generator_is_closed() -> None:
    closed, proceed = threading.Event(), threading.Event()
    kept: list[Iterator[int]] = []  # or the collector would close it

    def items() -> Iterator[int]:
        try:
            yield 1
            proceed.wait(WAIT_S_MAX)
            yield 2
        finally:
            closed.set()

    @sd.service()
    class Service:
        @sd.endpoint("/stream")
        def stream(self) -> Iterator[int]:
            kept.append(items())
            return kept[0]

    async with started(Service) as app:
        async with anyio.create_task_group() as group:
            caller = Caller(app)
            group.start_soon(caller.send, "/stream")
            await caller.chunk_seen.wait()
            caller.leave()
            for _ in range(5):  # the watcher sees it before the step under way ends
                await anyio.lowlevel.checkpoint()
            proceed.set()
        assert await _in_flight(app) == 0
    assert closed.is_set()
    assert caller.answer.chunks == [b"data: 1\n\n"]

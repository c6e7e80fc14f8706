"""Calls, cancellations, dying replicas and changing routes in any order: in the end nothing is held by anybody.

The carrier, the brokers, the owner and the queue are the real ones, for two workers; only replicas are played.
Events fall between any two steps of the event loop, so also between a grant and its use.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.abc
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict

from platform_helpers import KEY, call, replica_route, route
from snowdrop.domain.errors import RevisionFailedError, SnowdropError
from snowdrop.domain.service import QueueSpec
from snowdrop.gateway.broker import LocalBroker
from snowdrop.gateway.call import BufferSink, WaitOptions
from snowdrop.gateway.carrier import Carrier
from snowdrop.gateway.effects import Now
from snowdrop.gateway.owner import Owner
from snowdrop.gateway.queue import QueueCore
from snowdrop.gateway.upstream.connection import BrokenError, UnconnectedError
from snowdrop.wire.control import RouteChanged
from snowdrop.wire.slots import WaitNews

QUEUE = QueueSpec(length_max=6, wait_s_max=20.0, progress_first_s=0.0, progress_every_s=0.1, order="fair")
FATES = ("answers", "answers", "hangs", "breaks", "unconnected")


class Played:
    """An answer of a played replica."""

    status = 200
    content_length = None
    headers: CIMultiDict[str] = CIMultiDict()

    def __init__(self, fate: str) -> None:
        self.fate = fate

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"part"
        await asyncio.sleep(0)
        if self.fate == "breaks":
            raise BrokenError("it died")
        if self.fate == "hangs":
            await anyio.sleep_forever()


class Replicas:
    """Stands for the connections to replicas; counts who works on how much."""

    def __init__(self, fates: list[str]) -> None:
        self.fates = fates
        self.working: dict[str, int] = {}
        self.most: dict[str, int] = {}

    @asynccontextmanager
    async def exchange(self, socket_path: str, *_request: Any) -> AsyncIterator[Played]:
        fate = self.fates.pop() if self.fates else "answers"
        await asyncio.sleep(0)
        if fate == "unconnected":
            raise UnconnectedError("nobody there")
        self.working[socket_path] = self.working.get(socket_path, 0) + 1
        self.most[socket_path] = max(self.most.get(socket_path, 0), self.working[socket_path])
        try:
            yield Played(fate)
        finally:
            self.working[socket_path] -= 1


class Sink(BufferSink):
    async def progress(self, news: WaitNews) -> None:
        await asyncio.sleep(0)


events = st.one_of(
    st.tuples(st.just("call"), st.integers(0, 1), st.booleans()),
    st.tuples(st.just("call"), st.integers(0, 1), st.booleans()),
    st.tuples(st.just("cancel"), st.integers(0, 30), st.just(False)),
    st.tuples(st.just("steps"), st.integers(1, 6), st.just(False)),
    st.tuples(st.just("route"), st.integers(0, 3), st.booleans()),
    st.tuples(st.just("tick"), st.integers(0, 15), st.just(False)),
    st.tuples(st.just("worker"), st.integers(0, 1), st.just(False)),
)


class World:
    def __init__(self, fates: list[str]) -> None:
        self.core = QueueCore(keys_required=False)
        self.owner = Owner(self.core, "gw")
        self.replicas = Replicas(fates)
        self.carriers = [
            Carrier(LocalBroker(self.owner, f"w-{n}"), self.replicas)  # type: ignore[arg-type]
            for n in range(2)
        ]
        self.scopes: list[anyio.CancelScope] = []
        self.ended: list[str] = []
        self.now_s = 1.0

    async def carry(self, worker: int, progress: bool) -> None:
        with anyio.CancelScope() as scope:
            self.scopes.append(scope)
            sink = Sink(1 << 20)
            wait = WaitOptions(progress=progress)
            try:
                await self.carriers[worker].carry(call(wait=wait, label=f"caller-{worker}"), sink)
                self.ended.append("broken" if sink.error else "answered")
            except SnowdropError as error:
                self.ended.append(error.kind)
        if scope.cancelled_caught:
            self.ended.append("cancelled")

    def change(self, replicas: int, refused: bool) -> None:
        table = route(
            *(replica_route(f"rep-{n}", concurrency=2) for n in range(replicas)),
            queue=QUEUE,
            refusal=RevisionFailedError("no").body() if refused and not replicas else None,
        )
        self.owner.from_control(RouteChanged(generation=1, tenant=KEY[0], deployment=KEY[1], route=table))

    def tick(self, seconds: float) -> None:
        self.now_s += seconds
        self.owner._carry_out(self.core.tick(Now(self.now_s, int(self.now_s * 1e9))))

    async def happen(self, tasks: anyio.abc.TaskGroup, event: tuple[str, int, bool]) -> None:
        what, number, flag = event
        if what == "call":
            tasks.start_soon(self.carry, number, flag)
        elif what == "cancel" and self.scopes:
            self.scopes[number % len(self.scopes)].cancel()
        elif what == "steps":
            for _ in range(number):
                await asyncio.sleep(0)
        elif what == "route":
            self.change(number, flag)
        elif what == "tick":
            self.tick(number)
        elif what == "worker":
            # The owner takes a worker for dead; its relay does not know and gives back what is not its any more.
            self.core.worker_gone(f"w-{number}", Now(self.now_s, 1))


async def live(script: list[tuple[str, int, bool]], fates: list[str]) -> World:
    world = World(list(fates))
    world.change(1, refused=False)
    async with anyio.create_task_group() as tasks:
        for event in script:
            await world.happen(tasks, event)
        await asyncio.sleep(0)
        for scope in world.scopes:
            scope.cancel()
    return world


@settings(max_examples=300, deadline=None)
@given(st.lists(events, max_size=40), st.lists(st.sampled_from(FATES), max_size=20))
def test_in_flight_returns_to_zero_whatever_happens(script: list[tuple[str, int, bool]], fates: list[str]) -> None:
    world = asyncio.run(live(script, fates))
    core = world.core
    assert not core.busy
    assert not core._tickets
    assert not core._leases
    assert all(gauge.in_flight == gauge.queued == 0 for gauge in core.gauges())
    for deployment in core._deployments.values():
        assert not deployment.curious
        assert not deployment.times._granted_s
    assert not any(world.replicas.working.values())
    if not any(event[0] == "worker" for event in script):
        assert all(most <= 2 for most in world.replicas.most.values()), "above its concurrency"
    calls = sum(1 for event in script if event[0] == "call")
    assert len(world.ended) == calls, "a call that ended neither well nor badly"

"""Time limits that share one timer: they end what lasts too long, and nothing else, on a clock set by hand."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from snowdrop.gateway.bounds import Bounds

BOUND_S = 100.0


class HandClock(asyncio.SelectorEventLoop):
    """Its time goes on when it is told to, beside the little that really passes."""

    ahead_s = 0.0
    timers = 0

    def time(self) -> float:
        return super().time() + self.ahead_s

    def call_at(self, when, callback, *args, context=None):  # type: ignore[no-untyped-def]
        self.timers += 1
        return super().call_at(when, callback, *args, context=context)

    async def pass_s(self, seconds: float) -> None:
        """So much time passes, and what is due happens."""
        await asyncio.sleep(0)  # what was begun before begins before
        self.ahead_s += seconds
        for _ in range(5):
            await asyncio.sleep(0)


def run(scene: Callable[[HandClock, Bounds], Awaitable[None]]) -> None:
    loop = HandClock()

    async def play() -> None:
        await scene(loop, Bounds())

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(play())


async def held(bounds: Bounds, seconds: float) -> str:
    with pytest.raises(TimeoutError) as raised, bounds.within(seconds):
        await asyncio.get_running_loop().create_future()
    assert isinstance(raised.value.__cause__, asyncio.CancelledError)
    return "over"


def test_each_ends_at_its_own_time_in_whatever_order_they_began() -> None:
    async def scene(loop: HandClock, bounds: Bounds) -> None:
        async with asyncio.TaskGroup() as tasks:
            middle, late, early = (
                tasks.create_task(held(bounds, seconds)) for seconds in (2 * BOUND_S, 3 * BOUND_S, BOUND_S)
            )
            await loop.pass_s(BOUND_S - 1)
            assert not early.done()
            await loop.pass_s(2)
            assert early.done()
            assert not middle.done()
            await loop.pass_s(BOUND_S)
            assert middle.done()
            assert not late.done()
            await loop.pass_s(BOUND_S)
            assert {each.result() for each in (early, middle, late)} == {"over"}

    run(scene)


def test_who_leaves_in_time_is_not_cancelled_later_and_thousands_set_one_timer() -> None:
    async def scene(loop: HandClock, bounds: Bounds) -> None:
        before = loop.timers
        for _ in range(5_000):
            with bounds.within(BOUND_S):
                await asyncio.sleep(0)
        assert loop.timers == before + 1
        await loop.pass_s(2 * BOUND_S)
        assert loop.timers == before + 1  # nobody is here: nothing more is set
        async with asyncio.TaskGroup() as tasks:
            later = tasks.create_task(held(bounds, BOUND_S))
            await loop.pass_s(1)
            await loop.pass_s(BOUND_S)
            assert later.result() == "over"

    run(scene)


def test_an_error_inside_and_a_cancellation_from_outside_pass_as_they_are() -> None:
    async def scene(loop: HandClock, bounds: Bounds) -> None:
        with pytest.raises(ValueError, match="inside"), bounds.within(BOUND_S):
            raise ValueError("inside")
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(held(bounds, BOUND_S))
            await loop.pass_s(1)
            task.cancel()
            await loop.pass_s(1)
            assert task.cancelled()
        await loop.pass_s(2 * BOUND_S)

    run(scene)


def test_a_cancellation_that_meets_the_end_of_the_time_wins() -> None:
    async def scene(loop: HandClock, bounds: Bounds) -> None:
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(held(bounds, BOUND_S))
            await loop.pass_s(1)
            loop.call_soon(task.cancel)
            loop.ahead_s += BOUND_S
            await loop.pass_s(0)
            assert task.cancelled()

    run(scene)


def test_time_that_is_over_within_another_limit_ends_only_the_inner_one() -> None:
    async def scene(loop: HandClock, bounds: Bounds) -> None:
        async def nested() -> str:
            with bounds.within(2 * BOUND_S):
                inner = await held(bounds, BOUND_S)
                await asyncio.sleep(0)
                return inner

        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(nested())
            await loop.pass_s(1)
            await loop.pass_s(BOUND_S)
            assert task.result() == "over"

    run(scene)

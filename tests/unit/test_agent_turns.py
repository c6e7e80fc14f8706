"""Turns of replicas that start at once: few at a time, in order, and never a reason not to start."""

from __future__ import annotations

import anyio
import pytest
from anyio.lowlevel import checkpoint

from snowdrop.agent import turns as module
from snowdrop.agent.turns import Turns
from snowdrop.domain.errors import InvalidInputError

pytestmark = pytest.mark.anyio
WAIT_S_MAX = 10.0


async def settle() -> None:
    for _ in range(20):
        await checkpoint()


async def test_few_begin_at_a_time_first_come_first_served() -> None:
    turns = Turns(2)
    begun: list[tuple[str, int]] = []

    async def begin(name: str) -> None:
        begun.append((name, await turns.take()))

    with anyio.fail_after(WAIT_S_MAX):
        async with anyio.create_task_group() as tasks:
            for name in "abcde":
                tasks.start_soon(begin, name)
            await settle()
            assert [name for name, _ in begun] == ["a", "b"]
            turns.give_back(begun[1][1])
            turns.give_back(begun[1][1])  # twice makes no room for two
            await settle()
            assert [name for name, _ in begun] == ["a", "b", "c"]
            while len(begun) < 5:
                turns.give_back(begun[len(begun) - 1][1])
                await settle()
    assert [name for name, _ in begun] == list("abcde")


async def test_who_waits_no_longer_leaves_the_turn_to_the_next() -> None:
    turns = Turns(1)
    held = await turns.take()
    begun: list[str] = []

    async def begin(name: str, scope: anyio.CancelScope) -> None:
        with scope:
            await turns.take()
            begun.append(name)

    with anyio.fail_after(WAIT_S_MAX):
        async with anyio.create_task_group() as tasks:
            scopes = [anyio.CancelScope() for _ in range(2)]
            for name, scope in zip("ab", scopes, strict=True):
                tasks.start_soon(begin, name, scope)
            await settle()
            scopes[0].cancel()
            await settle()
            turns.give_back(held)
    assert begun == ["b"]


async def test_a_turn_that_takes_long_holds_up_nobody_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TURN_S_MAX", 0.01)
    turns = Turns(1)
    with anyio.fail_after(WAIT_S_MAX / 4):  # less than WAIT_S_MAX of the turns
        for _ in range(3):
            await turns.take()


async def test_who_has_waited_long_enough_begins_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TURN_S_MAX", 3600.0)
    monkeypatch.setattr(module, "WAIT_S_MAX", 0.01)
    turns = Turns(1)
    with anyio.fail_after(WAIT_S_MAX):
        for _ in range(3):
            await turns.take()
    assert turns.held == 3


def test_as_many_as_processors_and_never_less_than_none() -> None:
    assert Turns().held == 0
    with pytest.raises(InvalidInputError, match="negative"):
        Turns(-1)

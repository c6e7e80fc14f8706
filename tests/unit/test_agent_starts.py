"""Completing images behind their starts, and starts that the data plane does not know."""

from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from snowdrop.agent import starts as starts_module
from snowdrop.agent.starts import FILLS_MAX, TRIES_MAX, ImageStarts
from snowdrop.domain.errors import NotFoundError, StorageFullError, UnavailableError
from snowdrop.domain.ids import DEFAULT_TENANT, Digest

pytestmark = pytest.mark.anyio

TURNS = 30
UNAVAILABLE = UnavailableError("the origin is away", where="test")


async def settle() -> None:
    for _ in range(TURNS):
        await anyio.lowlevel.checkpoint()


def image(number: int) -> Digest:
    return Digest(f"blake3:{number:064x}")


class Mount:
    """As much of an ImageMount as is asked here: `complete` fails as often as there are errors."""

    def __init__(self, log: list[str], name: str, *errors: Exception) -> None:
        self.log, self.name, self.errors = log, name, list(errors)
        self.gate: anyio.Event | None = None

    async def complete(self) -> None:
        self.log.append(self.name)
        if self.gate is not None:
            await self.gate.wait()
        await anyio.lowlevel.checkpoint()
        if self.errors:
            raise self.errors.pop(0)


class Plane:
    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def begin_start(self, *_: object, **__: object) -> None:
        raise UNAVAILABLE

    async def ask(self, make: Callable[..., Any], _wanted: object) -> Any:
        self.asked.append(make(request=1))
        raise NotFoundError("nothing has begun to start", where="test")


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> ImageStarts:
    monkeypatch.setattr(starts_module, "REST_S", 0.0)
    plane: Any = Plane()

    async def current() -> Any:
        return plane

    return ImageStarts(current)


async def test_images_are_completed_one_after_the_other_each_once(starts: Any) -> None:
    log: list[str] = []
    one, two = Mount(log, "one"), Mount(log, "two")
    one.gate = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(starts.run)
        await settle()
        starts.complete(image(1), one)
        starts.complete(image(2), two)
        starts.complete(image(1), one)
        await settle()
        assert log == ["one"]
        one.gate.set()
        await settle()
        assert log == ["one", "two"]
        starts.complete(image(1), one)
        await settle()
        assert log == ["one", "two", "one"]
        tasks.cancel_scope.cancel()


async def test_an_origin_that_is_away_is_tried_again_a_bounded_number_of_times(starts: Any) -> None:
    log: list[str] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(starts.run)
        starts.complete(image(1), Mount(log, "back", UNAVAILABLE, UNAVAILABLE))
        starts.complete(image(2), Mount(log, "away", *[UNAVAILABLE] * 99))
        starts.complete(image(3), Mount(log, "full", StorageFullError("full", where="disk")))
        starts.complete(image(4), Mount(log, "next"))
        await settle()
        await settle()
        tasks.cancel_scope.cancel()
    assert log == [*["back"] * 3, *["away"] * TRIES_MAX, "full", "next"]


async def test_an_image_that_nobody_has_mounted_is_not_begun_and_not_tried_again(starts: Any) -> None:
    log: list[str] = []
    gone = Mount(log, "gone", *[UNAVAILABLE] * 9)
    gone.gate = anyio.Event()
    async with anyio.create_task_group() as tasks:
        starts.complete(image(1), gone)
        starts.complete(image(2), Mount(log, "waits"))
        tasks.start_soon(starts.run)
        await settle()
        starts.forget(image(1))
        starts.forget(image(2))
        gone.gate.set()
        await settle()
        tasks.cancel_scope.cancel()
    assert log == ["gone"]


async def test_nothing_is_completed_while_something_starts_which_has_a_bound(
    starts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(starts.run)
        for holder in ("rep-1", "rep-2"):
            await starts.begin(DEFAULT_TENANT, image(1), "mnt-1", holder, "python -m app", record=False)
        starts.complete(image(1), Mount(log, "one"))
        starts.over("rep-1")
        await settle()
        assert log == []
        await starts.ready("rep-2")
        await settle()
        assert log == ["one"]
        await starts.begin(DEFAULT_TENANT, image(1), "mnt-1", "rep-3", "python -m app", record=False)
        monkeypatch.setattr(starts_module, "STARTING_S_MAX", 0.0)
        starts.complete(image(1), Mount(log, "two"))
        await settle()
        assert log == ["one", "two"]
        tasks.cancel_scope.cancel()


async def test_what_waits_to_be_completed_is_bounded(starts: Any) -> None:
    log: list[str] = []
    for number in range(FILLS_MAX + 9):
        starts.complete(image(number), Mount(log, str(number)))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(starts.run)
        for _ in range(2 * FILLS_MAX):
            await anyio.lowlevel.checkpoint()
        await settle()
        tasks.cancel_scope.cancel()
    assert len(log) == FILLS_MAX


async def test_a_start_goes_on_whatever_the_data_plane_says_of_it(starts: Any) -> None:
    await starts.begin(DEFAULT_TENANT, image(1), "mnt-1", "rep-1", "python -m app", record=True)
    assert await starts.ready("rep-1") is None
    assert await starts.told("rep-1") is None

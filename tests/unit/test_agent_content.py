"""The keeper of the data plane: starts it again when it is gone, and has pins renewed."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from agent_helpers import WAIT_S_MAX
from snowdrop.agent import content as content_module
from snowdrop.agent.content import DataPlaneKeeper
from snowdrop.content.settings import DataPlaneSettings
from snowdrop.domain.errors import PlatformDownError

pytestmark = pytest.mark.anyio


class FakeProcess:
    def __init__(self) -> None:
        self.ended = anyio.Event()
        self.killed = False
        self.lingers = False

    async def __aenter__(self) -> FakeProcess:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def wait(self) -> int:
        if self.lingers and not self.killed:
            await anyio.sleep_forever()
        return 0

    def kill(self) -> None:
        self.killed = True


class FakePlane:
    def __init__(self) -> None:
        self.gone = anyio.Event()

    async def run(self) -> None:
        await self.gone.wait()


class KeeperBench:
    def __init__(self, folder: Path) -> None:
        settings = DataPlaneSettings(
            origin_url="file:///nowhere",
            cache_directory=str(folder),
            ram_bytes_max=1,
            disk_bytes_max=1,
            fetch_threads=1,
        )
        self.keeper = DataPlaneKeeper(settings, self.renew)
        self.started: list[tuple[FakeProcess, FakePlane]] = []
        self.renewed: list[FakePlane] = []
        self.may_start = anyio.Event()
        self.may_start.set()

    async def renew(self, plane: FakePlane) -> None:
        self.renewed.append(plane)

    async def start(self, _settings: DataPlaneSettings) -> tuple[FakeProcess, FakePlane]:
        await self.may_start.wait()
        self.started.append((FakeProcess(), FakePlane()))
        return self.started[-1]

    async def restarted(self) -> None:
        with anyio.fail_after(WAIT_S_MAX):
            while not self.renewed:
                await anyio.sleep(0.001)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KeeperBench:
    made = KeeperBench(tmp_path)
    monkeypatch.setattr(content_module, "start_process", made.start)
    monkeypatch.setattr(content_module, "RESTART_S", 0.001)
    monkeypatch.setattr(content_module, "WAIT_S_MAX", 0.01)
    monkeypatch.setattr(content_module, "EXIT_S_MAX", 0.005)
    return made


async def test_the_first_has_no_pins_to_renew(bench: KeeperBench) -> None:
    async with anyio.create_task_group() as tasks:
        await tasks.start(bench.keeper.run)
        assert await bench.keeper.current() is bench.started[0][1]
        assert (bench.renewed, bench.keeper.restarts) == ([], 0)
        tasks.cancel_scope.cancel()


async def test_one_that_is_gone_is_replaced_and_pins_are_renewed_there(bench: KeeperBench) -> None:
    async with anyio.create_task_group() as tasks:
        await tasks.start(bench.keeper.run)
        process, plane = bench.started[0]
        plane.gone.set()
        await bench.restarted()
        assert bench.renewed == [bench.started[1][1]]
        assert await bench.keeper.current() is bench.started[1][1]
        assert (bench.keeper.restarts, process.killed) == (1, False)
        tasks.cancel_scope.cancel()


async def test_one_that_hangs_without_its_channel_is_killed(bench: KeeperBench) -> None:
    async with anyio.create_task_group() as tasks:
        await tasks.start(bench.keeper.run)
        process, plane = bench.started[0]
        process.lingers = True
        plane.gone.set()
        await bench.restarted()
        assert process.killed
        tasks.cancel_scope.cancel()


async def test_without_one_the_wait_is_bounded_and_says_so(bench: KeeperBench) -> None:
    async with anyio.create_task_group() as tasks:
        await tasks.start(bench.keeper.run)
        bench.may_start = anyio.Event()
        bench.started[0][1].gone.set()
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
        with pytest.raises(PlatformDownError, match="data plane does not start"):
            await bench.keeper.current()
        bench.may_start.set()
        await bench.restarted()
        assert await bench.keeper.current() is bench.started[1][1]
        tasks.cancel_scope.cancel()


async def test_one_that_cannot_be_started_again_is_tried_again(
    bench: KeeperBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [BlockingIOError(11, "Resource temporarily unavailable")]

    async def start(settings: DataPlaneSettings) -> tuple[FakeProcess, FakePlane]:
        if bench.started and failures:
            raise failures.pop()
        return await bench.start(settings)

    monkeypatch.setattr(content_module, "start_process", start)
    async with anyio.create_task_group() as tasks:
        await tasks.start(bench.keeper.run)
        bench.started[0][1].gone.set()
        await bench.restarted()
        assert failures == []
        tasks.cancel_scope.cancel()

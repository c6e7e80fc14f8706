"""When writing behind begins: not before the load has begun well, unless somebody waits for the directory."""

import threading
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from content_helpers import CountingOrigin, noise, push, safetensors_bytes, settings_for
from snowdrop.content import completing
from snowdrop.content.behind import FilledArea
from snowdrop.content.landing import Landing
from snowdrop.content.store import open_store
from snowdrop.domain.ids import DEFAULT_TENANT

pytestmark = pytest.mark.anyio
WAIT_S_MAX = 10.0


class Halting(CountingOrigin):
    """Gives `count` ranges of packs at once, the others when `go` is set."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.go = threading.Event()
        self._left = threading.Semaphore(count)

    def read_range(self, key: str, offset: int, into: memoryview) -> None:
        if "/packs/" in key and not self._left.acquire(blocking=False):
            assert self.go.wait(WAIT_S_MAX)
        super().read_range(key, offset, into)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether all of the area was there, at each look for what can be written; loads are held for an hour."""
    monkeypatch.setattr(completing, "HOLD_S", 3600.0)
    found: list[bool] = []
    write_behind = Landing.write_behind

    def look(self: Landing, area: FilledArea, budget_bytes: int) -> int:
        found.append(all(area.is_filled(chunk) for chunk in area.layout.places))
        return write_behind(self, area, budget_bytes)

    monkeypatch.setattr(Landing, "write_behind", look)
    return found


def write_parts(root: Path) -> Path:
    root.mkdir()
    tensors = {f"t{index}": ("U8", [1 << 20], noise(1 << 20, index)) for index in range(8)}
    (root / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    return root


async def test_a_load_begins_without_the_disk_and_is_written_once_all_is_there(
    tmp_path: Path, looks: list[bool]
) -> None:
    origin, source = Halting(1), write_parts(tmp_path / "m")
    digest = push(source, origin).artefact.manifest
    async with open_store(settings_for(tmp_path / "cache", fetch_threads=1), origin=origin) as store:
        landed = await store.ensure(DEFAULT_TENANT, digest, "h", map_tensors=True)
        assert landed.wake is not None
        await anyio.to_thread.run_sync(landed.wake.recv, 1)
        landed.wake.close()
        origin.go.set()
        await store.wait_filled(digest, "h")
        with anyio.fail_after(WAIT_S_MAX):
            while not store.landing_of(digest).is_complete:
                await anyio.sleep(0.001)
        assert looks
        assert all(looks)


async def test_who_waits_for_the_directory_does_not_wait_for_the_load(tmp_path: Path, looks: list[bool]) -> None:
    origin, source = Halting(1), write_parts(tmp_path / "m")
    digest = push(source, origin).artefact.manifest
    async with open_store(settings_for(tmp_path / "cache", fetch_threads=1), origin=origin) as store:
        landed = await store.ensure(DEFAULT_TENANT, digest, "h", map_tensors=True)
        assert landed.wake is not None
        with anyio.fail_after(WAIT_S_MAX):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(store.wait_directory, digest)
                while not looks:
                    await anyio.sleep(0.001)
                assert looks[0] is False
                origin.go.set()
        assert (landed.directory / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
        landed.wake.close()

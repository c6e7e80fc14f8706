"""Whole loads of a model from an origin that misbehaves: the reader survives, the store verifies."""

from __future__ import annotations

import random
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from content_helpers import push, settings_for, write_model
from origin_servers import Asked, Fault, FaultyServer, Plan
from snowdrop.content.origin import MemoryOrigin, OriginOptions
from snowdrop.content.origin.objects import ObjectStoreOrigin
from snowdrop.content.origin.race import RaceLimits
from snowdrop.content.origin.ranges import ReadLimits
from snowdrop.content.progress import FillState
from snowdrop.content.store import ContentStore, Landed, open_store
from snowdrop.domain.errors import IntegrityError, OriginRefusedError, UnavailableError
from snowdrop.domain.ids import DEFAULT_TENANT, Digest, TenantId
from snowdrop.policy.hedge import HedgeLimits

pytestmark = pytest.mark.anyio

WAIT_S_MAX = 30.0


def close_wake(landed: Landed) -> None:
    """Nobody listens to it here."""
    if landed.wake is not None:
        landed.wake.close()


class Loading:
    """A pushed model behind a faulty server, and a store that loads it."""

    def __init__(self, server: FaultyServer, store: ContentStore, digest: Digest, source: Path) -> None:
        self.server = server
        self.store = store
        self.digest = digest
        self.source = source

    async def load(self) -> None:
        """Loads and compares every byte of the weights."""
        landed = await self.store.ensure(DEFAULT_TENANT, self.digest, "h", map_tensors=True)
        close_wake(landed)
        await self.store.wait_filled(self.digest, "h")
        assert landed.area is not None
        file = landed.area.layout.files[0]
        with landed.area.use():
            got = bytes(landed.area.window(file.offset, file.size))
        assert got == (self.source / "model.safetensors").read_bytes()


@asynccontextmanager
async def loading(tmp_path: Path, plan: Plan, **limits: int) -> AsyncIterator[Loading]:
    source, memory = write_model(tmp_path / "model"), MemoryOrigin()
    digest = push(source, memory).artefact.manifest
    bounds = ReadLimits(race=RaceLimits(stall_s_max=0.3, hedge=HedgeLimits(unknown_s=0.1, samples_min=1_000_000)))
    with FaultyServer(memory.objects, plan).running() as server:
        origin = ObjectStoreOrigin(
            server.url, OriginOptions(), limits=bounds, pause=lambda pause_s: None, rng=random.Random(1)
        )
        try:
            with anyio.fail_after(WAIT_S_MAX):
                async with open_store(settings_for(tmp_path / "cache", **limits), origin=origin) as store:
                    yield Loading(server, store, digest, source)
        finally:
            origin.close()


async def test_a_load_through_every_kind_of_fault_ends_right(tmp_path: Path) -> None:
    rng = random.Random(7)
    faults = [
        None,
        Fault(status=500),
        Fault(status=503),
        Fault(status=429, headers=("Retry-After: 0",)),
        Fault(after=1000, end="reset"),
        Fault(after=70_000, end="close"),
        Fault(after=5, end="stall"),
        Fault(head=b"HTTP/1.1 garbage\r\n\r\n"),
        Fault(shift=1),
        Fault(whole=True),
    ]
    async with loading(tmp_path, lambda asked: rng.choice(faults)) as it:
        await it.load()
        assert len(it.server.asked) > 2


async def test_bytes_that_came_wrong_once_are_asked_for_again(tmp_path: Path) -> None:
    seen: set[tuple[str, int]] = set()

    def plan(asked: Asked) -> Fault | None:
        is_first = (asked.key, asked.first) not in seen
        seen.add((asked.key, asked.first))
        return Fault(flip=True) if is_first and "/packs/" in asked.key else None

    async with loading(tmp_path, plan) as it:
        await it.load()


async def test_bytes_that_are_always_wrong_are_never_served_and_named(tmp_path: Path) -> None:
    def plan(asked: Asked) -> Fault | None:
        return Fault(flip=True) if "/packs/" in asked.key else None

    async with loading(tmp_path, plan) as it:
        with pytest.raises(IntegrityError, match="pack"):
            await it.load()


async def test_an_origin_that_goes_down_in_the_middle_is_a_clear_error(tmp_path: Path) -> None:
    packs = [0]

    def plan(asked: Asked) -> Fault | None:
        packs[0] += "/packs/" in asked.key
        return Fault(status=503) if packs[0] > 1 else None

    async with loading(tmp_path, plan) as it:
        with pytest.raises(UnavailableError, match="503") as caught:
            await it.load()
        assert it.server.url in caught.value.where
        assert caught.value.next_step


async def test_credentials_that_are_taken_away_are_a_clear_error(tmp_path: Path) -> None:
    async with loading(tmp_path, lambda asked: Fault(status=403) if "/packs/" in asked.key else None) as it:
        with pytest.raises(OriginRefusedError, match="403"):
            await it.load()


class TwoTenants(MemoryOrigin):
    """Notes the packs that are read, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[str] = []

    def read_range(self, key: str, offset: int, into: memoryview) -> None:
        if "/packs/" in key:
            self.read.append(key)
        super().read_range(key, offset, into)


async def test_a_tenant_at_its_limit_holds_up_no_other_one(tmp_path: Path) -> None:
    """One thread for both. The first tenant's load would take an hour at its limit; the second one ends."""
    origin = TwoTenants()
    slow = push(write_model(tmp_path / "slow", seed=1), origin).artefact.manifest
    before = set(origin.objects)
    quick_source = tmp_path / "quick"
    quick_source.mkdir()
    (quick_source / "data.bin").write_bytes(random.Random(2).randbytes(50_000))
    quick = push(quick_source, origin).artefact.manifest
    quick_packs = set(origin.objects) - before
    settings = settings_for(tmp_path / "cache", fetch_threads=1, tenant_bytes_per_s_max=1_500)
    with anyio.fail_after(WAIT_S_MAX):
        async with open_store(settings, origin=origin) as store:
            async with anyio.create_task_group() as tasks:
                started = anyio.Event()

                async def load_slowly() -> None:
                    started.set()
                    close_wake(await store.ensure(TenantId("slow"), slow, "s", map_tensors=True))
                    await store.wait_filled(slow, "s")

                tasks.start_soon(load_slowly)
                await started.wait()
                while not origin.read:
                    await anyio.sleep(0.01)
                landed = await store.ensure(TenantId("quick"), quick, "q", map_tensors=True)
                assert (landed.directory / "data.bin").read_bytes() == (quick_source / "data.bin").read_bytes()
                tasks.cancel_scope.cancel()
            assert quick_packs & set(origin.read)
            assert len([key for key in origin.read if key not in quick_packs]) <= 2


async def test_a_load_that_is_given_up_ends_the_reads_that_are_under_way(tmp_path: Path) -> None:
    reached = threading.Event()

    def plan(asked: Asked) -> Fault | None:
        if "/packs/" not in asked.key:
            return None
        reached.set()
        return Fault(after=10, end="stall")

    async with loading(tmp_path, plan) as it:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(it.load)
            await anyio.to_thread.run_sync(reached.wait, WAIT_S_MAX)
            tasks.cancel_scope.cancel()
        it.store.release("h")
        given_up = len(it.server.asked)
        await it.store.wait_quiet()
        asked = len(it.server.asked)
        assert asked <= given_up + 4  # one look of each thread; left alone a read would try eight times
        it.server.plan = lambda asked: None
        await it.load()
        assert len(it.server.asked) > asked


async def test_a_wait_that_begins_after_the_load_has_failed_ends_too(tmp_path: Path) -> None:
    def plan(asked: Asked) -> Fault | None:
        return Fault(status=403) if "/packs/" in asked.key and asked.last - asked.first > 1 << 20 else None

    async with loading(tmp_path, plan) as it:
        landed = await it.store.ensure(DEFAULT_TENANT, it.digest, "h", map_tensors=True)
        close_wake(landed)
        assert landed.area is not None
        while landed.area.progress.state is not FillState.FAILED:
            await anyio.sleep(0.01)
        with pytest.raises(OriginRefusedError, match="403"):
            await it.store.wait_filled(it.digest, "h")

"""Upkeep of a node over the data plane's channel: figures, verification with mending, pins that last, eviction."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import anyio
import pytest

from content_helpers import CountingOrigin, noise, push, settings_for, write_model
from snowdrop.agent.dataplane.client import DataPlane
from snowdrop.agent.dataplane.server import serve_store
from snowdrop.content.area import Area
from snowdrop.content.durable_pins import DurablePins
from snowdrop.content.store import ContentStore, open_store
from snowdrop.content.upkeep import Upkeep
from snowdrop.domain.errors import StorageFullError
from snowdrop.domain.ids import DEFAULT_TENANT, Digest
from snowdrop.wire.dataplane import Completed
from snowdrop.wire.packet import packet_pair
from snowdrop.wire.upkeep import (
    AskContent,
    AskStats,
    ContentEvicted,
    ContentTold,
    ContentVerified,
    EvictContent,
    NodeContent,
    NodeStats,
    PinContent,
    StatsTold,
    UnpinContent,
    VerifyContent,
)

pytestmark = pytest.mark.anyio
NEVER = 1 << 62


class Bench:
    """A node's data plane over an origin with one model; may be started anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.origin = CountingOrigin()
        self.digest = self.push("one", 0)
        self.plane: DataPlane
        self.store: ContentStore

    def push(self, name: str, seed: int) -> Digest:
        return push(write_model(self.folder / name, seed=seed), self.origin).artefact.manifest

    @asynccontextmanager
    async def node(self, **changes: int) -> AsyncIterator[None]:
        settings = settings_for(self.folder / "cache", **changes)
        async with open_store(settings, origin=self.origin) as store:
            upkeep = Upkeep(store, Path(settings.cache_directory))
            await upkeep.open()
            ours, theirs = packet_pair()
            with theirs:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(upkeep.run)
                    tasks.start_soon(serve_store, theirs, store, upkeep)
                    self.plane, self.store = DataPlane(ours), store
                    await tasks.start(self.plane.run)
                    yield
                    tasks.cancel_scope.cancel()

    async def load(self, digest: Digest | None = None, *, map_tensors: bool = True) -> None:
        """As a replica does that then goes away."""
        wanted = digest or self.digest
        got = await self.plane.ensure(DEFAULT_TENANT, wanted, "replica", map_tensors=map_tensors)
        if map_tensors:
            await self.plane.wait_filled(wanted, "replica")
        await self.plane.wait_directory(wanted)
        got.close()
        await self.plane.release("replica")

    async def stats(self) -> NodeStats:
        return (await self.plane.ask(AskStats, StatsTold)).stats

    async def content(self) -> dict[Digest, NodeContent]:
        told = await self.plane.ask(partial(AskContent, after=""), ContentTold)
        assert told.is_last
        return {item.manifest: item for item in told.content}

    async def verify(self, *, bytes_max: int = 1 << 40) -> ContentVerified:
        make = partial(VerifyContent, manifest=self.digest, key_domain="public", first=0, bytes_max=bytes_max)
        return await self.plane.ask(make, ContentVerified)

    async def pin(self, digest: Digest | None = None, name: str = "one") -> None:
        make = partial(
            PinContent,
            tenant=DEFAULT_TENANT,
            manifest=digest or self.digest,
            key_domain="public",
            name=name,
        )
        await self.plane.ask(make, Completed)

    async def evict(self, *digests: Digest, unused_since: int = NEVER) -> ContentEvicted:
        make = partial(EvictContent, manifests=digests, unused_since_unix_ns=unused_since)
        return await self.plane.ask(make, ContentEvicted)

    def landed(self, path: str) -> Path:
        return self.folder / "cache/artefacts" / self.digest.removeprefix("blake3:") / "tree" / path


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


async def test_figures_of_a_node_that_has_loaded_something(bench: Bench) -> None:
    async with bench.node():
        before = await bench.stats()
        assert (before.artefacts, before.areas, before.pinned, before.served_bytes) == (0, 0, 0, {})
        await bench.load()
        await bench.load()
        stats = await bench.stats()
        assert (stats.artefacts, stats.areas) == (1, 1)
        assert stats.disk_bytes >= 5 << 20
        assert stats.ram_bytes >= 5 << 20
        assert stats.served_bytes["origin"] >= 5 << 20
        assert stats.served_bytes["ram"] >= 5 << 20
        assert (stats.quarantined, stats.scrubbed_never) == (0, 1)
        item = (await bench.content())[bench.digest]
        assert (item.is_held, item.pin, item.disk_bytes > 0, item.ram_bytes > 0) == (False, None, True, True)


async def test_verifying_reads_every_copy_and_finds_it_right(bench: Bench) -> None:
    async with bench.node():
        assert (await bench.verify()).chunk_count == 0, "nothing is here yet"
        await bench.load()
        found = await bench.verify()
        assert found.bad == ()
        assert found.next_chunk == found.chunk_count > 0
        assert found.read_bytes >= 2 * (5 << 20), "on disk and in memory"
        step = await bench.verify(bytes_max=1)
        assert step.next_chunk == 1 < step.chunk_count
        assert not (await bench.content())[bench.digest].is_held


async def test_a_wrong_copy_on_disk_is_found_mended_and_counted(bench: Bench) -> None:
    async with bench.node():
        await bench.load(map_tensors=False)
        path = bench.landed("model.safetensors")
        data = bytearray(path.read_bytes())
        data[3 << 20] ^= 1
        path.write_bytes(data)
        found = await bench.verify()
        assert [(bad.file, bad.tier, bad.problem) for bad in found.bad] == [("model.safetensors", "disk", "")]
        data[3 << 20] ^= 1
        await bench.plane.wait_directory(bench.digest)
        assert path.read_bytes() == bytes(data)
        assert (await bench.verify()).bad == ()
        stats = await bench.stats()
        assert stats.quarantined == 1
        assert [event.file for event in stats.events][:1] == ["model.safetensors"]


async def test_a_wrong_copy_in_memory_is_found_and_mended(bench: Bench) -> None:
    async with bench.node():
        await bench.load()
        (area,) = [area for _, area in bench.store.parts.areas.ram.areas()]
        chunk = max(area.layout.whole, key=lambda index: len(_bytes_of(area, index)))
        with area.use():
            area.chunk(chunk)[100] ^= 1
        found = await bench.verify()
        assert [(bad.chunk, bad.tier, bad.problem) for bad in found.bad] == [(chunk, "ram", "")]
        assert (await bench.verify()).bad == ()


async def test_what_no_source_has_right_is_told_as_not_repaired(bench: Bench) -> None:
    async with bench.node():
        await bench.load(map_tensors=False)
        bench.landed("nested/vocab.txt").write_bytes(noise(70_000, 99))
        bench.origin.flip_byte(noise(70_000, 3)[1000:1100])
        found = await bench.verify()
        assert [bad.file for bad in found.bad] == ["nested/vocab.txt"]
        assert found.bad[0].problem


async def test_a_pin_keeps_content_past_a_restart_and_until_it_is_taken_back(bench: Bench) -> None:
    async with bench.node():
        await bench.load()
        await bench.pin()
        await bench.pin()
        assert (await bench.stats()).pinned == 1
        assert (await bench.content())[bench.digest].pin == "one"
        assert (await bench.evict(bench.digest)).evicted == ()
    async with bench.node(disk_bytes_max=8 << 20):
        # There is room for one of the two: the other must not push out what is pinned.
        other = bench.push("two", 50)
        with pytest.raises(StorageFullError):
            await bench.load(other, map_tensors=False)
        assert bench.digest in await bench.content()
        await bench.plane.ask(partial(UnpinContent, manifest=bench.digest), Completed)
        await bench.load(other, map_tensors=False)
        assert bench.digest not in await bench.content()
    async with bench.node():
        assert (await bench.stats()).pinned == 0


async def test_a_pin_whose_content_has_not_come_is_brought_by_the_next_life(bench: Bench) -> None:
    async with bench.node():
        await bench.pin()
        item = (await bench.content())[bench.digest]
        assert (item.pin, item.disk_bytes) == ("one", 0)
    async with bench.node():
        with anyio.fail_after(10):
            while not bench.landed("model.safetensors").is_file():
                await anyio.sleep(0.01)


async def test_pins_that_make_no_sense_are_set_aside_and_told(tmp_path: Path) -> None:
    (tmp_path / "pins.json").write_text("junk")
    pins = DurablePins(tmp_path / "pins.json")
    assert "set aside" in pins.open()
    assert pins.all() == []
    assert (tmp_path / "pins.bad").read_text() == "junk"


async def test_eviction_takes_what_nobody_holds_from_both_tiers(bench: Bench) -> None:
    async with bench.node():
        await bench.load()
        used = (await bench.content())[bench.digest].used_unix_ns
        assert (await bench.evict(bench.digest, unused_since=used - 1)).evicted == ()
        got = await bench.plane.ensure(DEFAULT_TENANT, bench.digest, "living", map_tensors=True)
        assert (await bench.content())[bench.digest].is_held
        assert (await bench.evict(bench.digest)).evicted == ()
        got.close()
        await bench.plane.release("living")
        await bench.plane.wait_directory(bench.digest)
        done = await bench.evict(bench.digest)
        assert done.evicted == (bench.digest,)
        assert done.disk_bytes >= 5 << 20
        assert done.ram_bytes >= 5 << 20
        assert await bench.content() == {}
        assert not bench.landed("config.json").exists()
        await bench.load()
        assert bench.landed("config.json").is_file()


def _bytes_of(area: Area, chunk: int) -> memoryview:
    with area.use():
        return area.chunk(chunk)

"""The content of one node: ensure, write behind, wait, release. The shell around tiers and fetch.

Loading never waits for the disk: tensor files go from the origin into a landing area, and from there to the
landing directory behind the load. One artefact is fetched by one caller at a time; the next one finds what the
one before has brought, also when that one gave up half-way.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec

from snowdrop.content.area import Area, RamTier
from snowdrop.content.disk import DiskTier
from snowdrop.content.fetch import Fetcher, into_area, into_landing
from snowdrop.content.landing import Landing
from snowdrop.content.layout import PUBLIC_DOMAIN, manifest_key
from snowdrop.content.manifest import decode_manifest
from snowdrop.content.origin import Origin, open_origin
from snowdrop.content.pins import Pins
from snowdrop.content.placement import AreaLayout, area_layout
from snowdrop.content.settings import DataPlaneSettings
from snowdrop.content.source import ChunkSource, PackSource, Tier
from snowdrop.domain.errors import (
    CorruptContentError,
    NotFoundError,
    SnowdropError,
    StorageFullError,
    error_from_body,
)
from snowdrop.domain.ids import Digest, TenantId, fresh_id
from snowdrop.domain.manifest import MANIFEST_BYTES_MAX, Manifest
from snowdrop.domain.receipt import ContentBytes, Span

DIRTY_BYTES_MAX = 64 << 20
"""Written behind but not yet durable, at most so much of an artefact."""


class Landed(msgspec.Struct, frozen=True, kw_only=True):
    """An artefact on this node, pinned. `directory` is its tree; `area` holds its tensor files if it has any."""

    directory: Path
    area: Area | None
    content: ContentBytes
    spans: tuple[Span, ...]


class _Artefact:
    def __init__(self, manifest: Manifest, origin: Origin) -> None:
        self.manifest = manifest
        self.layout: AreaLayout = area_layout(manifest)
        self.packs = PackSource(origin, manifest)
        self.landing: Landing | None = None
        self.has_room = True
        self.fetching = anyio.Lock()
        self.behind: anyio.Event | None = None
        self.behind_error: SnowdropError | None = None
        tensor_chunks = set(self.layout.places)
        self.small_chunks = sorted(
            {extent.chunk for entry in manifest.files if not entry.tensors for extent in entry.extents}
        )
        self.all_chunks = sorted(tensor_chunks.union(self.small_chunks))


class ContentStore:
    """Use through `open_store`, which also runs the writer behind."""

    def __init__(self, origin: Origin, ram: RamTier, disk: DiskTier, *, fetch_threads: int) -> None:
        self._origin = origin
        self._ram = ram
        self._disk = disk
        self._fetcher = Fetcher(fetch_threads)
        # Its own thread: a slow disk must not take the fetches' threads away.
        self._behind_fetcher = Fetcher(1)
        self._pins = Pins()
        self._artefacts: dict[Digest, _Artefact] = {}
        self._opening = anyio.Lock()
        self._behind: deque[Digest] = deque()
        self._behind_wake = anyio.Event()

    async def ensure(self, tenant: TenantId, digest: Digest, holder: str, *, map_tensors: bool) -> Landed:
        """Brings an artefact and pins it for `holder`.

        With `map_tensors` its tensor files are in a landing area and follow to the directory behind; without,
        every file is in the directory. Bytes are counted once, by the tier that they came from; files that lie
        proven in the directory count as "disk", an area that is filled already as "ram".
        Raises NotFoundError, IntegrityError, CorruptContentError, StorageFullError, UnavailableError; then
        nothing is pinned.
        """
        spans: list[Span] = []
        with self._at_work(digest):
            with _span(spans, "manifest"):
                artefact = await self._open(digest)
            with _span(spans, "fetch"):
                async with artefact.fetching:
                    landing = await self._open_landing(digest, artefact)
                    artefact.packs.forgive()
                    area, given = await self._fetch(digest, artefact, landing, map_tensors=map_tensors)
            # No await from here on: a cancelled caller must find the pin either whole or absent.
            self._pins.take(holder, digest)
        if artefact.has_room and not landing.is_complete:
            self._write_behind(digest, artefact)
        return Landed(
            directory=landing.tree, area=area, content=_content(artefact.manifest, given), spans=tuple(spans)
        )

    async def wait_directory(self, digest: Digest) -> None:
        """Returns once the directory holds every file, verified and durable; raises why it never will.

        Asking again after an error tries again.
        """
        artefact = self._artefacts.get(digest)
        if artefact is None or artefact.landing is None:
            raise NotFoundError("the artefact is not on this node", where=digest, next_step="ensure it first")
        if artefact.landing.is_complete:
            return
        if not artefact.has_room:
            raise StorageFullError(
                f"the directory needs {artefact.manifest.total_bytes} bytes in the node's cache",
                where="disk_bytes_max",
                next_step="raise disk_bytes_max, or use LoadedModel.tensors(), which needs no disk",
            )
        with self._at_work(digest):
            await self._write_behind(digest, artefact).wait()
        if artefact.behind_error is not None:
            raise error_from_body(artefact.behind_error.body())

    def release(self, holder: str) -> None:
        self._pins.release(holder)

    def drop(self, holder: str, digest: Digest) -> None:
        """Takes back one `ensure` whose answer nobody wants any more."""
        self._pins.drop(holder, digest)

    async def run(self) -> None:
        """Writes behind, one artefact after the other, until cancelled."""
        while True:
            while self._behind:
                digest = self._behind[0]
                artefact = self._artefacts.get(digest)
                if artefact is not None and artefact.landing is not None:
                    await self._complete_directory(digest, artefact, artefact.landing)
                self._behind.popleft()
            self._behind_wake = anyio.Event()
            await self._behind_wake.wait()

    async def _fetch(
        self, digest: Digest, artefact: _Artefact, landing: Landing, *, map_tensors: bool
    ) -> tuple[Area | None, dict[int, Tier]]:
        use_area = map_tensors and artefact.layout.size > 0
        wanted = artefact.small_chunks if use_area else artefact.all_chunks
        if not use_area and not artefact.has_room:
            raise StorageFullError(
                f"no room for {artefact.manifest.total_bytes} bytes in the node's cache",
                where="disk_bytes_max",
                next_step="raise disk_bytes_max, or scale another deployment down",
            )
        given: dict[int, Tier] = {chunk: "disk" for chunk in wanted if landing.is_verified(chunk)}
        missing = [chunk for chunk in wanted if chunk not in given]
        resident = self._ram.get(digest)
        sources = _sources(landing, resident, artefact.packs)
        given |= await self._fetcher.bring(artefact.manifest, missing, sources, into_landing(landing))
        if not use_area:
            return None, given
        area = resident or await self._make_area(digest, artefact)
        empty = area.missing()
        brought = await self._fetcher.bring(
            artefact.manifest, empty, [landing, artefact.packs], into_area(area, landing), area=area
        )
        for chunk in artefact.layout.places:
            given.setdefault(chunk, brought.get(chunk, "ram"))
        return area, given

    async def _make_area(self, digest: Digest, artefact: _Artefact) -> Area:
        victims = self._ram.reserve(digest, artefact.layout.size, self._pins.pinned())

        def make() -> Area:
            for victim in victims:
                victim.close()
            return Area(artefact.manifest, artefact.layout)

        area: Area | None = None
        try:
            # Shielded: an area that a cancelled caller had made would be lost, with its memory.
            with anyio.CancelScope(shield=True):
                area = made = await anyio.to_thread.run_sync(make)
        finally:
            self._ram.settle(digest, area)
        return made

    async def _open(self, digest: Digest) -> _Artefact:
        artefact = self._artefacts.get(digest)
        if artefact is None:
            manifest = await anyio.to_thread.run_sync(self._read_manifest, digest)
            artefact = self._artefacts.setdefault(digest, _Artefact(manifest, self._origin))
        return artefact

    def _read_manifest(self, digest: Digest) -> Manifest:
        cached = self._disk.cached_manifest(digest)
        if cached is not None:
            return cached
        key = manifest_key(PUBLIC_DOMAIN, digest)
        size = self._origin.size(key)
        if size > MANIFEST_BYTES_MAX:
            raise CorruptContentError(
                f"manifest has {size} bytes (manifest_bytes_max={MANIFEST_BYTES_MAX})",
                where=key,
                next_step="push the artefact again",
            )
        data = bytearray(size)
        self._origin.read_range(key, 0, memoryview(data))
        return decode_manifest(bytes(data), expected=digest)

    async def _open_landing(self, digest: Digest, artefact: _Artefact) -> Landing:
        if artefact.landing is not None and artefact.has_room:
            self._disk.touch(digest)
            return artefact.landing
        async with self._opening:
            reservation = self._disk.reserve(digest, artefact.manifest, self._pins.pinned())
            artefact.has_room = reservation.has_room
            for victim in reservation.victims:
                self._artefacts.pop(victim, None)
            # Shielded: the books already say that the victims are gone.
            with anyio.CancelScope(shield=True):
                for victim in reservation.victims:
                    await anyio.to_thread.run_sync(self._disk.evict, victim)
            landing = artefact.landing
            if landing is None:
                landing = await anyio.to_thread.run_sync(self._disk.open_landing, digest, artefact.manifest)
            artefact.landing = landing
        return landing

    def _write_behind(self, digest: Digest, artefact: _Artefact) -> anyio.Event:
        if artefact.behind is None:
            artefact.behind = anyio.Event()
            artefact.behind_error = None
            self._behind.append(digest)
            self._behind_wake.set()
        return artefact.behind

    async def _complete_directory(self, digest: Digest, artefact: _Artefact, landing: Landing) -> None:
        undurable = 0

        def sync_often(length: int) -> None:
            nonlocal undurable
            undurable += length
            if undurable >= DIRTY_BYTES_MAX:
                landing.sync()
                undurable = 0

        area = self._ram.get(digest)
        sources = _sources(landing, area, artefact.packs)
        with self._at_work(digest):
            missing = [chunk for chunk in artefact.all_chunks if not landing.is_verified(chunk)]
            try:
                await self._behind_fetcher.bring(
                    artefact.manifest, missing, sources, into_landing(landing), on_batch=sync_often
                )
                await anyio.to_thread.run_sync(landing.sync)
            except SnowdropError as error:
                # Not lost: whoever waits for the directory is told, and asking again tries again.
                artefact.behind_error = error
        done, artefact.behind = artefact.behind, None
        if done is not None:
            done.set()

    @contextmanager
    def _at_work(self, digest: Digest) -> Iterator[None]:
        worker = fresh_id("work")
        self._pins.take(worker, digest)
        try:
            yield
        finally:
            self._pins.release(worker)


def _sources(landing: Landing, area: Area | None, packs: PackSource) -> list[ChunkSource]:
    """Nearest first."""
    return [landing, packs] if area is None else [landing, area, packs]


@contextmanager
def _span(spans: list[Span], name: str) -> Iterator[None]:
    begun = time.time_ns()
    yield
    spans.append(Span(name=name, start_unix_ns=begun, end_unix_ns=time.time_ns(), parent="mount"))


def _content(manifest: Manifest, given: dict[int, Tier]) -> ContentBytes:
    totals: dict[Tier, int] = dict.fromkeys(("ram", "disk", "peer", "origin"), 0)
    for chunk, tier in given.items():
        totals[tier] += manifest.chunks[chunk].plain_bytes
    return ContentBytes(ram=totals["ram"], disk=totals["disk"], peer=totals["peer"], origin=totals["origin"])


@asynccontextmanager
async def open_store(
    settings: DataPlaneSettings, *, origin: Origin | None = None, disk: DiskTier | None = None
) -> AsyncIterator[ContentStore]:
    """A store over the settings' origin and cache directory, writing behind until the block ends.

    `origin` and `disk` replace those of the settings, for tests. Raises InvalidInputError, ConflictError.
    """
    origin = origin or open_origin(settings.origin_url, settings.origin)
    disk = disk or DiskTier(Path(settings.cache_directory), settings.disk_bytes_max)
    ram = RamTier(settings.ram_bytes_max)
    await anyio.to_thread.run_sync(disk.open)
    store = ContentStore(origin, ram, disk, fetch_threads=settings.fetch_threads)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(store.run)
            yield store
            tasks.cancel_scope.cancel()
    finally:
        ram.close()
        disk.close()

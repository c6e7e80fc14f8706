"""The content of one node: ensure, wait, complete behind, release. The shell around tiers and the fetch engine.

`ensure` answers as soon as an artefact can be worked with: its small files are in the directory, its landing area
is there and being filled. Loading never waits for the disk: tensor files go from the origin into the area, and
from there to the landing directory behind the load.
"""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import anyio
import anyio.abc
import anyio.to_thread
import msgspec

from snowdrop.content.area import Area, RamTier
from snowdrop.content.areas import Areas
from snowdrop.content.artefact import Artefact, Keys, OriginReads
from snowdrop.content.completing import Completer
from snowdrop.content.disk import DiskTier
from snowdrop.content.fetch import FetchEngine
from snowdrop.content.gate import OriginGate
from snowdrop.content.landing import Landing
from snowdrop.content.layout import PUBLIC_DOMAIN
from snowdrop.content.mending import make_scrubber
from snowdrop.content.origin import Origin, open_origin
from snowdrop.content.parts import StoreParts, content_bytes
from snowdrop.content.pins import Pins
from snowdrop.content.readers import Readers
from snowdrop.content.settings import DataPlaneSettings
from snowdrop.content.siblings import AreaSiblings, DiskSiblings, EarlierFills
from snowdrop.content.slabs import SlabPool
from snowdrop.content.source import Tier
from snowdrop.domain.errors import (
    NotFoundError,
    StorageFullError,
    UnavailableError,
    error_from_body,
)
from snowdrop.domain.ids import Digest, TenantId, fresh_id
from snowdrop.domain.manifest import Manifest
from snowdrop.domain.receipt import ContentBytes, Span

POOL_TICK_S = 0.5


COMPLETIONS_MAX = 4
"""So often a directory is completed for one who waits: one may pause, and the disk may lose what was written."""


class Landed(msgspec.Struct, frozen=True, kw_only=True):
    """An artefact on this node, pinned. `directory` is its tree; `area` holds its tensor files if it has any.

    `wake` is the reader's end of its socket and belongs to the caller.
    """

    directory: Path
    is_complete: bool
    area: Area | None
    wake: socket.socket | None
    content: ContentBytes
    spans: tuple[Span, ...]


class Filled(msgspec.Struct, frozen=True, kw_only=True):
    """An area that a holder waited for: where its bytes came from and how long it took."""

    content: ContentBytes
    spans: tuple[Span, ...]


class ContentStore:
    """Use through `open_store`."""

    def __init__(self, origin: Origin, areas: Areas, disk: DiskTier, engine: FetchEngine, keys: Keys) -> None:
        self._origin = origin
        self._areas = areas
        self._disk = disk
        self._engine = engine
        self._keys = keys
        self._reads = OriginReads(disk, origin)
        self._completer = Completer(engine)
        self._readers = Readers(engine)
        self._pins = Pins()
        self._artefacts: dict[Digest, Artefact] = {}
        self._opening = anyio.Lock()
        self._tasks: anyio.abc.TaskGroup | None = None
        self.served_bytes: Counter[Tier] = Counter()
        """What loads were given since the start, by tier."""

        self.parts = StoreParts(areas, disk, engine, keys, self._pins, self._artefacts, self._opening, origin)

    async def ensure(
        self,
        tenant: TenantId,
        digest: Digest,
        holder: str,
        *,
        map_tensors: bool,
        lazy: bool = False,
        key_domain: str = PUBLIC_DOMAIN,
    ) -> Landed:
        """Brings an artefact and pins it for `holder`.

        With `map_tensors` its tensor files get a landing area, which is filled from now on (`wait_filled`), and
        follow to the directory behind; `lazy` fills only what is asked for. Without, every file is in the
        directory; if `lazy`, only small files without tensors are. Bytes are counted once, by the tier that they
        came from; files that lie proven in the directory count as "disk". Raises NotFoundError, IntegrityError,
        CorruptContentError, StorageFullError, UnavailableError; then nothing is pinned.
        """
        spans: list[Span] = []
        wake: socket.socket | None = None
        with self._at_work(digest):
            with _span(spans, "manifest"):
                artefact = await self._open(digest, key_domain)
            artefact.fill.serve(tenant)
            use_area = map_tensors and artefact.layout.size > 0
            is_whole = not map_tensors and not lazy
            async with artefact.preparing:
                landing = await self._open_landing(digest, artefact)
                if is_whole and not artefact.has_room:
                    raise _no_directory(artefact.manifest, "scale another deployment down")
                area = await self._areas.get(artefact, self._is_held) if use_area else None
                await self._look_around(artefact, landing, area)
            try:
                if area is not None:
                    wake = self._readers.attach(self._running, artefact, holder, lazy=lazy)
                with _span(spans, "files"):
                    wanted = artefact.all_chunks if is_whole else artefact.eager_chunks
                    content = await self._bring_files(artefact, wanted)
            except BaseException:
                self._abandon(artefact, holder, wake)
                raise
            # No await from here on: a cancelled caller must find the pin either whole or absent.
            self._pins.take(holder, digest)
        if artefact.has_room and not landing.is_complete and (use_area or not lazy):
            self._complete_behind(artefact, landing)
        return Landed(
            directory=landing.tree,
            is_complete=landing.is_complete,
            area=area,
            wake=wake,
            content=content,
            spans=tuple(spans),
        )

    async def wait_filled(self, digest: Digest, holder: str) -> Filled:
        """Returns once the area that `holder` was given is filled; at once for a lazy holder.

        Raises NotFoundError if the holder has none, and why the area cannot be filled.
        """
        artefact = self._artefacts.get(digest)
        reader = artefact.fill.readers.get(holder) if artefact is not None else None
        if artefact is None or reader is None:
            raise NotFoundError("this holder has no landing area of the artefact", where=digest)
        chunks = list(artefact.layout.places)
        if not reader.is_lazy:
            await artefact.bring(self._engine, chunks, "area", holder=holder)
        sizes = artefact.manifest.chunks
        total = 0 if reader.is_lazy else sum(sizes[chunk].plain_bytes for chunk in chunks)
        # What others have brought, or what was there before, came from memory as far as this holder goes.
        own, reader.given = dict(reader.given), Counter()
        own["ram"] = own.get("ram", 0) + max(0, total - sum(own.values()))
        self.served_bytes.update(own)
        end = time.time_ns() if reader.is_lazy else max(artefact.fill.completed_unix_ns, reader.began_unix_ns)
        span = Span(name="fetch", start_unix_ns=reader.began_unix_ns, end_unix_ns=end, parent="startup")
        return Filled(content=content_bytes(own), spans=(span,))

    async def wait_directory(self, digest: Digest) -> None:
        """Returns once the directory holds every file, verified and durable; raises why it never will.

        Asking again after an error tries again.
        """
        artefact = self._artefacts.get(digest)
        if artefact is None or artefact.landing is None:
            raise NotFoundError("the artefact is not on this node", where=digest, next_step="ensure it first")
        if not artefact.has_room and not artefact.landing.is_complete:
            raise _no_directory(artefact.manifest, "use LoadedModel.tensors(), which needs no disk")
        with self._at_work(digest):
            artefact.must_complete = True
            artefact.behind_error = None
            artefact.tell()
            for _ in range(COMPLETIONS_MAX):
                if artefact.landing.is_complete:
                    return
                await self._complete_behind(artefact, artefact.landing).wait()
                if artefact.behind_error is not None:
                    raise error_from_body(artefact.behind_error.body())
        if not artefact.landing.is_complete:
            raise UnavailableError(
                "the directory does not become complete: what is written does not stay",
                where=str(artefact.landing.directory),
                next_step="check the disk, then ask again",
            )

    def landing_of(self, digest: Digest) -> Landing:
        """The landing directory of an artefact that was ensured; raises NotFoundError."""
        artefact = self._artefacts.get(digest)
        if artefact is None or artefact.landing is None:
            raise NotFoundError("the artefact is not on this node", where=digest, next_step="ensure it first")
        return artefact.landing

    async def read_file(self, digest: Digest, file: int, offset: int, length: int) -> bytes | None:
        """Makes sure that a stretch of a file is in the landing directory's file, before anything else is fetched.

        Returns None, or the bytes themselves if the disk has no room for them. Raises NotFoundError and what
        fetching raises.
        """
        artefact = self._artefacts.get(digest)
        if artefact is None or artefact.landing is None:
            raise NotFoundError("the artefact is not on this node", where=digest, next_step="ensure it first")
        with self._at_work(digest):
            chunks = artefact.chunks_of(file, offset, length)
            artefact.note_missed(self._engine, chunks)
            if artefact.has_room:
                try:
                    await artefact.bring(self._engine, chunks, "landing")
                    return None
                except StorageFullError:
                    pass  # degrades to passing through
            return await self._reads.in_thread(artefact.read_through, file, offset, length)

    def release(self, holder: str) -> None:
        """Gives up everything that `holder` has: none of its processes maps an area any more."""
        self._pins.release(holder)
        for artefact in self._artefacts.values():
            if holder in artefact.fill.readers:
                self._readers.detach(artefact, holder)

    def drop(self, holder: str, digest: Digest) -> None:
        """Takes back one `ensure` whose answer nobody wants any more."""
        self._pins.drop(holder, digest)
        artefact = self._artefacts.get(digest)
        if artefact is not None and not self._pins.has(holder, digest):
            self._readers.detach(artefact, holder)

    def manifest(self, digest: Digest) -> Manifest:
        """Of an artefact that has been ensured; raises NotFoundError otherwise."""
        artefact = self._artefacts.get(digest)
        if artefact is None:
            raise NotFoundError("the artefact is not on this node", where=digest, next_step="ensure it first")
        return artefact.manifest

    @property
    def ram_bytes(self) -> int:
        """What the landing areas take."""
        return self._areas.used_bytes

    async def wait_quiet(self) -> None:
        """Returns when no read is under way."""
        await anyio.to_thread.run_sync(self._engine.wait_quiet)

    async def run(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Keeps the pool of slabs and carries the store's tasks, until cancelled."""
        async with anyio.create_task_group() as self._tasks:
            self._tasks.start_soon(self._areas.keep, self._is_held)
            self._tasks.start_soon(self._completer.keep, self._artefacts)
            task_status.started()

    # --- inside -------------------------------------------------------------------------------------------

    @property
    def _running(self) -> anyio.abc.TaskGroup:
        if self._tasks is None:
            raise RuntimeError("the store does not run")
        return self._tasks

    def _is_held(self, digest: Digest) -> bool:
        artefact = self._artefacts.get(digest)
        return self._pins.is_pinned(digest) or (artefact is not None and artefact.fill.is_busy)

    def _abandon(self, artefact: Artefact, holder: str, wake: socket.socket | None) -> None:
        if wake is not None:
            wake.close()
            if not self._pins.has(holder, artefact.digest):
                self._readers.detach(artefact, holder)

    async def _look_around(self, artefact: Artefact, landing: Landing, area: Area | None) -> None:
        """Which other artefacts of the node have what is missing here."""
        if landing.is_complete or (area is not None and area.is_complete):
            return
        missing = [chunk for chunk in artefact.all_chunks if not landing.holds(chunk)]
        on_disk = DiskSiblings(artefact.manifest)
        await anyio.to_thread.run_sync(on_disk.look, self._disk, missing, landing)
        in_memory = AreaSiblings(artefact.manifest, self._areas.all)
        others = [other.fill for other in self._artefacts.values() if other is not artefact and other.fill.readers]
        with self._engine.lock:
            artefact.fill.siblings = (in_memory, on_disk)
            artefact.fill.awaited = EarlierFills(artefact.fill, others) if others else None

    async def _bring_files(self, artefact: Artefact, wanted: list[int]) -> ContentBytes:
        sizes = artefact.manifest.chunks
        ticket = await artefact.bring(self._engine, wanted, "landing")
        given = dict(ticket.given)
        total = sum(sizes[chunk].plain_bytes for chunk in wanted)
        given["disk"] = given.get("disk", 0) + max(0, total - sum(given.values()))
        self.served_bytes.update(given)
        return content_bytes(given)

    async def _open(self, digest: Digest, key_domain: str) -> Artefact:
        artefact = self._artefacts.get(digest)
        if artefact is None:
            hasher = await anyio.to_thread.run_sync(self._keys.hasher, key_domain)
            manifest = await self._reads.read(digest, key_domain, hasher)
            artefact = self._artefacts.setdefault(digest, Artefact(digest, manifest, self._origin, hasher))
        if artefact.manifest.key_domain != key_domain:
            raise NotFoundError(f"the key domain {key_domain} has no such artefact", where=digest)
        return artefact

    async def _open_landing(self, digest: Digest, artefact: Artefact) -> Landing:
        if artefact.landing is not None and artefact.has_room:
            self._disk.touch(digest)
            return artefact.landing
        async with self._opening:
            reservation = self._disk.reserve(digest, artefact.manifest, self._pins.pinned())
            artefact.has_room = artefact.fill.is_kept = reservation.has_room
            for victim in reservation.victims:
                self._artefacts.pop(victim, None)
            # Shielded: the books already say that the victims are gone.
            with anyio.CancelScope(shield=True):
                for victim in reservation.victims:
                    await anyio.to_thread.run_sync(self._disk.evict, victim)
            landing = artefact.landing
            if landing is None:
                landing = await anyio.to_thread.run_sync(self._disk.open_landing, digest, artefact.manifest)
            with self._engine.lock:
                artefact.fill.landing = landing
        return landing

    def _complete_behind(self, artefact: Artefact, landing: Landing) -> anyio.Event:
        if artefact.behind is None:
            artefact.behind = anyio.Event()
            artefact.behind_error = None
            self._running.start_soon(self._completer.complete, artefact, landing, artefact.fill.area)
        return artefact.behind

    @contextmanager
    def _at_work(self, digest: Digest) -> Iterator[None]:
        worker = fresh_id("work")
        self._pins.take(worker, digest)
        try:
            yield
        finally:
            self._pins.release(worker)


def _no_directory(manifest: Manifest, instead: str) -> StorageFullError:
    return StorageFullError(
        f"the directory needs {manifest.total_bytes} bytes in the node's cache",
        where="disk_bytes_max",
        next_step=f"raise disk_bytes_max, or {instead}",
    )


@contextmanager
def _span(spans: list[Span], name: str) -> Iterator[None]:
    begun = time.time_ns()
    yield
    spans.append(Span(name=name, start_unix_ns=begun, end_unix_ns=time.time_ns(), parent="mount"))


@asynccontextmanager
async def open_store(
    settings: DataPlaneSettings, *, origin: Origin | None = None, disk: DiskTier | None = None
) -> AsyncIterator[ContentStore]:
    """A store over the settings' origin and cache directory, working until the block ends.

    `origin` and `disk` replace those of the settings, for tests. Raises InvalidInputError, ConflictError.
    """
    engine = FetchEngine(settings.fetch_threads, OriginGate(settings))
    origin = origin or open_origin(settings.origin_url, settings.origin, steer=engine.gate.steer)
    keys = Keys(settings.keys_directory)
    disk = disk or DiskTier(Path(settings.cache_directory), settings.disk_bytes_max, keyring=keys)
    pool = SlabPool(big_bytes=settings.big_slab_bytes, small_bytes=settings.slab_bytes)
    ram = RamTier(settings.ram_bytes_max, pool)
    await anyio.to_thread.run_sync(disk.open)
    areas = Areas(ram, engine, pool_bytes=settings.pool_bytes)
    store = ContentStore(origin, areas, disk, engine, keys)
    engine.start()
    is_quiet = False
    try:
        async with anyio.create_task_group() as tasks:
            await tasks.start(store.run)
            tasks.start_soon(make_scrubber(store.parts, origin, settings.scrub_bytes_per_s).run)
            yield store
            tasks.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            is_quiet = await anyio.to_thread.run_sync(engine.close)
        if is_quiet:
            ram.close()
        disk.close()

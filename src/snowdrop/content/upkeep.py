"""Upkeep of a node's content when a person asks: figures, verification of the copies here, durable pins, eviction.

Beside the store, over its parts; loads go on meanwhile.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from pathlib import Path

import anyio
import anyio.to_thread

from snowdrop.content.area import Area
from snowdrop.content.artefact import Artefact
from snowdrop.content.durable_pins import PINS_MAX, DurablePin, DurablePins
from snowdrop.content.keys import Hasher
from snowdrop.content.landing import Landing
from snowdrop.content.scrub import check_chunk
from snowdrop.content.store import ContentStore
from snowdrop.domain.errors import ConflictError, SnowdropError, StorageFullError
from snowdrop.domain.ids import DEFAULT_TENANT, Digest, fresh_id
from snowdrop.domain.manifest import Manifest
from snowdrop.wire.upkeep import (
    CONTENT_PER_ANSWER_MAX,
    EVENTS_SHOWN_MAX,
    AskContent,
    BadChunk,
    ContentEvicted,
    ContentTold,
    ContentVerified,
    EvictContent,
    NodeContent,
    NodeEvent,
    NodeStats,
    PinContent,
    VerifyContent,
)

REFETCH_S = 60.0
"""A pin whose content could not be brought is tried again after so long."""
BAD_TOLD_MAX = 200
"""Wrong chunks told of in one answer; verification goes on after them in the next."""

log = logging.getLogger("snowdrop.content")


class Upkeep:
    """For the store's event loop. `open` first, then `run` as a task."""

    def __init__(self, store: ContentStore, cache: Path) -> None:
        self._store = store
        self._parts = store.parts
        self._durable = DurablePins(cache / "pins.json")
        self._changing = anyio.Lock()

    async def open(self) -> None:
        """Takes what was pinned in earlier lives, before anything can be evicted."""
        problem = await anyio.to_thread.run_sync(self._durable.open)
        if problem:
            log.error("%s", problem)
        for pin in self._durable.all():
            self._parts.pins.take(_holder(pin.manifest), pin.manifest)

    async def run(self) -> None:
        """Brings what was pinned and is not here (an earlier life was killed meanwhile), then ends."""
        for pin in self._durable.all():
            while self._durable.get(pin.manifest) is not None:
                try:
                    await self.prefetch(pin)
                    break
                except StorageFullError as error:
                    log.error("pinned %s does not fit: %s", pin.name, error)
                    break
                except SnowdropError as error:
                    log.warning("pinned %s: %s; tried again in %g s", pin.name, error, REFETCH_S)
                    await anyio.sleep(REFETCH_S)

    async def prefetch(self, pin: DurablePin) -> None:
        """Returns once all of a pinned artefact is on this node's disk. Raises what `ensure` raises."""
        holder = fresh_id("prefetch")
        try:
            await self._store.ensure(
                pin.tenant, pin.manifest, holder, map_tensors=False, key_domain=pin.key_domain
            )
            await self._store.wait_directory(pin.manifest)
        finally:
            self._store.release(holder)

    # --- pins ---------------------------------------------------------------------------------------------

    async def pin(self, message: PinContent) -> None:
        """Raises StorageFullError or UnavailableError if it cannot be made durable; then nothing is pinned."""
        async with self._changing:
            if self._durable.get(message.manifest) is not None:
                return
            if len(self._durable.all()) >= PINS_MAX:
                raise ConflictError(
                    "this node has too many pins",
                    where=f"pins_max={PINS_MAX}",
                    next_step="`snowdrop store unpin` some",
                )
            made = DurablePin(
                manifest=message.manifest,
                key_domain=message.key_domain,
                tenant=message.tenant,
                name=message.name,
                pinned_unix_ns=time.time_ns(),
            )
            await anyio.to_thread.run_sync(self._durable.add, made)
            self._parts.pins.take(_holder(message.manifest), message.manifest)

    async def unpin(self, manifest: Digest) -> None:
        async with self._changing:
            await anyio.to_thread.run_sync(self._durable.remove, manifest)
            self._parts.pins.release(_holder(manifest))

    # --- figures ------------------------------------------------------------------------------------------

    async def stats(self) -> NodeStats:
        ram, disk, events = self._parts.areas.ram, self._parts.disk, self._parts.disk.events
        scrubbed = (await anyio.to_thread.run_sync(disk.scrub_times)).values()
        recent = events.recent()[-EVENTS_SHOWN_MAX:]
        return NodeStats(
            ram_bytes=ram.used_bytes,
            ram_bytes_max=ram.bytes_max,
            areas=len(ram.areas()),
            pool_idle_bytes=ram.pool.idle_bytes,
            disk_bytes=disk.used_bytes,
            disk_bytes_max=disk.bytes_max,
            artefacts=len(disk.kept()),
            pinned=len(self._durable.all()),
            served_bytes={str(tier): count for tier, count in self._store.served_bytes.items()},
            quarantined=events.counts["quarantined"],
            replaced=events.counts["replaced"],
            events=tuple(
                NodeEvent(
                    time_unix_ns=event.time_unix_ns,
                    kind=event.kind,
                    artefact=event.artefact,
                    chunk=event.chunk,
                    file=event.file[:200],
                    seen_by=event.seen_by,
                )
                for event in recent
            ),
            scrubbed_oldest_unix_s=min((at for at in scrubbed if at), default=0.0),
            scrubbed_never=sum(1 for at in scrubbed if not at),
        )

    def content(self, message: AskContent) -> ContentTold:
        kept, areas = self._parts.disk.kept(), dict(self._parts.areas.ram.areas())
        pinned = (pin.manifest for pin in self._durable.all())  # also those that have not come yet
        names = sorted(name for name in {*kept, *areas, *pinned} if name > message.after)
        told = names[:CONTENT_PER_ANSWER_MAX]
        return ContentTold(
            request=message.request,
            content=tuple(self._one(name, kept.get(name, (0, 0)), areas.get(name)) for name in told),
            is_last=len(told) == len(names),
        )

    def _one(self, manifest: Digest, kept: tuple[int, int], area: Area | None) -> NodeContent:
        pin = self._durable.get(manifest)
        return NodeContent(
            manifest=manifest,
            disk_bytes=kept[0],
            ram_bytes=area.slab_bytes if area is not None else 0,
            used_unix_ns=kept[1],
            is_held=self._is_held(manifest, but_for_pin=True),
            pin=pin.name if pin is not None else None,
        )

    def _is_held(self, manifest: Digest, *, but_for_pin: bool = False) -> bool:
        artefact = self._parts.artefacts.get(manifest)
        if artefact is not None and artefact.fill.is_busy:
            return True
        own = _holder(manifest)
        return any(not (but_for_pin and holder == own) for holder in self._parts.pins.holders(manifest))

    # --- eviction -----------------------------------------------------------------------------------------

    async def evict(self, message: EvictContent) -> ContentEvicted:
        """Drops copies of what nobody holds. The last use of what is only in memory is not known: it goes."""
        evicted, disk_bytes, ram_bytes = list[Digest](), 0, 0
        for manifest in message.manifests:
            async with self._parts.opening:
                kept = self._parts.disk.kept().get(manifest, (0, 0))
                if self._is_held(manifest) or kept[1] > message.unused_since_unix_ns:
                    continue
                # Between this look and the end of the books no other task runs.
                self._parts.artefacts.pop(manifest, None)
                disk_bytes += self._parts.disk.forget(manifest)
                with anyio.CancelScope(shield=True):
                    ram_bytes += await self._parts.areas.drop(manifest)
                    await anyio.to_thread.run_sync(self._parts.disk.evict, manifest)
                evicted.append(manifest)
        return ContentEvicted(
            request=message.request, evicted=tuple(evicted), disk_bytes=disk_bytes, ram_bytes=ram_bytes
        )

    # --- verification -------------------------------------------------------------------------------------

    async def verify(self, message: VerifyContent) -> ContentVerified:
        """One stretch of the copies on disk and in memory; wrong ones are set aside and brought again.

        Raises NotFoundError if the content's key is not here, UnavailableError if the disk cannot be read.
        """
        manifest = message.manifest
        areas = dict(self._parts.areas.ram.areas())
        if manifest not in areas and not self._parts.disk.has(manifest):
            return _verified(message, next_chunk=0, chunk_count=0)
        holder = fresh_id("verify")
        self._parts.pins.take(holder, manifest)
        try:
            landing = await anyio.to_thread.run_sync(self._parts.disk.known_landing, manifest)
            if landing is None:  # not even its manifest can be believed: it comes from the origin again
                await self._open(message, holder)
                landing = await anyio.to_thread.run_sync(self._parts.disk.known_landing, manifest)
            if landing is None:
                return _verified(message, next_chunk=0, chunk_count=0)
            hasher = await anyio.to_thread.run_sync(self._parts.keys.hasher, landing.manifest.key_domain)
            check = _Check(landing, areas.get(manifest), hasher)
            await anyio.to_thread.run_sync(check.read, message.first, message.bytes_max)
            bad = await self._mend(message, holder, landing, check) if check.wrong else ()
            return _verified(
                message,
                next_chunk=check.next_chunk,
                chunk_count=len(landing.manifest.chunks),
                read_bytes=check.read_bytes,
                bad=tuple(bad),
            )
        finally:
            self._store.release(holder)

    async def _open(self, message: VerifyContent, holder: str) -> Artefact:
        await self._store.ensure(
            DEFAULT_TENANT,
            message.manifest,
            holder,
            map_tensors=False,
            lazy=True,
            key_domain=message.key_domain,
        )
        return self._parts.artefacts[message.manifest]

    async def _mend(
        self, message: VerifyContent, holder: str, landing: Landing, check: _Check
    ) -> Iterable[BadChunk]:
        """Each wrong copy from another source; a failure is told with the chunk and stops nothing."""
        bad: list[BadChunk] = []
        for tier, chunk in check.wrong:
            problem = ""
            try:
                artefact = await self._open(message, holder)
                if tier == "disk":
                    await artefact.bring(self._parts.engine, [chunk], "landing")
                    await anyio.to_thread.run_sync(landing.sync)
                elif check.area is not None:
                    await anyio.to_thread.run_sync(_renew_in_memory, artefact, check.area, chunk)
            except SnowdropError as error:
                problem = str(error)[:300]
            file = _file_of(landing.manifest, chunk)[:200]
            bad.append(BadChunk(chunk=chunk, file=file, tier=tier, problem=problem))
        return bad


class _Check:
    """Reads the copies of one artefact in a thread; `wrong` has (tier, chunk), which are set aside already."""

    def __init__(self, landing: Landing, area: Area | None, hasher: Hasher) -> None:
        self._landing = landing
        self.area = area
        self._hasher = hasher
        self.next_chunk = 0
        self.read_bytes = 0
        self.wrong: list[tuple[str, int]] = []

    def read(self, first: int, bytes_max: int) -> None:
        chunks = self._landing.manifest.chunks
        self.next_chunk = first
        while self.next_chunk < len(chunks) and self.read_bytes < bytes_max and len(self.wrong) < BAD_TOLD_MAX:
            chunk = self.next_chunk
            if self._landing.holds(chunk):
                self._judge("disk", chunk, check_chunk(self._landing, chunk, self._hasher))
            if self.area is not None and self.area.holds(chunk):
                self._judge("ram", chunk, self._is_right_in_memory(self.area, chunk))
            self.next_chunk += 1

    def _judge(self, tier: str, chunk: int, is_right: bool) -> None:
        self.read_bytes += self._landing.manifest.chunks[chunk].plain_bytes
        if not is_right:
            self.wrong.append((tier, chunk))
            if tier == "disk":
                self._landing.quarantine(chunk, "scrub")
            elif self.area is not None:
                self.area.quarantine(chunk)

    def _is_right_in_memory(self, area: Area, chunk: int) -> bool:
        try:
            with area.use():
                return self._hasher.hexdigest(area.chunk(chunk)) == self._landing.manifest.chunks[chunk].digest
        except ConflictError:
            return True  # evicted meanwhile: there is no copy that could be wrong


def _renew_in_memory(artefact: Artefact, area: Area, chunk: int) -> None:
    """Right bytes in place of wrong ones. Whoever has mapped the area sees them, unless it wrote there itself."""
    data = bytearray(artefact.manifest.chunks[chunk].plain_bytes)
    artefact.read_verified(chunk, memoryview(data))
    with area.use():
        area.scatter(chunk, memoryview(data))
        area.mark(chunk)


def _verified(
    message: VerifyContent,
    *,
    next_chunk: int,
    chunk_count: int,
    read_bytes: int = 0,
    bad: tuple[BadChunk, ...] = (),
) -> ContentVerified:
    return ContentVerified(
        request=message.request, next_chunk=next_chunk, chunk_count=chunk_count, read_bytes=read_bytes, bad=bad
    )


def _holder(manifest: Digest) -> str:
    return f"pin {manifest}"


def _file_of(manifest: Manifest, chunk: int) -> str:
    files = (entry.path for entry in manifest.files for extent in entry.extents if extent.chunk == chunk)
    return next(files, "")

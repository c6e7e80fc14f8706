"""Bringing chunks: from the nearest source that has them, verified on arrival, to an area or a directory.

A source whose bytes are wrong or that fails is set aside for those chunks and the next one is asked; when the
last one, the origin, is wrong too, the fetch ends with an error and nothing that it brought is believed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import anyio
import anyio.to_thread

from snowdrop.content.area import Area
from snowdrop.content.landing import Landing
from snowdrop.content.layout import pack_key
from snowdrop.content.placement import Run, file_places, plan_runs
from snowdrop.content.source import ChunkSource, Tier, bad_chunks
from snowdrop.domain.errors import IntegrityError, SnowdropError
from snowdrop.domain.manifest import Manifest

Deliver = Callable[[ChunkSource, int, memoryview], None]
"""(source, chunk, verified bytes): puts a chunk where it belongs. Called in threads, several at once."""


class Fetcher:
    """Reads of one node, sharing one bounded set of threads. Cancelling stops it between two runs."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._limiter = anyio.CapacityLimiter(threads)

    async def bring(
        self,
        manifest: Manifest,
        chunks: Sequence[int],
        sources: Sequence[ChunkSource],
        deliver: Deliver,
        *,
        area: Area | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> dict[int, Tier]:
        """Brings `chunks` (ascending) from the first of `sources` that has them right; says which gave which.

        With `area` they are read in place where their place allows. `on_batch` is called in a thread, one call at
        a time, with the bytes that were delivered. Raises IntegrityError naming chunk, pack and file when no
        source has the right bytes, or what the last source or `deliver` raised.
        """
        given: dict[int, Tier] = {}
        missing = list(chunks)
        for source in sources:
            held = [chunk for chunk in missing if source.holds(chunk)]
            job = _Job(manifest, source, deliver, area, is_last=source is sources[-1])
            bad = await self._carry_all(job, held, on_batch)
            given.update((chunk, source.tier) for chunk in held if chunk not in bad)
            missing = [chunk for chunk in missing if chunk not in given]
            if not missing:
                return given
        if missing:
            raise _no_source(manifest, missing[0])
        return given

    async def _carry_all(self, job: _Job, chunks: list[int], on_batch: Callable[[int], None] | None) -> set[int]:
        layout = job.area.layout if job.area is not None else None
        runs = iter(plan_runs(job.manifest, chunks, layout))
        bad: set[int] = set()
        failures: list[SnowdropError] = []
        batch_lock = anyio.Lock()

        async def carry_some() -> None:
            for run in runs:
                try:
                    bad.update(await anyio.to_thread.run_sync(job.carry, run, limiter=self._limiter))
                    if on_batch is not None:
                        async with batch_lock:
                            await anyio.to_thread.run_sync(on_batch, run.length, limiter=self._limiter)
                except SnowdropError as error:
                    failures.append(error)
                    workers.cancel_scope.cancel()
                    return

        async with anyio.create_task_group() as workers:
            for _ in range(self._threads):
                workers.start_soon(carry_some)
        if failures:
            raise failures[0]
        return bad


@dataclass(frozen=True)
class _Job:
    """Everything that carrying a run takes."""

    manifest: Manifest
    source: ChunkSource
    deliver: Deliver
    area: Area | None
    is_last: bool

    def carry(self, run: Run) -> list[int]:
        """One run from its source to its places; returns the chunks that the source could not give."""
        if self.area is not None and run.area_offset >= 0:
            view = self.area.window(run.area_offset, run.length)
        else:
            view = memoryview(bytearray(run.length))
        try:
            self.source.read(run.first, run.chunks, view)
            bad = bad_chunks(self.manifest, run.first, run.chunks, view)
        except SnowdropError:
            if self.is_last:
                raise
            bad = list(range(run.first, run.first + run.chunks))
        for chunk in bad:
            self.source.quarantine(chunk)
        done = 0
        for chunk in range(run.first, run.first + run.chunks):
            size = self.manifest.chunks[chunk].plain_bytes
            if chunk not in bad:
                self.deliver(self.source, chunk, view[done : done + size])
            done += size
        return bad


def _no_source(manifest: Manifest, chunk: int) -> IntegrityError:
    ref = manifest.chunks[chunk]
    places = file_places(manifest)[chunk]
    file = manifest.files[places[0].file].path if places else "no file"
    key = pack_key(manifest.key_domain, manifest.packs[ref.pack].digest)
    return IntegrityError(
        f"chunk {chunk} of {file} is wrong at the origin",
        where=f"chunk {ref.digest[:16]}, pack {key}, {ref.stored_bytes} bytes at {ref.pack_offset}",
        next_step="delete that pack at the origin and push the artefact again",
    )


def into_area(area: Area, landing: Landing) -> Deliver:
    """Delivers to every place in the area. What the landing directory gave is thereby proven."""

    def deliver(source: ChunkSource, chunk: int, data: memoryview) -> None:
        area.scatter(chunk, data)
        area.mark(chunk)
        if source is landing:
            landing.confirm(chunk, data)

    return deliver


def into_landing(landing: Landing) -> Deliver:
    """Delivers to the landing files; what they hold already is only confirmed."""

    def deliver(source: ChunkSource, chunk: int, data: memoryview) -> None:
        if source is landing:
            landing.confirm(chunk, data)
        else:
            landing.write(chunk, data)

    return deliver

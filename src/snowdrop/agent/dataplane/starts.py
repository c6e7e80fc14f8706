"""Starts in images, on the data plane's side: what they read is recorded, and fetched ahead the next time.

A trace is a hint. Whatever it says, readers get verified bytes or wait for them; what it asks for goes behind all
that readers ask for, and what goes wrong with it is logged and ends it.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import NamedTuple

import anyio
import anyio.abc
import anyio.to_thread

from snowdrop.content.artefact import Artefact, OriginReads
from snowdrop.content.fuse.source import FileSource
from snowdrop.content.imagetrace import check_start, key_of, load_trace, store_trace
from snowdrop.content.parts import StoreParts
from snowdrop.domain.errors import InvalidInputError, NotFoundError, SnowdropError, UnavailableError
from snowdrop.domain.ids import Digest
from snowdrop.domain.imagetrace import TRACE_FORMAT_VERSION, ImageTrace
from snowdrop.policy.prefetch import FORESEEN
from snowdrop.policy.replay import WINDOWS_MAX, Place, ReadRecord, has_changed, replay_order, windows
from snowdrop.wire.codec import Message
from snowdrop.wire.dataplane import AskStart, BeginStart, Completed, EndStart, StartTold

STARTS_MAX = 1024
"""Known at once; a node has fewer replicas."""
RECORDS_MAX = 16
"""Recorded at once: each takes up to 4 MiB of memory. Others are not recorded."""
WRITERS_MAX = 2
"""Traces that are put at the origin at once."""
DATA_FILE_INDEX = 1
"""`data` is the second file of an image's manifest."""
STARTS_MESSAGES = (BeginStart, EndStart, AskStart)

log = logging.getLogger("snowdrop.content")


class Recorder:
    """Hands the reads of an image's mounts to all who record them; reads come from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: dict[Digest, tuple[ReadRecord, ...]] = {}
        self._count = 0

    def open(self, digest: Digest, data_bytes: int) -> ReadRecord | None:
        """None if there are too many."""
        with self._lock:
            if self._count >= RECORDS_MAX:
                return None
            self._count += 1
            record = ReadRecord(data_bytes)
            self._records[digest] = (*self._records.get(digest, ()), record)
            return record

    def close(self, digest: Digest, record: ReadRecord) -> None:
        """It gets no more. May be repeated."""
        with self._lock:
            left = tuple(other for other in self._records.get(digest, ()) if other is not record)
            self._count -= len(self._records.get(digest, ())) - len(left)
            self._records[digest] = left
            if not left:
                del self._records[digest]

    def seen(self, digest: Digest, offset: int, length: int) -> None:
        """A read of an image's `data`."""
        if digest in self._records:
            with self._lock:
                for record in self._records.get(digest, ()):
                    record.seen(offset, length)


class RecordedFiles:
    """A FileSource whose reads a recorder is told of."""

    def __init__(self, source: FileSource, digest: Digest, recorder: Recorder) -> None:
        self._source = source
        self._digest = digest
        self._recorder = recorder

    def read(self, file: int, offset: int, into: memoryview) -> bool:
        if file == DATA_FILE_INDEX:
            self._recorder.seen(self._digest, offset, len(into))
        return self._source.read(file, offset, into)

    async def bring(self, file: int, offset: int, length: int) -> bytes | None:
        return await self._source.bring(file, offset, length)

    def backing(self, file: int) -> int | None:
        return self._source.backing(file)


class _Start:
    def __init__(self, begun: BeginStart, artefact: Artefact) -> None:
        self.begun = begun
        self.artefact = artefact
        self.record: ReadRecord | None = None
        self.replay = anyio.CancelScope()
        self.read_before = anyio.Event()
        self.before: ImageTrace | None = None
        self.foreseen_bytes = 0
        self.recorded_bytes = 0
        self.first_missed = len(artefact.missed)
        self.first_late = -1

    @property
    def key(self) -> str:
        domain, begun = self.artefact.manifest.key_domain, self.begun
        return key_of(domain, begun.tenant, begun.manifest, begun.start)

    @property
    def data_bytes(self) -> int:
        return self.artefact.manifest.files[DATA_FILE_INDEX].size

    @property
    def has_ended(self) -> bool:
        return self.first_late >= 0


class _Sums(NamedTuple):
    missed_bytes: int
    late_bytes: int


class Starts:
    """For one connection of an agent. `tasks` carries what goes on behind."""

    def __init__(self, parts: StoreParts, tasks: anyio.abc.TaskGroup) -> None:
        self.recorder = Recorder()
        self._parts = parts
        self._tasks = tasks
        self._starts: dict[str, _Start] = {}
        self._reads = OriginReads(parts.disk, parts.origin)  # of its own: holds up no manifest
        self._writers = anyio.CapacityLimiter(WRITERS_MAX)

    async def answer(self, message: BeginStart | EndStart | AskStart) -> Message:
        """The answer to one message. Raises NotFoundError, InvalidInputError, UnavailableError."""
        if isinstance(message, BeginStart):
            self._begin(message)
            return Completed(request=message.request)
        start = self._starts.get(message.holder)
        if start is None:
            raise NotFoundError("nothing has begun to start", where=message.holder)
        if isinstance(message, EndStart) and not start.has_ended:
            self._end(start)
        sums = _sums(start)
        return StartTold(
            request=message.request,
            foreseen_bytes=start.foreseen_bytes,
            recorded_bytes=start.recorded_bytes,
            missed_bytes=sums.missed_bytes,
            late_bytes=sums.late_bytes,
        )

    def forget(self, name: str) -> None:
        """The pin or the holder `name` is released."""
        for holder, start in list(self._starts.items()):
            if name in {holder, start.begun.pin}:
                del self._starts[holder]
                start.replay.cancel()
                if start.record is not None:
                    self.recorder.close(start.begun.manifest, start.record)

    # --- inside -------------------------------------------------------------------------------------------

    def _begin(self, begun: BeginStart) -> None:
        check_start(begun.start)
        artefact = self._parts.artefacts.get(begun.manifest)
        if artefact is None or artefact.landing is None:
            raise NotFoundError("the image is not on this node", where=begun.manifest, next_step="ensure it first")
        if artefact.manifest.kind != "image":
            raise InvalidInputError(f"a {artefact.manifest.kind} is no image", where=begun.manifest)
        self.forget(begun.holder)
        if len(self._starts) >= STARTS_MAX:
            raise UnavailableError("too many starts at once", where=f"starts_max={STARTS_MAX}")
        start = self._starts[begun.holder] = _Start(begun, artefact)
        if begun.record:
            start.record = self.recorder.open(begun.manifest, start.data_bytes)
        self._tasks.start_soon(self._replay, start)

    async def _replay(self, start: _Start) -> None:
        """Fetches what the last start has read, in its order, some windows at a time."""
        begun, artefact = start.begun, start.artefact
        try:
            with start.replay:
                try:
                    start.before = await self._reads.in_thread(
                        load_trace, self._parts.origin, start.key, begun.manifest, begun.start, start.data_bytes
                    )
                finally:
                    start.read_before.set()
                if start.before is not None and artefact.has_room:
                    chunks = await anyio.to_thread.run_sync(_planned, start.before, artefact)
                    start.foreseen_bytes = sum(artefact.manifest.chunks[chunk].plain_bytes for chunk in chunks)
                    await self._bring(artefact, chunks)
        except SnowdropError as error:
            log.warning("%s is not fetched ahead any more: %s", begun.manifest[:19], error)
        except Exception:  # a fault of ours that would end every mount of the node
            log.exception("fetching ahead of a start")

    async def _bring(self, artefact: Artefact, chunks: list[int]) -> None:
        room = anyio.Semaphore(WINDOWS_MAX)
        failed: list[SnowdropError] = []

        async def bring(window: list[int]) -> None:
            try:
                await artefact.bring(self._parts.engine, window, "landing", FORESEEN)
            except SnowdropError as error:
                failed.append(error)
                tasks.cancel_scope.cancel()  # whoever reads these bytes asks again, and is told
            finally:
                room.release()

        async with anyio.create_task_group() as tasks:
            for window in windows(chunks, lambda chunk: artefact.manifest.chunks[chunk].plain_bytes):
                await room.acquire()
                tasks.start_soon(bring, window)
        if failed:
            raise failed[0]

    def _end(self, start: _Start) -> None:
        start.first_late = len(start.artefact.missed)
        record, start.record = start.record, None
        if record is None:
            return
        self.recorder.close(start.begun.manifest, record)
        extents = record.extents()
        start.recorded_bytes = sum(length for _, length in extents)
        if record.is_cut:
            log.info("the trace of %s is not all that its start has read", start.begun.manifest[:19])
        if extents:
            self._tasks.start_soon(self._keep, start, extents)

    async def _keep(self, start: _Start, extents: tuple[tuple[int, int], ...]) -> None:
        begun = start.begun
        await start.read_before.wait()
        if start.before is not None and not has_changed(start.before.extents, extents):
            return
        trace = ImageTrace(TRACE_FORMAT_VERSION, begun.manifest, begun.start, time.time_ns(), extents)
        try:
            await anyio.to_thread.run_sync(
                store_trace,
                *(self._parts.origin, start.artefact.manifest.key_domain, begun.tenant, trace),
                limiter=self._writers,
            )
        except SnowdropError as error:
            log.warning("what %s reads at its start is not kept: %s", begun.manifest[:19], error)
        except Exception:  # as above
            log.exception("keeping the trace of a start")


def _planned(trace: ImageTrace, artefact: Artefact) -> list[int]:
    entry = artefact.manifest.files[DATA_FILE_INDEX]
    places = [Place(extent.file_offset, extent.length, extent.chunk) for extent in entry.extents]
    return replay_order(trace.extents, places)


def _sums(start: _Start) -> _Sums:
    """Each chunk once, by who wanted it first: before the start ended, or after."""
    sizes = start.artefact.manifest.chunks
    missed = [sizes[chunk].plain_bytes for chunk in list(start.artefact.missed)]
    end = start.first_late if start.has_ended else len(missed)
    return _Sums(sum(missed[start.first_missed : end]), sum(missed[end:]))

"""What this node knows of one artefact: its manifest, what brings its chunks, where they are."""

from __future__ import annotations

import asyncio
import threading
from bisect import bisect_right
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import anyio
import anyio.to_thread

from snowdrop.content.disk import DiskTier
from snowdrop.content.fetch import FetchEngine
from snowdrop.content.fill import Fill
from snowdrop.content.keys import Hasher, Keyring, load_keyring
from snowdrop.content.landing import Landing
from snowdrop.content.layout import manifest_key
from snowdrop.content.manifest import decode_manifest
from snowdrop.content.origin import Origin
from snowdrop.content.placement import AreaLayout, area_layout, header_chunks
from snowdrop.content.runs import Place, Ticket
from snowdrop.content.source import PackSource, bad_chunks, wrong_chunk
from snowdrop.domain.cancel import CANCEL_FLAG
from snowdrop.domain.errors import CorruptContentError, NotFoundError, SnowdropError, error_from_body
from snowdrop.domain.ids import Digest
from snowdrop.domain.image import TREE_FILE
from snowdrop.domain.manifest import MANIFEST_BYTES_MAX, Extent, FileEntry, Manifest
from snowdrop.policy.prefetch import URGENT

EAGER_BYTES_MAX = 16 << 20
"""Files without tensors up to this size are in the directory before a replica starts; larger ones follow.

Of an image, its tree is, whatever its size, and no data."""


MANIFEST_GUESS_BYTES = 1 << 20
"""Most manifests are shorter, and come in one go."""
ORIGIN_READS_MAX = 8
"""At once from the origin."""


T = TypeVar("T")
Given = TypeVarTuple("Given")


class Artefact:
    """Made on the event loop, which owns everything but what the fill does in its threads."""

    def __init__(self, digest: Digest, manifest: Manifest, origin: Origin, hasher: Hasher) -> None:
        self.digest = digest
        self.manifest = manifest
        self.layout: AreaLayout = area_layout(manifest)
        self.packs = PackSource(origin, manifest)
        self.fill = Fill(
            manifest,
            self.layout,
            header_chunks(manifest),
            self.packs,
            lambda first, count, view: bad_chunks(manifest, first, count, view, hasher),
        )
        self.fill.on_progress = self._progressed
        self.has_room = True
        self.preparing = anyio.Lock()
        self.behind: anyio.Event | None = None
        self.behind_error: SnowdropError | None = None
        self.must_complete = False
        self.missed: dict[int, None] = {}
        """Chunks that a reader of a file wanted when they were not on the node, each once, in order."""
        self.eager_chunks = _chunks_of(manifest, partial(_is_eager, manifest))
        self.all_chunks = _chunks_of(manifest, lambda _: True)
        self._loop = asyncio.get_running_loop()
        self._more = anyio.Event()
        self._is_told = False

    @property
    def landing(self) -> Landing | None:
        return self.fill.landing

    async def more(self) -> None:
        """Returns when chunks may have come since it last did."""
        await self._more.wait()
        self._more, self._is_told = anyio.Event(), False

    def tell(self) -> None:
        """Ends `more`; on the event loop."""
        self._more.set()

    async def bring(
        self, engine: FetchEngine, chunks: list[int], place: Place, rank: int = URGENT, holder: str = ""
    ) -> Ticket:
        """Waits until `chunks` are in their place; raises why they never will be. Cancelling stops the reads."""
        done = anyio.Event()
        ticket = Ticket(place, set(chunks), partial(self._call_soon, done.set), rank, holder)
        with engine.lock:
            self.fill.open_ticket(ticket)
        engine.kick(self.fill)
        try:
            await done.wait()
        finally:
            with engine.lock:
                self.fill.close_ticket(ticket)
        if ticket.error is not None:
            # One of its own: several may wait, and each gets its own traceback.
            raise error_from_body(ticket.error.body())
        return ticket

    def note_missed(self, engine: FetchEngine, chunks: list[int]) -> None:
        """Somebody reads these: those that only the origin has are noted."""
        with engine.lock:
            near = [source for source in self.fill.sources() if source is not self.fill.last]
            missed = [chunk for chunk in chunks if not any(source.holds(chunk) for source in near)]
            self.missed.update(dict.fromkeys(missed))

    def chunks_of(self, file: int, offset: int, length: int) -> list[int]:
        """The chunks that a stretch of a file consists of; raises NotFoundError if there is no such stretch."""
        return [extent.chunk for extent in self._extents(file, offset, length)]

    def read_through(self, file: int, offset: int, length: int) -> bytes:
        """A stretch of a file from wherever its chunks are, past the disk. Blocks; raises as the origin does."""
        found = bytearray(length)
        for extent in self._extents(file, offset, length):
            data = memoryview(bytearray(self.manifest.chunks[extent.chunk].plain_bytes))
            self.read_verified(extent.chunk, data)
            begin = max(offset, extent.file_offset)
            end = min(offset + length, extent.file_offset + extent.length)
            at = begin - extent.file_offset + extent.chunk_offset
            found[begin - offset : end - offset] = data[at : at + end - begin]
        return bytes(found)

    def read_verified(self, chunk: int, into: memoryview) -> None:
        """One chunk from the nearest source that has it right. Blocks; raises as the last one does."""
        for source in self.fill.sources():
            try:
                if source is self.packs or source.holds(chunk):
                    source.read(chunk, 1, into)
                    if not self.fill.find_bad(chunk, 1, into):
                        return
            except SnowdropError:
                if source is self.packs:
                    raise
        raise wrong_chunk(self.manifest, chunk)

    def _extents(self, file: int, offset: int, length: int) -> list[Extent]:
        if not 0 <= file < len(self.manifest.files):
            raise NotFoundError(f"the artefact has no file {file}", where=self.digest)
        entry = self.manifest.files[file]
        if offset < 0 or length < 0 or offset + length > entry.size:
            raise NotFoundError(f"{entry.path} has no bytes {offset} to {offset + length}", where=self.digest)
        first = max(0, bisect_right(entry.extents, offset, key=lambda extent: extent.file_offset) - 1)
        found: list[Extent] = []
        for extent in entry.extents[first:]:
            if extent.file_offset >= offset + length:
                break
            found.append(extent)
        return found

    def _progressed(self) -> None:
        if not self._is_told:
            self._is_told = True
            self._call_soon(self.tell)

    def _call_soon(self, call: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(call)


def _is_eager(manifest: Manifest, file: FileEntry) -> bool:
    if manifest.kind == "image":
        return file.path == TREE_FILE  # its data is what a mount fetches as it is read
    return not file.tensors and file.size <= EAGER_BYTES_MAX


def _chunks_of(manifest: Manifest, files: Callable[[FileEntry], bool]) -> list[int]:
    return sorted({extent.chunk for entry in manifest.files if files(entry) for extent in entry.extents})


class Keys(Keyring):
    """The node's content keys, read again when one is asked for that was not there before."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder = Path(folder) if folder else None

    def hasher(self, domain: str) -> Hasher:
        """May read the folder. Raises NotFoundError if the domain's key is not on this node."""
        try:
            return super().hasher(domain)
        except NotFoundError:
            if self._folder is None:
                raise
            found = load_keyring(self._folder)
            self._hashers = {name: found.hasher(name) for name in found.domains}
            return super().hasher(domain)


class OriginReads:
    """Reads of manifests, and of what passes by the disk.

    They have threads of their own: one that does not answer holds up nothing that is here.
    """

    def __init__(self, disk: DiskTier, origin: Origin) -> None:
        self._disk = disk
        self._origin = origin
        self._limiter = anyio.CapacityLimiter(ORIGIN_READS_MAX)

    async def read(self, digest: Digest, key_domain: str, hasher: Hasher) -> Manifest:
        """From the disk if it is there and right, else from the origin. A cancelled read ends.

        Raises NotFoundError, IntegrityError, CorruptContentError and what the origin raises.
        """
        cached = await anyio.to_thread.run_sync(self._disk.cached_manifest, digest, hasher)
        if cached is not None:
            return cached
        return await self.in_thread(_manifest_at, self._origin, digest, key_domain, hasher)

    async def in_thread(self, read: Callable[[*Given], T], *given: *Given) -> T:
        """Runs a read of the origin in a thread; cancelled, it ends at the origin's next look up."""
        given_up = threading.Event()
        token = CANCEL_FLAG.set(given_up)
        try:
            return await anyio.to_thread.run_sync(read, *given, abandon_on_cancel=True, limiter=self._limiter)
        finally:
            given_up.set()
            CANCEL_FLAG.reset(token)


def _manifest_at(origin: Origin, digest: Digest, key_domain: str, hasher: Hasher) -> Manifest:
    key = manifest_key(key_domain, digest)
    start = bytearray(MANIFEST_GUESS_BYTES)
    size = origin.read_start(key, memoryview(start))
    if size > MANIFEST_BYTES_MAX:
        raise CorruptContentError(
            f"manifest has {size} bytes (manifest_bytes_max={MANIFEST_BYTES_MAX})",
            where=key,
            next_step="push the artefact again",
        )
    data = start[:size]
    if size > len(start):
        data += bytes(size - len(start))
        origin.read_range(key, len(start), memoryview(data)[len(start) :])
    return decode_manifest(bytes(data), expected=digest, hasher=hasher)

"""Laying chunks into packs, putting packs, and remembering what is durable.

Chunks come one after the other in load order; packs are put by threads beside. What is remembered is remembered in
order: a file's progress is committed only after every pack with its bytes is durable.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from snowdrop.content.ingest.index import IngestIndex, Known, Place, Progress
from snowdrop.content.keys import Hasher
from snowdrop.content.layout import pack_key
from snowdrop.content.origin import Origin
from snowdrop.domain.errors import IntegrityError, NotFoundError
from snowdrop.domain.manifest import PACK_BYTES_MAX, ChunkRef, Codec, PackRef

PUTS_MAX = 3
"""Packs on their way to the origin; one more is being filled. Each takes PACK_BYTES_MAX of memory."""
COMMIT_BYTES = 256 << 20
"""Progress is remembered at least this often, also when every chunk was there already."""

COMPARE_BYTES = 4 << 20

FileProgress = tuple[str, str, Progress]
"""(path, version, progress) as IngestIndex.commit takes it."""


class _Put(NamedTuple):
    """What follows once `stored` says that the pack is durable; without a pack, at once."""

    pack: int
    stored: Future[tuple[str, bool]] | None
    size: int
    chunks: tuple[int, ...]
    files: tuple[FileProgress, ...]


class Packer:
    """`durable` gives the progress of the files so far, each time that it is to be remembered.

    What the origin has counts as there if it has the right size; with `repair` only if its bytes are right, too.
    """

    def __init__(
        self,
        origin: Origin,
        hasher: Hasher,
        threads: ThreadPoolExecutor,
        *,
        index: IngestIndex | None,
        source: str,
        durable: Callable[[], tuple[FileProgress, ...]],
        repair: bool = False,
    ) -> None:
        self.new_bytes = 0
        self.new_plain_bytes = 0
        self._origin = origin
        self._hasher = hasher
        self._threads = threads
        self._index = index
        self._source = source
        self._durable = durable
        self._repair = repair
        self._chunks: list[ChunkRef] = []
        self._packs: list[PackRef | None] = []
        self._by_digest: dict[str, int] = {}
        self._by_pack: dict[str, int] = {}
        self._present: dict[str, int] = {}
        self._puts: deque[_Put] = deque()
        self._buffers = [bytearray(0) for _ in range(PUTS_MAX + 1)]
        self._pack = -1
        self._filled = 0
        self._current: list[int] = []
        self._uncommitted_bytes = 0

    def known(self, digest: str, plain_bytes: int) -> int | None:
        """The index of a chunk that needs no bytes: it is in this tree already, or at the origin."""
        at = self._by_digest.get(digest)
        if at is None:
            place = self.place(digest, plain_bytes)
            if place is None:
                return None
            at = self._refer(digest, place)
        self._uncommitted_bytes += plain_bytes
        if self._uncommitted_bytes >= COMMIT_BYTES and not self._current:
            self._follow(_Put(-1, None, 0, (), self._durable()))
        return at

    def place(self, digest: str, plain_bytes: int) -> Place | None:
        """Where the origin has this chunk, having looked that its pack is there."""
        place = self._index.find(digest) if self._index is not None else None
        if place is None or place.plain_bytes != plain_bytes or not self._is_present(place.pack):
            return None
        return place

    def add(self, digest: str, plain_bytes: int, codec: Codec, stored: memoryview) -> int:
        """Lays a chunk that is not known into the current pack; returns its index."""
        if self._filled + len(stored) > PACK_BYTES_MAX:
            self.flush()
        if not self._current:
            self._pack = self._slot(None)
        buffer, end = self._buffers[0], self._filled + len(stored)
        if end > len(buffer):
            buffer.extend(bytes(max(end, min(PACK_BYTES_MAX, 2 * len(buffer))) - len(buffer)))
        buffer[self._filled : end] = stored
        at = self._by_digest[digest] = len(self._chunks)
        self._chunks.append(ChunkRef(digest, plain_bytes, self._pack, self._filled, len(stored), codec))
        self._current.append(at)
        self._filled = end
        self._uncommitted_bytes += plain_bytes
        return at

    def flush(self) -> None:
        """Sends the current pack on its way, and waits if too many are."""
        if not self._current:
            return
        while len(self._puts) >= PUTS_MAX:
            self._finish_oldest()
        stored = self._threads.submit(self._put, self._buffers.pop(0), self._filled)
        current, size = tuple(self._current), self._filled
        self._current, self._filled = [], 0
        self._follow(_Put(self._pack, stored, size, current, self._durable()))

    def has_pack(self, digest: str, size: int) -> bool:
        """Whether the origin has it; asked once in a push, whose lease keeps it from then on."""
        if digest not in self._present:
            is_there = stored_right(self._origin, self._hasher, digest, size, check_bytes=self._repair)
            self._present[digest] = size if is_there else 0
        return self._present[digest] > 0

    def finish(self) -> tuple[tuple[ChunkRef, ...], tuple[PackRef, ...]]:
        """Waits until everything is durable and remembered; the chunks and packs of the manifest."""
        self.flush()
        self._follow(_Put(-1, None, 0, (), self._durable()))
        while self._puts:
            self._finish_oldest()
        return self._merged()

    def _refer(self, digest: str, place: Place) -> int:
        pack = self._by_pack.get(place.pack)
        if pack is None:
            pack = self._by_pack[place.pack] = self._slot(PackRef(place.pack, self._present[place.pack]))
        at = self._by_digest[digest] = len(self._chunks)
        self._chunks.append(
            ChunkRef(digest, place.plain_bytes, pack, place.pack_offset, place.stored_bytes, place.codec)
        )
        return at

    def _slot(self, pack: PackRef | None) -> int:
        self._packs.append(pack)
        return len(self._packs) - 1

    def _is_present(self, pack: str) -> bool:
        """As `has_pack`, of a pack in the index, which forgets one that is not there."""
        assert self._index is not None
        if pack not in self._present:
            size = self._index.pack_bytes(pack) or 0
            if not size:
                self._present[pack] = 0
            elif not self.has_pack(pack, size):
                self._index.forget_pack(pack)
        return self._present[pack] > 0

    def _put(self, buffer: bytearray, size: int) -> tuple[str, bool]:
        try:
            with memoryview(buffer) as whole, whole[:size] as view:
                digest = self._hasher.hexdigest(view)
                key = pack_key(self._hasher.domain, digest)
                is_new = not stored_as(self._origin, key, view, check_bytes=self._repair)
                if is_new:
                    self._origin.put(key, view)
            return digest, is_new
        finally:
            self._buffers.append(buffer)

    def _follow(self, put: _Put) -> None:
        self._uncommitted_bytes = 0
        self._puts.append(put)
        while self._puts and self._is_done(self._puts[0]):
            self._finish_oldest()

    @staticmethod
    def _is_done(put: _Put) -> bool:
        return put.stored is None or put.stored.done()

    def _finish_oldest(self) -> None:
        """Waits for the oldest pack and remembers it. It stays in the queue if that fails."""
        put = self._puts[0]
        packs: list[tuple[str, int]] = []
        chunks: list[Known] = []
        if put.stored is not None:
            digest, is_new = put.stored.result()
            self._packs[put.pack] = PackRef(digest, put.size)
            self._present[digest] = put.size
            if is_new:
                self.new_bytes += put.size
                self.new_plain_bytes += sum(self._chunks[at].plain_bytes for at in put.chunks)
            packs = [(digest, put.size)]
            for ref in (self._chunks[at] for at in put.chunks):
                place = Place(ref.plain_bytes, digest, ref.pack_offset, ref.stored_bytes, ref.codec)
                chunks.append(Known(ref.digest, place))
        if self._index is not None and (packs or put.files):
            self._index.commit(self._source, put.files, chunks, packs)
        self._puts.popleft()

    def _merged(self) -> tuple[tuple[ChunkRef, ...], tuple[PackRef, ...]]:
        """Two packs may turn out to be the same bytes, cut otherwise: they are one."""
        packs: dict[str, int] = {}
        merged: list[PackRef] = []
        place: list[int] = []
        for pack in self._packs:
            assert pack is not None
            if pack.digest not in packs:
                packs[pack.digest] = len(merged)
                merged.append(pack)
            place.append(packs[pack.digest])
        chunks = [
            ChunkRef(c.digest, c.plain_bytes, place[c.pack], c.pack_offset, c.stored_bytes, c.codec)
            for c in self._chunks
        ]
        return tuple(chunks), tuple(merged)


def stored_right(origin: Origin, hasher: Hasher, digest: str, size: int, *, check_bytes: bool) -> bool:
    """Whether the origin has a pack in its size, and with `check_bytes` the bytes that its name says."""
    key = pack_key(hasher.domain, digest)
    try:
        if origin.size(key) != size:
            return False
        if not check_bytes:
            return True
        data = memoryview(bytearray(size))
        origin.read_range(key, 0, data)
    except (NotFoundError, IntegrityError):
        return False
    return hasher.hexdigest(data) == digest


def stored_as(origin: Origin, key: str, data: bytes | memoryview, *, check_bytes: bool) -> bool:
    """Whether the origin has an object as long as `data`, and with `check_bytes` equal to it."""
    try:
        if origin.size(key) != len(data):
            return False
        if check_bytes:
            piece = memoryview(bytearray(min(COMPARE_BYTES, len(data))))
            for start in range(0, len(data), COMPARE_BYTES):
                part = piece[: min(COMPARE_BYTES, len(data) - start)]
                origin.read_range(key, start, part)
                if part != data[start : start + len(part)]:
                    return False
    except (NotFoundError, IntegrityError):
        return False
    return True

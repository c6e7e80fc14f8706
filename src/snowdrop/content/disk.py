"""Disk tier of a node: all landing directories under one byte limit.

lock                    held by the one process that uses the cache
artefacts/<digest>/     landing directories; the modification time says when it was last used
events.jsonl            chunks that were found wrong, and what became of them
trash/                  directories on their way out: renamed first, so that no half-deleted one is believed
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from snowdrop.content.descriptors import Descriptors
from snowdrop.content.diskio import DiskIo, translated
from snowdrop.content.events import ContentEvent, EventKind, EventLog, SeenBy
from snowdrop.content.keys import PUBLIC_KEYRING, Hasher, HasherSource
from snowdrop.content.landing import Landing
from snowdrop.content.manifest import decode_manifest, manifest_digest
from snowdrop.content.placement import name_of
from snowdrop.domain.errors import ConflictError, SnowdropError, StorageFullError
from snowdrop.domain.ids import Digest, fresh_id
from snowdrop.domain.manifest import ChunkRef, Manifest
from snowdrop.policy.eviction import Kept, choose

LOCK_S_MAX = 5.0
"""A data plane that was killed is gone within this time; one that runs keeps the lock for ever."""


PREFIX = "blake3:"


class ChunkIndex:
    """Which chunks an artefact has, by digest and size."""

    def __init__(self, manifest: Manifest) -> None:
        self._key_domain = manifest.key_domain
        self._chunks = {_short_name(chunk): index for index, chunk in enumerate(manifest.chunks)}

    def find(self, key_domain: str, wanted: ChunkRef) -> int | None:
        """The number that another artefact's chunk has here."""
        return self._chunks.get(_short_name(wanted)) if key_domain == self._key_domain else None


def _short_name(chunk: ChunkRef) -> tuple[bytes, int]:
    digest, size = name_of(chunk)
    return bytes.fromhex(digest), size


class _Kept(NamedTuple):
    size: int
    used_ns: int


class Reservation(NamedTuple):
    """`has_room` is False if only the small files fit: tensor files then pass through to the landing area."""

    victims: list[Digest]
    has_room: bool


class DiskTier:
    """The books (`has`, `reserve`, `touch`) are kept by one event loop; what blocks belongs in threads."""

    def __init__(
        self,
        directory: Path,
        bytes_max: int,
        io: DiskIo | None = None,
        *,
        boot_id: str | None = None,
        keyring: HasherSource = PUBLIC_KEYRING,
    ) -> None:
        self.events = EventLog(directory / "events.jsonl", io)
        self._directory = directory
        self._artefacts = directory / "artefacts"
        self._trash = directory / "trash"
        self._bytes_max = bytes_max
        self._io = io or DiskIo()
        self._kept: dict[str, _Kept] = {}
        self._lock_fd = -1
        self._boot_id = boot_id
        self._keyring = keyring
        self._descriptors = Descriptors()
        self._opening = threading.RLock()
        self._landings: dict[str, Landing] = {}
        self._index: dict[str, ChunkIndex] = {}
        self._unread: list[str] = []

    def open(self) -> None:
        """Takes the cache directory; raises ConflictError if another process keeps it for LOCK_S_MAX."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            if not (self._artefacts.is_dir() and self._trash.is_dir()):
                for directory in (self._artefacts, self._trash):
                    self._io.make_directory(directory)
                self._io.sync_directory(self._directory)
            for path in self._trash.iterdir():
                self._io.remove_tree(path)
            for path in sorted(self._artefacts.iterdir()):
                self._kept[path.name] = self._measure(path)
            self._unread = list(self._kept)
            self.events.open()
        except OSError as error:
            raise translated(error, self._directory) from error

    def close(self) -> None:
        for landing in self._landings.values():
            landing.close()
        self._descriptors.close()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    @property
    def bytes_max(self) -> int:
        return self._bytes_max

    @property
    def used_bytes(self) -> int:
        return sum(kept.size for kept in self._kept.values())

    def kept(self) -> dict[Digest, tuple[int, int]]:
        """Every artefact in the books: its bytes, and when it was last used in ns since 1970."""
        return {Digest(PREFIX + name): (kept.size, kept.used_ns) for name, kept in self._kept.items()}

    def forget(self, digest: Digest) -> int:
        """Takes an artefact out of the books; `evict` must follow. Its bytes, 0 if it was not in them."""
        kept = self._kept.pop(self._path(digest).name, None)
        return kept.size if kept is not None else 0

    def cached_manifest(self, digest: Digest, hasher: Hasher | None = None) -> Manifest | None:
        """The manifest as an earlier fetch left it; None if there is none or it is not what its digest says.

        `hasher` is of the key domain that it must belong to; without one, that of its own domain is taken from the
        keyring, and None is the answer also if its key is not there.
        """
        try:
            data = (self._path(digest) / "manifest").read_bytes()
            manifest = decode_manifest(data, hasher=hasher)
            hasher = hasher or self._keyring.hasher(manifest.key_domain)
        except (OSError, SnowdropError):
            # Whatever is wrong with the copy, the origin's is the one to judge.
            return None
        return manifest if manifest_digest(data, hasher) == digest else None

    def has(self, digest: Digest) -> bool:
        return self._path(digest).name in self._kept

    def reserve(self, digest: Digest, manifest: Manifest, pinned: set[Digest]) -> Reservation:
        """Sets the artefact's bytes aside; the victims are forgotten at once and then to be given to `evict`.

        The least recently used unpinned artefacts go first. Raises StorageFullError if not even the small files
        fit.
        """
        small = sum(entry.size for entry in manifest.files if not entry.tensors)
        own = self._path(digest).name
        others = [
            Kept(
                name=name,
                size_bytes=kept.size,
                used=kept.used_ns,
                is_pinned=Digest(PREFIX + name) in pinned,
            )
            for name, kept in self._kept.items()
            if name != own
        ]
        wanted = manifest.total_bytes
        decision = whole = choose(others, wanted, self._bytes_max)
        if not whole.fits:
            wanted = small
            decision = choose(others, wanted, self._bytes_max)
        if not decision.fits:
            raise StorageFullError(
                f"no room in the node's cache: {decision.reason}",
                where=f"disk_bytes_max={self._bytes_max}",
                next_step="raise disk_bytes_max, or scale another deployment down",
            )
        for name in decision.victims:
            del self._kept[name]
        self._kept[own] = _Kept(wanted, time.time_ns())
        return Reservation([Digest(PREFIX + name) for name in decision.victims], whole.fits)

    def open_landing(self, digest: Digest, manifest: Manifest) -> Landing:
        """The artefact's landing directory, made or taken over; one and the same until it is evicted. Blocks."""
        path = self._path(digest)
        with self._opening:
            known = self._landings.get(path.name)
            if known is not None:
                return known
            try:
                self._io.make_directory(path)
                self._io.touch(path)
            except OSError as error:
                raise translated(error, path) from error
            landing = Landing(
                path,
                manifest,
                self._io,
                descriptors=self._descriptors,
                boot_id=self._boot_id,
                notice=partial(self._note, digest, manifest),
            )
            landing.open()
            self._landings[path.name] = landing
            self._index[path.name] = ChunkIndex(manifest)
        return landing

    def landings(self) -> dict[Digest, Landing]:
        """The landing directories that are open now."""
        return {Digest(PREFIX + name): landing for name, landing in list(self._landings.items())}

    def known_landing(self, digest: Digest) -> Landing | None:
        """The landing directory of an artefact that is on this disk, opened if it is not; otherwise None.
        Blocks."""
        landing = self._landings.get(self._path(digest).name)
        if landing is not None:
            return landing
        with self._opening:
            # Under the lock: one that is being evicted is out of the books, and is not to be made anew.
            manifest = self.cached_manifest(digest) if self.has(digest) else None
            return self.open_landing(digest, manifest) if manifest is not None else None

    def scrub_times(self) -> dict[Digest, float]:
        """When each artefact on this disk was last read through, in seconds since the epoch; 0 is never.
        Blocks."""
        times: dict[Digest, float] = {}
        for name in list(self._kept):
            times[Digest(PREFIX + name)] = 0.0
            with suppress(OSError):
                times[Digest(PREFIX + name)] = (self._artefacts / name / "scrubbed").stat().st_mtime
        return times

    def note_scrubbed(self, digest: Digest) -> None:
        """An artefact was read through now. Blocks."""
        path = self._path(digest) / "scrubbed"
        # Forgetting it costs a pass, no more.
        with suppress(OSError):
            self._io.create(path, 0, 0o600)
            self._io.touch(path)

    def find_chunk(self, key_domain: str, wanted: ChunkRef) -> tuple[Landing, int] | None:
        """A landing directory that claims this chunk of another artefact, and its number there. Blocks.

        The bytes are to be verified like those of any source. Domains never mix: a private one's ids are keyed.
        """
        self._load_index()
        for name, index in list(self._index.items()):
            chunk = index.find(key_domain, wanted)
            if chunk is None:
                continue
            try:
                landing = self.known_landing(Digest(PREFIX + name))
            except SnowdropError:
                # It cannot be opened now: as good as not there.
                continue
            if landing is not None and landing.holds(chunk):
                return landing, chunk
        return None

    def touch(self, digest: Digest) -> None:
        """Marks an artefact as used now."""
        path = self._path(digest)
        kept = self._kept.get(path.name)
        if kept is not None:
            self._kept[path.name] = kept._replace(used_ns=time.time_ns())
            with suppress(OSError):
                self._io.touch(path)

    def evict(self, digest: Digest) -> None:
        """Drops a landing directory. Whoever has one of its files open keeps that file. Blocks."""
        path = self._path(digest)
        doomed = self._trash / fresh_id(path.name)
        with self._opening:
            self._index.pop(path.name, None)
            landing = self._landings.pop(path.name, None)
            if landing is not None:
                landing.close()
            try:
                self._io.replace(path, doomed)
            except FileNotFoundError:
                return
            except OSError as error:
                raise translated(error, path) from error
        self._io.remove_tree(doomed)

    def _load_index(self) -> None:
        with self._opening:
            unread, self._unread = self._unread, []
            for name in unread:
                manifest = self.cached_manifest(Digest(PREFIX + name)) if name in self._kept else None
                if manifest is not None:
                    self._index.setdefault(name, ChunkIndex(manifest))

    def _note(self, digest: Digest, manifest: Manifest, kind: EventKind, chunk: int, seen_by: SeenBy) -> None:
        files = (entry.path for entry in manifest.files for extent in entry.extents if extent.chunk == chunk)
        self.events.add(
            ContentEvent(
                time_unix_ns=time.time_ns(),
                kind=kind,
                artefact=digest,
                chunk=chunk,
                digest=manifest.chunks[chunk].digest,
                file=next(files, ""),
                seen_by=seen_by,
            )
        )

    def _path(self, digest: Digest) -> Path:
        return self._artefacts / digest.removeprefix(PREFIX)

    def _take_lock(self) -> None:
        self._lock_fd = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + LOCK_S_MAX
        while True:
            try:
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self.close()
                    raise ConflictError(
                        "another data plane uses this cache directory",
                        where=str(self._directory),
                        next_step="`snowdrop down` first, or give this node a cache directory of its own",
                    ) from None
                time.sleep(0.02)

    def _measure(self, path: Path) -> _Kept:
        # What the files really take, not what they claim: tensor files may be holes that were never filled.
        size = 0
        for directory, _, names in os.walk(path):
            size += sum((Path(directory) / name).lstat().st_blocks * 512 for name in names)
        return _Kept(size, path.stat().st_mtime_ns)

"""Trees, sources and mounts for the tests of model directories."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest

from snowdrop.content.fuse.journal import Journal, create_journal
from snowdrop.content.fuse.mount import DEVICE, mount_tree, set_read_ahead, unmount_tree
from snowdrop.content.fuse.session import READ_S_MAX, Session
from snowdrop.content.fuse.source import FileSource
from snowdrop.content.fuse.tree import Tree
from snowdrop.domain.errors import UnavailableError
from snowdrop.domain.manifest import ChunkRef, Extent, FileEntry, Manifest, PackRef


def _may_mount() -> bool:
    try:
        os.close(os.open(DEVICE, os.O_RDWR))
    except OSError:
        return False
    return os.geteuid() == 0


needs_fuse = pytest.mark.skipif(not _may_mount(), reason="needs root and a /dev/fuse that can be opened")


def manifest_of(files: Mapping[str, bytes], modes: Mapping[str, int] | None = None) -> Manifest:
    """A manifest with one chunk a file: enough for inodes, not meant to be stored."""
    entries: list[FileEntry] = []
    chunks: list[ChunkRef] = []
    for path, content in files.items():
        extents = (Extent(0, len(content), len(chunks), 0),) if content else ()
        if content:
            chunks.append(ChunkRef(hashlib.sha256(content).hexdigest(), len(content), 0, 0, len(content)))
        entries.append(
            FileEntry(
                path=path,
                size=len(content),
                mode=(modes or {}).get(path, 0o644),
                sha256=hashlib.sha256(content).hexdigest(),
                extents=extents,
            )
        )
    return Manifest(
        version=1,
        kind="model",
        key_domain="public",
        files=tuple(entries),
        chunks=tuple(chunks),
        packs=(PackRef("0" * 64, sum(len(content) for content in files.values())),),
    )


class DictSource:
    """Files from memory. Bytes are on the node once they were brought, by blocks; `hold` keeps them away.

    `before` is called by each bring; what it raises is what the reader's session sees.
    """

    def __init__(self, files: Mapping[str, bytes], *, block_bytes: int = 64 << 10, is_here: bool = False) -> None:
        self.contents = list(files.values())
        self.block_bytes = block_bytes
        self.here: set[tuple[int, int]] = set()
        self.reads = 0
        self.brought: list[tuple[int, int, int]] = []
        self.before: Callable[[int, int, int], None] = lambda _file, _offset, _length: None
        self.released = anyio.Event()
        self.hold = False
        self.by_memory = False
        self.landing: dict[int, Path] = {}
        self._lock = threading.Lock()
        if is_here:
            for file, content in enumerate(self.contents):
                self.here.update((file, block) for block in range(len(content) // block_bytes + 1))

    def read(self, file: int, offset: int, into: memoryview) -> bool:
        with self._lock:
            self.reads += 1
            if any((file, block) not in self.here for block in self._blocks(offset, len(into))):
                return False
        into[:] = self.contents[file][offset : offset + len(into)]
        return True

    async def bring(self, file: int, offset: int, length: int) -> bytes | None:
        self.brought.append((file, offset, length))
        self.before(file, offset, length)
        await anyio.lowlevel.checkpoint()
        while self.hold:
            await self.released.wait()
        if self.by_memory:
            return self.contents[file][offset : offset + length]
        with self._lock:
            self.here.update((file, block) for block in self._blocks(offset, length))
        return None

    def backing(self, file: int) -> int | None:
        path = self.landing.get(file)
        return None if path is None else os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def let_go(self) -> None:
        self.hold = False
        self.released.set()

    def _blocks(self, offset: int, length: int) -> range:
        return range(offset // self.block_bytes, -(-(offset + length) // self.block_bytes))


class Mounted:
    """A mount with its session running in the test's event loop; `directory` is to be read in threads."""

    def __init__(self, directory: Path, device_fd: int, journal_fd: int, manifest: Manifest) -> None:
        self.directory = directory
        self.device_fd = device_fd
        self.journal_fd = journal_fd
        self.manifest = manifest

    def session(
        self, source: FileSource, *, passthrough: bool = True, read_s_max: float = READ_S_MAX
    ) -> tuple[Session, Journal]:
        """A server that does not run yet, and its journal, to be closed after it."""
        journal = Journal(self.journal_fd, len(self.manifest.files))
        session = Session(
            self.device_fd,
            journal,
            Tree(self.manifest, uid=os.geteuid(), gid=os.getegid()),
            source,
            passthrough_allowed=passthrough,
            name="test",
            read_s_max=read_s_max,
        )
        return session, journal

    @asynccontextmanager
    async def served(
        self, source: FileSource, *, passthrough: bool = True, read_s_max: float = READ_S_MAX
    ) -> AsyncIterator[Session]:
        session, journal = self.session(source, passthrough=passthrough, read_s_max=read_s_max)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(session.run)
                yield session
                tasks.cancel_scope.cancel()
        finally:
            journal.close()


@asynccontextmanager
async def mounted(at: Path, manifest: Manifest) -> AsyncIterator[Mounted]:
    """A mount that nobody serves yet; unmounted at the end."""
    at.mkdir(exist_ok=True)
    device_fd = mount_tree(at)
    set_read_ahead(at)
    journal_fd = create_journal(len(manifest.files))
    try:
        yield Mounted(at, device_fd, journal_fd, manifest)
    finally:
        with suppress(UnavailableError):
            unmount_tree(at)
        os.close(device_fd)
        os.close(journal_fd)


@contextmanager
def serving(
    at: Path,
    files: Mapping[str, bytes],
    source: FileSource,
    *,
    passthrough: bool = True,
    read_s_max: float = READ_S_MAX,
) -> Iterator[anyio.from_thread.BlockingPortal]:
    """A served mount at `at`, its session in a thread of its own: the test may simply read."""
    with (
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(mounted(at, manifest_of(files))) as mount,
        portal.wrap_async_context_manager(mount.served(source, passthrough=passthrough, read_s_max=read_s_max)),
    ):
        yield portal


def drop_cached(path: Path) -> None:
    """Has the kernel forget the pages of a file, so that the next read asks for them."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)

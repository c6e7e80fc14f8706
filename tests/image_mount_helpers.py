"""Trees, contents and mounts for the tests of mounted images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import anyio
import anyio.abc
import anyio.from_thread
import anyio.lowlevel

from snowdrop.content.fuse.journal import Journal
from snowdrop.content.fuse.session import READ_S_MAX, Session
from snowdrop.domain.image import ALIGN_BYTES, ImageConfig, ImageTree, TreeEntry
from snowdrop.image.mount.methods import image_mount
from snowdrop.image.mount.port import ImageMount, Method, View, served_files
from snowdrop.image.mount.views import MANIFEST_DATA_INDEX, ImageFiles, inodes_of

BLOCK_BYTES = 64 << 10


def built(entries: Sequence[tuple[TreeEntry, bytes]]) -> tuple[ImageTree, bytes]:
    """A tree of entries with their contents, sorted and laid out; same contents share a place."""
    data = bytearray()
    places: dict[bytes, int] = {}
    made: list[TreeEntry] = []
    for entry, content in sorted(entries, key=lambda pair: pair[0].path.split(b"/") if pair[0].path else []):
        if entry.kind != "file":
            made.append(entry)
            continue
        if content and content not in places:
            places[content] = len(data)
            data += content + bytes(-len(content) % ALIGN_BYTES)
        digest = hashlib.sha256(content).digest()
        made.append(
            TreeEntry(
                *(entry.path, "file", entry.mode, entry.uid, entry.gid, entry.mtime_ns),
                *(len(content), places.get(content, 0), digest, b"", entry.xattrs),
            )
        )
    tree = ImageTree(version=1, config=ImageConfig(), data_bytes=len(data), entries=tuple(made))
    return tree, bytes(data)


class MemoryContent:
    """An image's content from memory: on the node once it was brought, block by block.

    `hold` keeps blocks away as an origin that does not answer; `before` may raise what an origin raises.
    """

    def __init__(self, tree: ImageTree, data: bytes, local: Path) -> None:
        self.name = "test"
        self.tree = tree
        self.data = data
        self.here: set[int] = set()
        self.brought = 0
        self.hold = False
        self.released = anyio.Event()
        self.before: Callable[[], None] = lambda: None
        self.read_s_max = READ_S_MAX
        self.tasks: anyio.abc.TaskGroup | None = None
        self.servers: list[tuple[View, int, int, anyio.CancelScope, anyio.Event]] = []
        self._local = local

    # --- FileSource

    def read_file(self, offset: int, into: memoryview) -> bool:
        if not self.here.issuperset(self._blocks(offset, len(into))):
            return False
        into[:] = self.data[offset : offset + len(into)]
        return True

    async def bring(self, file: int, offset: int, length: int) -> bytes | None:
        assert file == MANIFEST_DATA_INDEX
        self.brought += 1
        self.before()
        await anyio.lowlevel.checkpoint()
        while self.hold:
            await self.released.wait()
        self.here.update(self._blocks(offset, length))
        return None

    # --- ImageContent

    def here_bytes(self) -> int:
        return min(len(self.here) * BLOCK_BYTES, len(self.data))

    def local_data(self) -> Path | None:
        return self._local if self._local.exists() else None

    async def read(self, offset: int, length: int) -> bytes:
        await self.bring(MANIFEST_DATA_INDEX, offset, length)
        return self.data[offset : offset + length]

    async def bring_all(self) -> None:
        await self.bring(MANIFEST_DATA_INDEX, 0, len(self.data))
        self._local.write_bytes(self.data)

    async def serve(self, view: View, device_fd: int, journal_fd: int) -> None:
        assert self.tasks is not None
        scope, ended = anyio.CancelScope(), anyio.Event()
        self.servers.append((view, device_fd, journal_fd, scope, ended))
        self.tasks.start_soon(self._serve, view, device_fd, journal_fd, scope, ended)

    async def kill_servers(self) -> list[tuple[View, int, int]]:
        """Ends all servers as a dying data plane would: what they had not answered stays in the journals."""
        ended = []
        for view, device_fd, journal_fd, scope, event in self.servers:
            scope.cancel()
            await event.wait()
            ended.append((view, device_fd, journal_fd))
        self.servers.clear()
        return ended

    def let_go(self) -> None:
        self.hold = False
        self.released.set()

    async def _serve(
        self, view: View, device_fd: int, journal_fd: int, scope: anyio.CancelScope, ended: anyio.Event
    ) -> None:
        journal = Journal(journal_fd, served_files(view, self.tree))
        device_fd = os.dup(device_fd)
        session = Session(
            device_fd,
            journal,
            inodes_of(view, self.tree),
            ImageFiles(_Source(self), self.tree, view),
            passthrough_allowed=True,
            name="test",
            read_s_max=self.read_s_max,
        )
        try:
            with scope:
                await session.run()
        finally:
            journal.close()
            os.close(device_fd)
            ended.set()

    def _blocks(self, offset: int, length: int) -> range:
        return range(offset // BLOCK_BYTES, -(-(offset + length) // BLOCK_BYTES))


class _Source:
    def __init__(self, content: MemoryContent) -> None:
        self._content = content
        self.bring = content.bring

    def read(self, file: int, offset: int, into: memoryview) -> bool:
        assert file == MANIFEST_DATA_INDEX
        return self._content.read_file(offset, into)

    def backing(self, file: int) -> int | None:
        raise AssertionError("no file of an image is passed through")


@asynccontextmanager
async def mounted(content: MemoryContent, method: Method, folder: Path) -> AsyncIterator[ImageMount]:
    """The content mounted at `folder`/root; unmounted at the end."""
    at = folder / "root"
    at.mkdir(exist_ok=True)
    mount = image_mount(content, folder / "work", method)
    async with anyio.create_task_group() as tasks:
        content.tasks = tasks
        try:
            await mount.mount(at)
            yield mount
        finally:
            content.let_go()
            with anyio.CancelScope(shield=True):
                await mount.unmount()
            tasks.cancel_scope.cancel()


@contextmanager
def mounting(
    content: MemoryContent, method: Method, folder: Path
) -> Iterator[tuple[ImageMount, anyio.from_thread.BlockingPortal]]:
    """As `mounted`, served in a thread of its own: the test may simply read."""
    with (
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(mounted(content, method, folder)) as mount,
    ):
        yield mount, portal

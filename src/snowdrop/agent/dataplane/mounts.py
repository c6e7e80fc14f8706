"""The data plane's part in mounts: a session for each that the agent hands over, until the mount is gone.

This process must never touch a mount that it serves: a page fault on it would wait, holding the interpreter, for
an answer that only this interpreter can give.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import NamedTuple, Protocol

import anyio
import anyio.abc
import anyio.to_thread

from snowdrop.agent.dataplane.starts import RecordedFiles, Recorder
from snowdrop.content.fuse.inodes import Inodes
from snowdrop.content.fuse.journal import Journal
from snowdrop.content.fuse.session import Session
from snowdrop.content.fuse.source import FileSource
from snowdrop.content.fuse.stored import FileStore, StoredFiles
from snowdrop.content.fuse.tree import Tree
from snowdrop.content.imagetree import check_image_manifest, decode_tree
from snowdrop.content.landing import Landing
from snowdrop.domain.errors import ProtocolError, SnowdropError
from snowdrop.domain.ids import Digest
from snowdrop.domain.image import TREE_FILE
from snowdrop.image.mount.port import View, served_files
from snowdrop.image.mount.views import ImageFiles, inodes_of

log = logging.getLogger("snowdrop.fuse")


class MountStore(FileStore, Protocol):
    """What is asked of the content store."""

    def landing_of(self, digest: Digest) -> Landing:
        """Raises NotFoundError if the artefact was not ensured."""


class _Mount(NamedTuple):
    """What a session is made of; journal and descriptor end with it."""

    digest: Digest
    landing: Landing
    tree: Inodes
    cut: Callable[[FileSource], FileSource]
    journal: Journal
    device_fd: int


class MountServer:
    """`tasks` carries the sessions; `recorder` is told what is read."""

    def __init__(self, store: MountStore, tasks: anyio.abc.TaskGroup, recorder: Recorder | None = None) -> None:
        self._store = store
        self._recorder = recorder or Recorder()
        self._tasks = tasks
        self._served: set[tuple[int, int]] = set()

    async def serve(self, digest: Digest, fds: tuple[int, ...], view: str = "files") -> None:
        """Serves the mount whose device and journal `fds` are, and owns them; returns once it has begun.

        A mount that is served already goes on being served: whoever asked may not have heard of it, and two
        sessions would take the same slots of its journal.

        `view` as in `ServeMount`.

        Raises NotFoundError if the artefact was not ensured, ProtocolError if they are not those of a mount of it.
        """
        if len(fds) != 2:
            _close(fds)
            raise ProtocolError(f"a mount comes with 2 descriptors, not {len(fds)}", where="ServeMount")
        device_fd, journal_fd = fds
        stat = os.fstat(journal_fd)
        identity = stat.st_dev, stat.st_ino
        if identity in self._served:
            _close(fds)
            return
        self._served.add(identity)
        try:
            landing = self._store.landing_of(digest)
            tree, file_count, cut = await anyio.to_thread.run_sync(_shown, landing, view)
            journal = Journal(journal_fd, file_count)
        except BaseException:
            self._served.discard(identity)
            os.close(device_fd)
            raise
        finally:
            os.close(journal_fd)
        mount = _Mount(digest, landing, tree, cut, journal, device_fd)
        self._tasks.start_soon(self._run_until_gone, identity, mount)

    async def _run_until_gone(self, identity: tuple[int, int], mount: _Mount) -> None:
        try:
            await self._run(mount)
        finally:
            self._served.discard(identity)

    async def _run(self, mount: _Mount) -> None:
        try:
            async with anyio.create_task_group() as ahead:
                source = StoredFiles(self._store, mount.digest, mount.landing, ahead)
                session = Session(
                    mount.device_fd,
                    mount.journal,
                    mount.tree,
                    mount.cut(RecordedFiles(source, mount.digest, self._recorder)),
                    passthrough_allowed=os.geteuid() == 0,
                    name=mount.digest[:19],
                )
                try:
                    await session.run()
                finally:
                    ahead.cancel_scope.cancel()
                    source.close()
        except* SnowdropError as errors:
            for error in errors.exceptions:
                log.error("the mount of %s is not served: %s", mount.digest, error)
        finally:
            mount.journal.close()
            os.close(mount.device_fd)


def _shown(landing: Landing, view: str) -> tuple[Inodes, int, Callable[[FileSource], FileSource]]:
    """What a view shows: its names, how many files they are, and what the files are of the artefact's. Blocks."""
    if view == "files":
        tree = Tree(landing.manifest, uid=os.geteuid(), gid=os.getegid())
        return tree, len(landing.manifest.files), lambda source: source
    check_image_manifest(landing.manifest)
    image = decode_tree((landing.tree / TREE_FILE).read_bytes())
    check_image_manifest(landing.manifest, image)
    shown: View = "tree" if view == "tree" else "data"
    return inodes_of(shown, image), served_files(shown, image), lambda source: ImageFiles(source, image, shown)


def _close(fds: tuple[int, ...]) -> None:
    for fd in fds:
        os.close(fd)

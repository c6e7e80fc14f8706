"""The data plane's part in mounts: a session for each that the agent hands over, until the mount is gone.

This process must never touch a mount that it serves: a page fault on it would wait, holding the interpreter, for
an answer that only this interpreter can give.
"""

from __future__ import annotations

import logging
import os
from typing import Protocol

import anyio
import anyio.abc
import anyio.to_thread

from snowdrop.content.fuse.journal import Journal
from snowdrop.content.fuse.session import Session
from snowdrop.content.fuse.stored import FileStore, StoredFiles
from snowdrop.content.fuse.tree import Tree
from snowdrop.content.landing import Landing
from snowdrop.domain.errors import ProtocolError, SnowdropError
from snowdrop.domain.ids import Digest

log = logging.getLogger("snowdrop.fuse")


class MountStore(FileStore, Protocol):
    """What is asked of the content store."""

    def landing_of(self, digest: Digest) -> Landing:
        """Raises NotFoundError if the artefact was not ensured."""


class MountServer:
    """`tasks` carries the sessions."""

    def __init__(self, store: MountStore, tasks: anyio.abc.TaskGroup) -> None:
        self._store = store
        self._tasks = tasks

    async def serve(self, digest: Digest, fds: tuple[int, ...]) -> None:
        """Serves the mount whose device and journal `fds` are, and owns them; returns once it has begun.

        Raises NotFoundError if the artefact was not ensured, ProtocolError if they are not those of a mount of it.
        """
        if len(fds) != 2:
            _close(fds)
            raise ProtocolError(f"a mount comes with 2 descriptors, not {len(fds)}", where="ServeMount")
        device_fd, journal_fd = fds
        try:
            landing = self._store.landing_of(digest)
            tree = await anyio.to_thread.run_sync(
                lambda: Tree(landing.manifest, uid=os.geteuid(), gid=os.getegid())
            )
            journal = Journal(journal_fd, len(landing.manifest.files))
        except BaseException:
            os.close(device_fd)
            raise
        finally:
            os.close(journal_fd)
        self._tasks.start_soon(self._run, digest, landing, tree, journal, device_fd)

    async def _run(self, digest: Digest, landing: Landing, tree: Tree, journal: Journal, device_fd: int) -> None:
        try:
            async with anyio.create_task_group() as ahead:
                source = StoredFiles(self._store, digest, landing, ahead)
                session = Session(
                    device_fd, journal, tree, source, passthrough_allowed=os.geteuid() == 0, name=digest[:19]
                )
                try:
                    await session.run()
                finally:
                    ahead.cancel_scope.cancel()
                    source.close()
        except* SnowdropError as errors:
            for error in errors.exceptions:
                log.error("the mount of %s is not served: %s", digest, error)
        finally:
            journal.close()
            os.close(device_fd)


def _close(fds: tuple[int, ...]) -> None:
    for fd in fds:
        os.close(fd)

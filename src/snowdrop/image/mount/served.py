"""A directory that is served over FUSE: device and journal, held here so that servers may come and go."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread

from snowdrop.content.fuse.journal import create_journal
from snowdrop.content.fuse.mount import mount_tree, set_read_ahead, unmount_tree
from snowdrop.domain.errors import TimedOutError, UnavailableError
from snowdrop.image.mount.port import ImageContent, View, served_files

SERVE_S_MAX = 60.0
"""How long it may take until somebody serves a new mount."""


class ServedDirectory:
    """While it is held a server that dies leaves its readers waiting, and the next one answers them."""

    def __init__(self, at: Path, device_fd: int, journal_fd: int) -> None:
        self._at = at
        self.device_fd = device_fd
        self.journal_fd = journal_fd

    async def close(self) -> None:
        """Unmounts, and lets the descriptors go. Raises UnavailableError if it stays; may be repeated."""
        if self.device_fd < 0:
            return
        await anyio.to_thread.run_sync(unmount_tree, self._at)
        os.close(self.device_fd)
        os.close(self.journal_fd)
        self.device_fd = self.journal_fd = -1


async def serve_directory(content: ImageContent, view: View, at: Path) -> ServedDirectory:
    """Mounts `view` at `at` and has it served. Raises UnavailableError, TimedOutError; then nothing is left."""
    device_fd = await anyio.to_thread.run_sync(mount_tree, at)
    served: ServedDirectory | None = None
    try:
        served = ServedDirectory(at, device_fd, create_journal(served_files(view, content.tree)))
        with anyio.fail_after(SERVE_S_MAX):
            await content.serve(view, served.device_fd, served.journal_fd)
            await anyio.to_thread.run_sync(partial(set_read_ahead, at))
    except BaseException as error:
        with anyio.CancelScope(shield=True), suppress(UnavailableError):
            if served is not None:
                await served.close()
            else:
                await anyio.to_thread.run_sync(unmount_tree, at)
                os.close(device_fd)
        if isinstance(error, TimeoutError):
            raise TimedOutError("nobody serves the mount", where=f"serve_s_max={SERVE_S_MAX}: {at}") from error
        if isinstance(error, OSError):
            raise UnavailableError(f"no journal for a mount: {error.strerror}", where=str(at)) from error
        raise
    return served

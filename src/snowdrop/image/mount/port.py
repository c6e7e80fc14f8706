"""The port of a mounted image, and the port of the content behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

import msgspec

from snowdrop.domain.image import ImageTree

Method = Literal["erofs", "fuse", "unpack"]
View = Literal["data", "tree"]
"""What a served mount shows: one file `data`, or the image's own names."""


class MountProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How much of an image's data is on the node, verified. `needs_daemon`: reads pass through the data plane."""

    method: Method
    here_bytes: int
    total_bytes: int
    needs_daemon: bool


class ImageMount(Protocol):
    """One image at one directory. Files cannot be told from those of a full copy, but that the first read of one
    may wait: for at most the server's bound, then it fails with EIO, and the next one tries again."""

    method: Method

    async def mount(self, at: Path) -> None:
        """Has the image at `at`, an empty directory. Once: a mount is not made again after `unmount`.

        Raises UnavailableError, StorageFullError, or what brings the content; then `at` is empty as before.
        """

    def progress(self) -> MountProgress: ...

    async def complete(self) -> None:
        """Returns when all data is on the node, verified. A mount made from then on needs no daemon.

        Raises what brings the content; the mount goes on as it was.
        """

    async def unmount(self) -> None:
        """Takes it away; open files stay readable where the method allows. Nothing is left. May be repeated."""


class ImageContent(Protocol):
    """The data of one image on this node. Every byte that it gives is verified."""

    @property
    def name(self) -> str:
        """For errors and logs."""

    @property
    def tree(self) -> ImageTree: ...

    def here_bytes(self) -> int:
        """How much of `data` is on the node."""

    def local_data(self) -> Path | None:
        """A file that is all of `data`, verified and durable; None while there is none."""

    async def read(self, offset: int, length: int) -> bytes:
        """Bytes of `data`, brought if they are not here. Raises SnowdropError."""

    async def bring_all(self) -> None:
        """Returns when `local_data` has a file. Raises SnowdropError."""

    async def serve(self, view: View, device_fd: int, journal_fd: int) -> None:
        """Has a mount served from now on, until it is gone, also by a data plane that comes after this one.

        The descriptors stay the caller's, open until the mount is gone. A journal for as many files as
        `served_files` says.
        """


def served_files(view: View, tree: ImageTree) -> int:
    """How many files the journal of a served mount has to count."""
    return len(tree.entries) if view == "tree" else 1

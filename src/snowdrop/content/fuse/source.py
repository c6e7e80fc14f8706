"""The port between a mount and the content behind it."""

from __future__ import annotations

from typing import Protocol


class FileSource(Protocol):
    """Verified bytes of the files of one tree, by their index in its manifest.

    `read` and `backing` block at most for the local disk and are called from several threads; `bring` runs on the
    event loop. All raise SnowdropError. A range never goes beyond the end of its file.
    """

    def read(self, file: int, offset: int, into: memoryview) -> bool:
        """Fills `into` if these bytes are on the node, verified; else returns False, having fetched nothing."""

    async def bring(self, file: int, offset: int, length: int) -> bytes | None:
        """Returns once `read` would find these bytes; or returns them itself where the disk has no room."""

    def backing(self, file: int) -> int | None:
        """A new descriptor of a local file with exactly these bytes, all verified; None while there is none.

        The kernel may be given it to read from by itself; the caller closes it.
        """

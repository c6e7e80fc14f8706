"""Where the answer of a task goes until control has it: memory first, a file that nobody names beyond that.

Control may be away when an answer comes. So it is held here, whole, and can be sent as often as it takes.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType

import anyio.to_thread
from multidict import CIMultiDict

from snowdrop.domain.errors import SnowdropError, StorageFullError, TooLargeError
from snowdrop.gateway.tasks.client import READ_BYTES
from snowdrop.wire.slots import WaitNews

MEMORY_BYTES_MAX = 256 << 10


class SpoolSink:
    """A sink of one attempt, to be closed."""

    def __init__(self, folder: Path, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._file = tempfile.SpooledTemporaryFile(MEMORY_BYTES_MAX, dir=str(folder))  # noqa: SIM115 -- `__exit__`
        self._bytes = 0
        self.status = 0
        self.headers: CIMultiDict[str] = CIMultiDict()
        self.error: SnowdropError | None = None

    def __enter__(self) -> SpoolSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def begun(self) -> bool:
        return self.status != 0

    async def whole(self, status: int, headers: CIMultiDict[str], body: bytes) -> None:
        await self.begin(status, headers, len(body))
        await self.write(body)

    async def begin(self, status: int, headers: CIMultiDict[str], length: int | None) -> None:
        self._check(length or 0)
        self.status, self.headers = status, headers

    async def write(self, chunk: bytes) -> None:
        self._bytes += len(chunk)
        self._check(self._bytes)
        try:
            if self._bytes <= MEMORY_BYTES_MAX:
                self._file.write(chunk)
            else:
                await anyio.to_thread.run_sync(self._file.write, chunk)
        except OSError as error:
            raise StorageFullError(
                f"cannot hold a task's answer: {error.strerror}",
                where="tasks",
                next_step="free space on that disk",
            ) from error

    async def end(self) -> None: ...
    async def progress(self, news: WaitNews) -> None: ...

    async def broken(self, error: SnowdropError) -> None:
        """What has come so far is no answer."""
        self.error = error

    async def read(self) -> AsyncIterator[bytes]:
        """The body from its start; may be asked for again."""
        self._file.seek(0)
        while True:
            chunk = self._file.read(READ_BYTES)
            if not chunk:
                return
            yield chunk

    def _check(self, count: int) -> None:
        if count > self._bytes_max:
            raise TooLargeError(
                "the answer is too large to be kept",
                where=f"tasks.result_bytes_max={self._bytes_max}",
                next_step="answer less, or raise the setting",
            )

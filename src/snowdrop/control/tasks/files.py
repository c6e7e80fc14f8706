"""Bodies of tasks: small ones are for the database, others become files, durable before a row names them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

import anyio
import anyio.to_thread
import msgspec

from snowdrop.domain.errors import StorageFullError, TooLargeError
from snowdrop.domain.task import Task, TaskState
from snowdrop.state.tasks import TaskStore

INLINE_BYTES_MAX = 64 << 10
"""Bodies up to this size lie in the task's row."""
READ_BYTES = 256 << 10
SWEPT_MAX = 1_000


class StoredBody(msgspec.Struct, frozen=True, kw_only=True):
    """A body that was taken in: `inline` or in the file `path`."""

    inline: bytes | None
    path: Path | None
    size_bytes: int
    sha256: str

    def drop(self) -> None:
        """Nothing names it after all."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def request_name(task: str) -> str:
    return f"{task}.request"


def result_name(task: str, generation: int) -> str:
    return f"{task}.{generation}.result"


class TaskFiles:
    """One folder, flat; a file's name says whose it is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, name: str) -> Path:
        return self._folder / name

    async def take(self, name: str, chunks: AsyncIterator[bytes], *, bytes_max: int, bound: str) -> StoredBody:
        """Takes a body in. Raises TooLargeError, naming `bound`, or StorageFullError; then nothing is left."""
        digest, start, size = hashlib.sha256(), bytearray(), 0
        file: BinaryIO | None = None
        path = self._folder / name
        partial = self._folder / f"{name}.new"
        try:
            async for chunk in chunks:
                size += len(chunk)
                if size > bytes_max:
                    raise TooLargeError(
                        "the body is too large to be kept",
                        where=f"{bound}={bytes_max}",
                        next_step="send less, or raise the setting",
                    )
                digest.update(chunk)
                if file is None and size <= INLINE_BYTES_MAX:
                    start += chunk
                    continue
                if file is None:
                    file = await anyio.to_thread.run_sync(_begin, partial, bytes(start))
                await anyio.to_thread.run_sync(file.write, chunk)
            if file is not None:
                await anyio.to_thread.run_sync(_finish, file, partial, path)
        except BaseException as error:
            if file is not None:
                file.close()
                partial.unlink(missing_ok=True)
            if isinstance(error, OSError) and not isinstance(error, ConnectionError):
                raise StorageFullError(
                    f"cannot keep a task's body: {error.strerror}",
                    where=str(partial),
                    next_step="free space on that disk",
                ) from error
            raise
        return StoredBody(
            inline=bytes(start) if file is None else None,
            path=path if file is not None else None,
            size_bytes=size,
            sha256=digest.hexdigest(),
        )

    def drop(self, task: Task, *, request: bool, generation: int = 0) -> None:
        """Removes files that a task names no more."""
        if request:
            self.path(request_name(task.id)).unlink(missing_ok=True)
        if generation:
            self.path(result_name(task.id, generation)).unlink(missing_ok=True)

    async def sweep(self, store: TaskStore) -> int:
        """Removes what a crash left: files that no task names. How many."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        names = [entry.name for entry in os.scandir(self._folder)]
        removed = 0
        for place in range(0, len(names), SWEPT_MAX):
            part = names[place : place + SWEPT_MAX]
            known = await store.exist(frozenset(name.split(".")[0] for name in part))
            for name in part:
                if not _is_named(name, known.get(name.split(".")[0])):
                    self.path(name).unlink(missing_ok=True)
                    removed += 1
        return removed


def _is_named(name: str, task: Task | None) -> bool:
    if task is None:
        return False
    if name == request_name(task.id):
        return task.state is not TaskState.SUCCEEDED
    return task.answer is not None and name == result_name(task.id, task.answer.generation)


def _begin(partial: Path, start: bytes) -> BinaryIO:
    partial.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = open(partial, "wb")  # noqa: SIM115 -- closed by who asked for it
    file.write(start)
    return file


def _finish(file: BinaryIO, partial: Path, path: Path) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

"""A directory as the source of a push."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from snowdrop.content.ingest.source import EVERYTHING, Filter, SourceFile, changed
from snowdrop.content.scan import ScannedFile, scan_directory
from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.manifest import FILES_MAX


class DirectorySource:
    """The files of a directory."""

    def __init__(
        self, root: Path, *, ignored: tuple[str, ...], chosen: Filter = EVERYTHING, files_max: int = FILES_MAX
    ) -> None:
        self.name = str(root)
        self.identity = f"directory:{root.resolve()}"
        self._root = root
        self._ignored = ignored
        self._chosen = chosen
        self._files_max = files_max
        self._scanned: dict[str, ScannedFile] = {}

    def files(self) -> Sequence[SourceFile]:
        found = scan_directory(self._root, ignored=self._ignored, files_max=self._files_max)
        self._scanned = {file.path: file for file in found if self._chosen.takes(file.path)}
        return [
            SourceFile(path=file.path, size=file.size, mode=file.mode, version=_version(file))
            for file in self._scanned.values()
        ]

    def read(self, file: SourceFile, offset: int, into: memoryview) -> None:
        with self._opened(file) as fd:
            done = 0
            while done < len(into):
                count = os.preadv(fd, [into[done:]], offset + done)
                if count == 0:
                    raise changed(file.path)
                done += count

    def settle(self, file: SourceFile) -> None:
        with self._opened(file):
            pass

    def close(self) -> None:
        pass

    @contextmanager
    def _opened(self, file: SourceFile) -> Iterator[int]:
        """A descriptor of the file as it was listed: opening and comparing cost little beside reading a span."""
        scanned = self._scanned[file.path]
        try:
            # O_NONBLOCK: a fifo put in the file's place must not hang the push.
            fd = os.open(scanned.location, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if ScannedFile.of(scanned.path, scanned.location, os.fstat(fd)) != scanned:
                    raise changed(file.path)
                yield fd
            finally:
                os.close(fd)
        except OSError as error:
            raise InvalidInputError(
                f"{file.path} cannot be read: {error.strerror}",
                where=file.path,
                next_step="make it readable, then push again",
            ) from error


def _version(file: ScannedFile) -> str:
    return f"{file.size}-{file.changed_ns}-{file.status_changed_ns}-{file.inode}"

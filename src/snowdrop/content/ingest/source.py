"""Source: the port behind which the files of a push lie, wherever they are."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Protocol

import msgspec

from snowdrop.content.cut import load_order_key
from snowdrop.content.paths import clashing_path, parse_tree_path
from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.manifest import FILES_MAX


class SourceFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file to push.

    `version` is another one whenever the content may be another: a push that goes on from an earlier one believes
    what it knows of a file only under the same version. `sha256` and `git_blob` are what the source says the
    content is, empty if it says nothing; a push refuses a file that differs. `cuts` are where its chunks
    begin, the first at 0, none longer than CHUNK_BYTES_MAX; empty: wherever this writer cuts.
    """

    path: str
    size: int
    mode: int
    version: str
    sha256: str = ""
    git_blob: str = ""
    cuts: tuple[int, ...] = ()


class Source(Protocol):
    """Where the files of a push are. `read` blocks and is called from several threads at once."""

    @property
    def name(self) -> str:
        """As a person would write it; kept with the model."""

    @property
    def identity(self) -> str:
        """The same for the same place in every run."""

    def files(self) -> Sequence[SourceFile]:
        """Every file, in load order, with paths that are checked."""

    def read(self, file: SourceFile, offset: int, into: memoryview) -> None:
        """Fills `into` from `offset`; raises InvalidInputError if the file is not the one that was listed."""

    def settle(self, file: SourceFile) -> None:
        """After the last read of a file: raises InvalidInputError if it changed since it was listed."""

    def close(self) -> None:
        """Ends reads that are waiting, for good; may be called while they run, and twice."""


class Filter(msgspec.Struct, frozen=True):
    """Which files of a source are taken: fnmatch patterns on the path or on its last component."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def takes(self, path: str) -> bool:
        return (not self.include or matches(path, self.include)) and not matches(path, self.exclude)


EVERYTHING = Filter()


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern matches the path, one of its components, or a directory that it lies in."""
    parts = path.split("/")
    places = {*parts, *("/".join(parts[:count]) for count in range(1, len(parts) + 1))}
    return any(fnmatchcase(place, pattern.rstrip("/")) for pattern in patterns for place in places)


def in_load_order(files: list[SourceFile], *, where: str) -> list[SourceFile]:
    """A remote listing as a tree: checked paths, no clash, bounded.

    Raises InvalidInputError naming the path of what cannot be a file of a tree.
    """
    if len(files) > FILES_MAX:
        raise InvalidInputError(
            f"{len(files)} files",
            where=f"{where}: files_max={FILES_MAX}",
            next_step="leave some out with --exclude",
        )
    for file in files:
        parse_tree_path(file.path, error=InvalidInputError)
    clash = clashing_path([file.path for file in files])
    if clash is not None:
        raise InvalidInputError(
            "path occurs twice, or as file and directory",
            where=ascii(clash),
            next_step="leave one of them out with --exclude",
        )
    return sorted(files, key=lambda file: load_order_key(file.path))


def changed(path: str) -> InvalidInputError:
    return InvalidInputError(
        f"{path} changed while it was being read", where=path, next_step="push again when nothing writes to it"
    )

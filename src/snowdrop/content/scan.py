"""Source directories: which files a push takes, under which rules. Reads no file contents but .snowdropignore.

A state folder of Snowdrop's below the directory is left out by itself: it has sockets, keys and caches.

A symbolic link whose target is a file inside the directory is taken as that file; one that leads out of it, to a
directory or to nothing is refused by name, and so is anything that is neither file nor directory.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple, Self

from snowdrop.content.cut import load_order_key
from snowdrop.content.paths import parse_tree_path
from snowdrop.domain.errors import InvalidInputError, NotFoundError
from snowdrop.domain.layout import is_state_folder
from snowdrop.domain.manifest import FILES_MAX

IGNORE_FILE = ".snowdropignore"
IGNORE_BYTES_MAX = 64 << 10
IGNORED_IN_MODELS = (".git", "__pycache__", IGNORE_FILE)
IGNORED_IN_CODE = (
    ".git", "__pycache__", ".venv", "*.pyc", ".mypy_cache", ".pytest_cache", ".ruff_cache", IGNORE_FILE,
)  # fmt: skip


class ScannedFile(NamedTuple):
    """A file of the directory. `mode` is normalised: 0o755 if its owner may execute it, otherwise 0o644."""

    path: str
    location: Path
    size: int
    mode: int
    changed_ns: int
    status_changed_ns: int
    inode: int

    @classmethod
    def of(cls, path: str, location: Path, status: os.stat_result) -> Self:
        return cls(
            path,
            location,
            status.st_size,
            0o755 if status.st_mode & 0o100 else 0o644,
            status.st_mtime_ns,
            status.st_ctime_ns,
            status.st_ino,
        )


def scan_directory(source: Path, *, ignored: tuple[str, ...], files_max: int = FILES_MAX) -> list[ScannedFile]:
    """The files of `source` in load order.

    `ignored` are fnmatch patterns that apply to a name or to a path from `source`; the lines of a
    .snowdropignore there (`#` comments) are added. Raises NotFoundError if `source` is no directory and
    InvalidInputError naming the path of whatever cannot be pushed.
    """
    if not source.is_dir():
        raise NotFoundError(
            f"{source} is not a directory", where=str(source), next_step="name an existing directory"
        )
    root = source.resolve()
    patterns = ignored + _own_patterns(root)
    found: list[ScannedFile] = []
    for file in _walk(root, "", patterns):
        found.append(file)
        if len(found) > files_max:
            raise InvalidInputError(
                f"more than {files_max} files",
                where=f"{source}: files_max={files_max}",
                next_step=f"leave some out with a {IGNORE_FILE}",
            )
    return sorted(found, key=lambda file: load_order_key(file.path))


def _own_patterns(root: Path) -> tuple[str, ...]:
    try:
        with (root / IGNORE_FILE).open("rb") as stream:
            text = stream.read(IGNORE_BYTES_MAX + 1).decode()
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{IGNORE_FILE} cannot be read: {error}", where=IGNORE_FILE) from error
    if len(text.encode()) > IGNORE_BYTES_MAX:
        raise InvalidInputError(f"{IGNORE_FILE} is too long", where=f"ignore_bytes_max={IGNORE_BYTES_MAX}")
    lines = (line.strip() for line in text.splitlines())
    return tuple(line.rstrip("/") for line in lines if line and not line.startswith("#"))


def _is_ignored(path: str, name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) or fnmatchcase(path, pattern) for pattern in patterns)


def _walk(root: Path, prefix: str, patterns: tuple[str, ...]) -> Iterator[ScannedFile]:
    try:
        with os.scandir(root / prefix) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InvalidInputError(
            f"directory cannot be read: {error.strerror}", where=prefix or str(root), next_step="make it readable"
        ) from error
    for entry in listed:
        path = f"{prefix}/{entry.name}" if prefix else entry.name
        if _is_ignored(path, entry.name, patterns):
            continue
        parse_tree_path(path, error=InvalidInputError)
        if entry.is_dir(follow_symlinks=False):
            if is_state_folder(Path(entry.path)):
                continue
            yield from _walk(root, path, patterns)
        else:
            yield _source_file(root, path, Path(entry.path), is_link=entry.is_symlink())


def _source_file(root: Path, path: str, location: Path, *, is_link: bool) -> ScannedFile:
    try:
        target = location.resolve(strict=True) if is_link else location
        status = target.stat()
    except (OSError, RuntimeError) as error:
        raise InvalidInputError(
            f"{path} cannot be read: {error}", where=path, next_step="remove it or make it readable"
        ) from error
    if is_link and not target.is_relative_to(root):
        raise InvalidInputError(
            f"symbolic link {path} leads out of the directory, to {target}",
            where=path,
            next_step="push a copy with its links resolved: cp -rL SOURCE COPY",
        )
    if not stat.S_ISREG(status.st_mode):
        kind = (
            "a symbolic link to a directory" if is_link and stat.S_ISDIR(status.st_mode) else "not a regular file"
        )
        raise InvalidInputError(
            f"{path} is {kind}", where=path, next_step=f"remove it or name it in a {IGNORE_FILE}"
        )
    return ScannedFile.of(path, target, status)

"""What mounts need of the file system: directories to mount at, and the record of those that people asked for."""

from __future__ import annotations

from pathlib import Path

from snowdrop.domain.errors import InvalidInputError, UnavailableError

DIRECTORY_MODE = 0o755


def replace_file(path: Path, data: bytes) -> None:
    """The whole file or the one before it. Blocks; raises UnavailableError."""
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise UnavailableError(f"mounts cannot be recorded: {error.strerror}", where=str(path)) from error


def check_directory(at: Path) -> None:
    """Makes it, or finds it empty. Blocks; raises InvalidInputError if nothing can be mounted there."""
    if not at.is_absolute():
        raise InvalidInputError("the directory must be absolute", where=str(at))
    try:
        if at.is_symlink():
            # The kernel would mount on what it leads to, and not unmount by its name.
            raise InvalidInputError(
                "the directory is a symbolic link", where=str(at), next_step="name the directory itself"
            )
        at.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
        if any(at.iterdir()):
            raise InvalidInputError(
                "the directory is not empty", where=str(at), next_step="name a new or an empty one"
            )
    except OSError as error:
        raise InvalidInputError(f"no directory can be made there: {error.strerror}", where=str(at)) from error

"""Layers that builds have made, kept by the digest of what they were made from, in a folder that has a bound.

A layer is `KEY.tar` with its own digest in `KEY.sha256`. It gets its name only when it is whole, so a build that
was killed leaves no half layer, and the next one goes on from those that are here.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from snowdrop.domain.errors import ConflictError, StorageFullError

CACHE_BYTES_MAX = 64 << 30
MTIME_S = 315_532_800
"""Of every file of a layer: 1980, the earliest that a zip file can say."""


class BuiltLayer(msgspec.Struct, frozen=True, kw_only=True):
    """A plain tar, and its digest (`sha256:…`)."""

    path: Path
    digest: str
    size: int


class BuildCache:
    """The folder. One build uses it at a time; raises ConflictError if another one does."""

    def __init__(self, folder: Path, *, bytes_max: int = CACHE_BYTES_MAX) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder
        self._bytes_max = bytes_max
        self._used: set[Path] = set()
        self._lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ConflictError(
                "another build of an image is under way here", where=str(folder), next_step="wait for it to end"
            ) from None
        for left in folder.glob("work-*"):  # of a build that was killed
            shutil.rmtree(left, ignore_errors=True)

    def close(self) -> None:
        os.close(self._lock)

    @contextmanager
    def work(self) -> Iterator[Path]:
        """A folder for what is under way, on the same file system."""
        with tempfile.TemporaryDirectory(prefix="work-", dir=self._folder) as name:
            yield Path(name)

    def layer(self, key: str, make: Callable[[Path], None], *, fresh: bool = False) -> BuiltLayer:
        """The layer of `key`, made by `make` (which writes a tar to the path) if it is not here, or is damaged.

        Raises what `make` raises; nothing is kept then.
        """
        path, said = self._folder / f"{key}.tar", self._folder / f"{key}.sha256"
        if not fresh and path.exists() and said.exists() and file_digest(path) == said.read_text("ascii"):
            os.utime(path)
        else:
            with self.work() as work:
                made = work / "layer.tar"
                make(made)
                (work / "sha256").write_text(file_digest(made), "ascii")
                path.unlink(missing_ok=True)
                (work / "sha256").replace(said)
                made.replace(path)
        self._used.add(path)
        self._trim()
        return BuiltLayer(path=path, digest=said.read_text("ascii"), size=path.stat().st_size)

    def _trim(self) -> None:
        """Removes the layers that were used longest ago, never one of this build."""
        kept = sorted(self._folder.glob("*.tar"), key=lambda path: path.stat().st_mtime)
        total = sum(path.stat().st_size for path in kept)
        for path in kept:
            if total <= self._bytes_max:
                return
            if path not in self._used:
                total -= path.stat().st_size
                path.unlink()
                path.with_suffix(".sha256").unlink(missing_ok=True)
        if total > self._bytes_max:
            raise StorageFullError(
                "the layers of one image do not fit into the cache of builds",
                where=f"build_cache_bytes_max={self._bytes_max}",
                next_step="make the image smaller",
            )


def chain_key(*parts: str) -> str:
    """Of a layer: from its parent's key, the step and the step's inputs."""
    hasher = hashlib.sha256()
    for part in parts:
        encoded = part.encode()
        hasher.update(len(encoded).to_bytes(8, "big") + encoded)
    return hasher.hexdigest()


def write_tar(path: Path, members: Iterable[tuple[str, Path]], *, bytes_max: int = CACHE_BYTES_MAX) -> None:
    """A tar of `members` (name in it, what is there), the same wherever and whenever it is made: by name, root's,
    of one time, executable or not. A directory is without what it holds. Raises StorageFullError.
    """
    total = 0
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as made:
        for name, found in sorted(members):
            info = tarfile.TarInfo(name)
            info.mtime = MTIME_S
            if found.is_symlink():
                info.type, info.linkname = tarfile.SYMTYPE, str(found.readlink())
                made.addfile(info)
            elif found.is_dir():
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                made.addfile(info)
            else:
                with found.open("rb") as stream:
                    status = os.fstat(stream.fileno())
                    info.size = status.st_size
                    info.mode = 0o755 if status.st_mode & 0o100 else 0o644
                    total += info.size
                    if total > bytes_max:
                        raise StorageFullError(
                            "a layer is too large", where=f"layer_bytes_max={bytes_max}", next_step="copy less"
                        )
                    made.addfile(info, stream)


def file_digest(path: Path) -> str:
    """`sha256:…` of a file's bytes."""
    with path.open("rb") as stream:
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"

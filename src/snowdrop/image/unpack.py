"""Layers on their way: fetched, unpacked and checked, each once, into files of a folder that has a bound.

A layer that is here is `KEY.entries` beside `KEY.data`, the contents of its files one after the other. `KEY.part`
is what a remote source has given of a layer so far; a push that is run again goes on from there.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from snowdrop.domain.errors import (
    ConflictError,
    CorruptContentError,
    IntegrityError,
    SnowdropError,
    StorageFullError,
)
from snowdrop.domain.image import ENTRIES_MAX, XATTR_BYTES_MAX, TreeEntry
from snowdrop.image.codecs import plain_stream
from snowdrop.image.flatten import layer_path
from snowdrop.image.source import Digested, ImageSource, Layer, Read
from snowdrop.image.tar import Member, TarReader

FOLDER_BYTES_MAX = 256 << 30
LAYER_BYTES_MAX = 128 << 30
ATTEMPTS_MAX = 5
"""Fetches of a layer in a row that bring nothing, before its push gives up."""
PAUSE_S = 0.5
STALE_S = 7 * 86_400.0
_ENTRIES = msgspec.msgpack.Decoder(tuple[TreeEntry, ...])
Progress = Callable[[int], None]
"""Told how many more of a layer's stored bytes were read."""


class Unpacked(msgspec.Struct, frozen=True, kw_only=True):
    """A layer that is here. Contents lie in `data` where their entries' offsets say."""

    entries: tuple[TreeEntry, ...]
    data: Path
    data_bytes: int


class LayerFolder:
    """The folder. Only one push uses it at a time; raises ConflictError if another one does."""

    def __init__(
        self, folder: Path, *, bytes_max: int = FOLDER_BYTES_MAX, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder
        self._bytes_max = bytes_max
        self._sleep = sleep
        self._lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ConflictError(
                "another push of an image is under way here", where=str(folder), next_step="wait for it to end"
            ) from None
        self._drop_stale()

    def close(self) -> None:
        os.close(self._lock)

    def clear(self) -> None:
        """Removes all layers: the push has ended well."""
        for path in self._files():
            path.unlink(missing_ok=True)

    def obtain(
        self, source: ImageSource, layer: Layer, *, fetch: bool, skip_devices: bool, progress: Progress
    ) -> Unpacked:
        """The layer, unpacked. `fetch`: bring all of it here before that, and go on where an earlier push ended.

        Raises what the source raises, IntegrityError for other bytes than the layer's digests name,
        CorruptContentError naming the member that is refused, StorageFullError at the bound of the folder.
        """
        key = _key(layer, skip_devices=skip_devices)
        there = self._there(key)
        if there is not None:
            progress(max(layer.size, 0))
            return there
        with self._translated():
            if not fetch:
                with source.read_layer(layer, 0) as read:
                    return self._unpack(key, layer, _counted(read, progress), skip_devices=skip_devices)
            part = self._fetch(source, layer, key, progress)
            with part.open("rb") as stream:
                unpacked = self._unpack(key, layer, stream.read, skip_devices=skip_devices)
            part.unlink()
            return unpacked

    def _there(self, key: str) -> Unpacked | None:
        entries, data = self._folder / f"{key}.entries", self._folder / f"{key}.data"
        try:
            decoded = _ENTRIES.decode(entries.read_bytes())
            size = data.stat().st_size
        except (OSError, msgspec.DecodeError):
            return None
        if size != sum(entry.size for entry in decoded):
            return None
        return Unpacked(entries=decoded, data=data, data_bytes=size)

    def _fetch(self, source: ImageSource, layer: Layer, key: str, progress: Progress) -> Path:
        part = self._folder / f"{key}.part"
        with part.open("ab") as stream:
            have = stream.tell()
            if have > layer.size:
                stream.truncate(0)
                have = 0
            progress(have)
            idle = 0
            while have < layer.size:
                self._check_room(layer.size - have)
                before = have
                try:
                    with source.read_layer(layer, have) as read:
                        while have < layer.size and (data := read(min(1 << 20, layer.size - have))):
                            stream.write(data)
                            have += len(data)
                            progress(len(data))
                    failure: SnowdropError | None = None
                except SnowdropError as error:
                    if not error.retryable or isinstance(error, IntegrityError):
                        raise
                    failure = error
                stream.flush()
                idle = 0 if have > before else idle + 1
                if idle >= ATTEMPTS_MAX:
                    raise failure or _ended_early(layer, have)
                if have < layer.size:
                    waited = failure.retry_after_s if failure is not None else None
                    self._sleep(waited if waited is not None else PAUSE_S * 2**idle)
        self._check_part(part, layer)
        return part

    def _check_part(self, part: Path, layer: Layer) -> None:
        with part.open("rb") as stream:
            got = f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
        if got != layer.digest:
            part.unlink()  # going on from wrong bytes could never end well
            raise IntegrityError(
                f"a layer is not what its name says: {got[:26]}, not {layer.digest[:26]}",
                where=layer.digest,
                next_step="push again; if it stays so, the image is damaged there",
            )

    def _unpack(self, key: str, layer: Layer, read: Read, *, skip_devices: bool) -> Unpacked:
        where = layer.digest or layer.key
        stored = Digested(read)
        plain = Digested(plain_stream(stored.read, where=where, plain_bytes_max=LAYER_BYTES_MAX))
        data = self._folder / f"{key}.data"
        room = self._room()
        with data.open("wb") as stream:
            entries = tuple(
                read_entries(plain.read, stream.write, where=where, bytes_max=room, skip_devices=skip_devices)
            )
        plain.drain()
        stored.drain()
        stored.check(layer.digest, where=where, what="a layer")
        plain.check(layer.diff_id, where=where, what="what a layer unpacks to")
        temporary = self._folder / f"{key}.entries.new"
        temporary.write_bytes(msgspec.msgpack.encode(entries))
        temporary.replace(self._folder / f"{key}.entries")
        return Unpacked(entries=entries, data=data, data_bytes=data.stat().st_size)

    def _files(self) -> list[Path]:
        return [path for path in self._folder.iterdir() if path.name != "lock"]

    def _drop_stale(self) -> None:
        """What a push has left that nobody ran again."""
        for path in self._files():
            if path.stat().st_mtime < time.time() - STALE_S:
                path.unlink()

    def _room(self) -> int:
        return self._bytes_max - sum(path.stat().st_size for path in self._files())

    def _check_room(self, wanted: int) -> None:
        if wanted > self._room():
            raise _full(f"folder_bytes_max={self._bytes_max}", str(self._folder))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise _full("its disk is full", str(self._folder)) from error
            raise SnowdropError(f"a layer cannot be unpacked: {error}", where=str(self._folder)) from error


def read_entries(
    read: Read,
    write: Callable[[bytes], object],
    *,
    where: str,
    bytes_max: int,
    skip_devices: bool = False,
) -> Iterator[TreeEntry]:
    """The entries of a plain layer; contents go to `write` one after the other, an entry's offset says where.

    Raises CorruptContentError naming a member that is refused, StorageFullError above `bytes_max` of contents.
    """
    reader = TarReader(read, where=where)
    end = 0
    for count, member in enumerate(reader):
        if count >= ENTRIES_MAX:
            raise CorruptContentError(f"more than entries_max={ENTRIES_MAX} members", where=where)
        path = layer_path(member.path)
        if member.kind == "device":
            if skip_devices:
                continue
            raise CorruptContentError(
                "is a device",
                where=f"{where}: {ascii(path[:200])[2:-1]}",
                next_step="push with --skip-devices to leave devices out; sandboxes have their own",
            )
        if sum(len(name) + len(value) for name, value in member.xattrs) > XATTR_BYTES_MAX:
            raise reader.corrupt(f"xattrs above xattr_bytes_max={XATTR_BYTES_MAX}", member.path)
        sha256 = b""
        if member.kind == "file":
            if end + member.size > bytes_max:
                raise _full(f"the contents need more than {bytes_max} bytes", where)
            hasher = hashlib.sha256()
            for piece in reader.content():
                hasher.update(piece)
                write(piece)
            sha256 = hasher.digest()
        yield _entry(member, path, sha256, end)
        end += member.size if member.kind == "file" else 0


def _entry(member: Member, path: bytes, sha256: bytes, offset: int) -> TreeEntry:
    if member.kind == "hardlink":
        return TreeEntry(path, "hardlink", target=layer_path(member.link))
    assert member.kind != "device"
    is_file = member.kind == "file"
    return TreeEntry(
        path,
        member.kind,
        0o777 if member.kind == "symlink" else member.mode,
        member.uid,
        member.gid,
        member.mtime_ns,
        member.size if is_file else 0,
        offset if is_file and member.size else 0,
        sha256,
        member.link,
        member.xattrs,
    )


def _key(layer: Layer, *, skip_devices: bool) -> str:
    key = (layer.digest or layer.diff_id).removeprefix("sha256:")
    return f"{key}-{'skip' if skip_devices else 'all'}"


def _counted(read: Read, progress: Progress) -> Read:
    def counted(most: int) -> bytes:
        data = read(most)
        progress(len(data))
        return data

    return counted


def _ended_early(layer: Layer, have: int) -> IntegrityError:
    return IntegrityError(
        f"a layer ends after {have} of {layer.size} bytes", where=layer.digest, next_step="push again later"
    )


def _full(message: str, where: str) -> StorageFullError:
    return StorageFullError(
        f"no room for a layer: {message}", where=where, next_step="free space there, or push on a larger machine"
    )

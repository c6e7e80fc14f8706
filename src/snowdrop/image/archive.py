"""Images in files: OCI layouts (a directory, or a tar of one) and docker archives (`docker save`)."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import msgspec

from snowdrop.domain.errors import CorruptContentError, IntegrityError, InvalidInputError, NotFoundError
from snowdrop.image.oci import (
    DOCUMENT_BYTES_MAX,
    LAYERS_MAX,
    Blob,
    Platform,
    choose,
    is_index,
    parse_config,
    parse_document,
    parse_manifest,
)
from snowdrop.image.source import Layer, Read, SourceImage
from snowdrop.image.tar import TarReader

MEMBERS_MAX = 100_000
INDEX_DEPTH_MAX = 4
LAYOUT_FILE = "oci-layout"
_GZIP = b"\x1f\x8b"


class Files(Protocol):
    """Named files somewhere."""

    def has(self, path: str) -> bool: ...

    def open(self, path: str, offset: int) -> AbstractContextManager[Read]:
        """Raises NotFoundError if there is no such file."""


class DirectoryFiles:
    def __init__(self, root: Path) -> None:
        self._root = root

    def has(self, path: str) -> bool:
        return (self._root / path).is_file()

    @contextmanager
    def open(self, path: str, offset: int) -> Iterator[Read]:
        location = self._root / path
        with _opened(location) as fd:
            yield _reader(fd, offset, os.fstat(fd).st_size - offset)


class TarFiles:
    """The members of a tar, found once; links among them are followed."""

    def __init__(self, location: Path) -> None:
        self._location = location
        self._members: dict[str, tuple[int, int]] = {}
        links: dict[str, str] = {}
        with _opened(location) as fd, os.fdopen(os.dup(fd), "rb") as stream:
            if stream.read(2) == _GZIP:
                raise InvalidInputError(
                    "the archive as a whole is compressed", where=str(location), next_step="gunzip it first"
                )
            stream.seek(0)
            reader = TarReader(stream.read, where=str(location), skip=lambda count: _void(stream.seek(count, 1)))
            for count, member in enumerate(reader):
                if count >= MEMBERS_MAX:
                    raise CorruptContentError(f"more than members_max={MEMBERS_MAX}", where=str(location))
                path = _normal(os.fsdecode(member.path))
                if member.kind == "file":
                    self._members[path] = (reader.data_offset, member.size)
                elif member.kind == "hardlink":
                    links[path] = _normal(os.fsdecode(member.link))
                elif member.kind == "symlink":
                    links[path] = _normal(f"{path.rpartition('/')[0]}/{os.fsdecode(member.link)}")
        for path, target in links.items():
            if target in self._members:
                self._members[path] = self._members[target]

    def has(self, path: str) -> bool:
        return path in self._members

    @contextmanager
    def open(self, path: str, offset: int) -> Iterator[Read]:
        if path not in self._members:
            raise _missing(path, str(self._location))
        begin, size = self._members[path]
        with _opened(self._location) as fd:
            yield _reader(fd, begin + offset, size - offset)


class LayoutSource:
    """One image of an OCI layout; `wanted` is a tag or a digest, empty if there is only one."""

    def __init__(self, files: Files, *, name: str, wanted: str, platform: Platform) -> None:
        self.name = name
        self._files = files
        self._wanted = wanted
        self._platform = platform

    def image(self) -> SourceImage:
        where = f"{self.name}: index.json"
        document = parse_document(read_whole(self._files, "index.json", self.name), where=where)
        if not is_index(document):
            raise CorruptContentError("is no index of an OCI layout", where=where)
        chosen = choose(document, self._platform, where=where, name=self._wanted)
        for _ in range(INDEX_DEPTH_MAX):
            document = parse_document(self._blob(chosen), where=f"{self.name}: {chosen.digest}")
            if not is_index(document):
                return image_of(document, chosen, self._blob, where=f"{self.name}: {chosen.digest}")
            chosen = choose(document, self._platform, where=f"{self.name}: {chosen.digest}")
        raise CorruptContentError(f"indexes more than {INDEX_DEPTH_MAX} deep", where=where)

    def read_layer(self, layer: Layer, offset: int) -> AbstractContextManager[Read]:
        return self._files.open(layer.key, offset)

    def close(self) -> None:
        pass

    def _blob(self, blob: Blob) -> bytes:
        return checked(read_whole(self._files, blob_path(blob.digest), self.name), blob.digest, self.name)


class DockerArchiveSource:
    """One image of a docker archive. Its layers have no digests of their own: their plain bytes are compared."""

    def __init__(self, files: Files, *, name: str, wanted: str) -> None:
        self.name = name
        self._files = files
        self._wanted = wanted

    def image(self) -> SourceImage:
        where = f"{self.name}: manifest.json"
        try:
            listed = msgspec.json.decode(read_whole(self._files, "manifest.json", self.name), type=list[_Saved])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise CorruptContentError(f"is no manifest of a docker archive: {error}", where=where) from error
        saved = self._chosen(listed, where)
        data = read_whole(self._files, _normal(saved.config), self.name)
        config = parse_config(data, where=f"{self.name}: {saved.config}")
        if len(config.diff_ids) != len(saved.layers) or len(saved.layers) > LAYERS_MAX:
            raise CorruptContentError(
                f"{len(saved.layers)} layers, {len(config.diff_ids)} in the config", where=where
            )
        layers = tuple(
            Layer(key=_normal(path), digest="", size=-1, diff_id=diff_id)
            for path, diff_id in zip(saved.layers, config.diff_ids, strict=True)
        )
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        return SourceImage(config=config.config, layers=layers, digest=digest)

    def read_layer(self, layer: Layer, offset: int) -> AbstractContextManager[Read]:
        return self._files.open(layer.key, offset)

    def close(self) -> None:
        pass

    def _chosen(self, listed: list[_Saved], where: str) -> _Saved:
        tags = [tag for saved in listed for tag in saved.tags or ()]
        fitting = [
            saved
            for saved in listed
            if not self._wanted
            or any(tag == self._wanted or tag.endswith(f":{self._wanted}") for tag in saved.tags or ())
        ]
        if len(fitting) != 1:
            raise (InvalidInputError if fitting else NotFoundError)(
                f"{len(fitting)} images there fit {self._wanted or 'no name'}",
                where=where,
                next_step=f"name one (SOURCE:TAG): {', '.join(tags[:20]) or 'it has no tags'}",
            )
        return fitting[0]


class _Saved(msgspec.Struct, frozen=True):
    config: str = msgspec.field(name="Config")
    layers: tuple[str, ...] = msgspec.field(name="Layers")
    tags: tuple[str, ...] | None = msgspec.field(name="RepoTags", default=None)


def image_of(document: dict[str, Any], chosen: Blob, blob: Callable[[Blob], bytes], *, where: str) -> SourceImage:
    """The image of an OCI manifest, with its config fetched by `blob`."""
    manifest = parse_manifest(document, where=where)
    config = parse_config(blob(manifest.config), where=f"{where}: config")
    if len(config.diff_ids) != len(manifest.layers):
        raise CorruptContentError(
            f"{len(manifest.layers)} layers, {len(config.diff_ids)} in the config", where=where
        )
    layers = tuple(
        Layer(key=blob_path(layer.digest), digest=layer.digest, size=layer.size, diff_id=diff_id)
        for layer, diff_id in zip(manifest.layers, config.diff_ids, strict=True)
    )
    return SourceImage(config=config.config, layers=layers, digest=chosen.digest)


def blob_path(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"


def read_whole(files: Files, path: str, name: str) -> bytes:
    """A document; raises CorruptContentError if it is too large to be one."""
    if not files.has(path):
        raise _missing(path, name)
    parts: list[bytes] = []
    with files.open(path, 0) as read:
        size = 0
        while data := read(1 << 20):
            parts.append(data)
            size += len(data)
            if size > DOCUMENT_BYTES_MAX:
                raise CorruptContentError(
                    f"above document_bytes_max={DOCUMENT_BYTES_MAX}", where=f"{name}: {path}"
                )
    return b"".join(parts)


def checked(data: bytes, digest: str, where: str) -> bytes:
    """`data` if its digest is `digest`; raises IntegrityError otherwise."""
    got = f"sha256:{hashlib.sha256(data).hexdigest()}"
    if got != digest:
        raise IntegrityError(
            f"a document is not what its name says: {got[:26]}, not {digest[:26]}",
            where=f"{where}: {digest}",
            next_step="push again; if it stays so, the image is damaged there",
        )
    return data


def _void(_: object) -> None:
    """Of calls whose result is of no interest."""


def _normal(path: str) -> str:
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in {"", "."}:
            parts.append(part)
    return "/".join(parts)


@contextmanager
def _opened(location: Path) -> Iterator[int]:
    try:
        fd = os.open(location, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise _missing(location.name, str(location.parent)) from None
    except OSError as error:
        raise InvalidInputError(f"cannot be read: {error.strerror}", where=str(location)) from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InvalidInputError("is no regular file", where=str(location))
        yield fd
    finally:
        os.close(fd)


def _reader(fd: int, offset: int, left: int) -> Read:
    position = [offset, max(left, 0)]

    def read(most: int) -> bytes:
        data = os.pread(fd, min(most, position[1]), position[0])
        position[0] += len(data)
        position[1] -= len(data)
        return data

    return read


def _missing(path: str, name: str) -> NotFoundError:
    return NotFoundError(f"{path} is not there", where=name, next_step="check the path, or make the archive anew")

"""Push: a directory becomes chunks, packs and a manifest at the origin.

Write ordering: a manifest is put only after every pack that it names is durable at the origin, so whoever finds
a manifest finds all of it. A push that ends early leaves packs that nothing names, which a later push of the
same tree finds and re-uses, and no manifest. Weights are validated before anything is written.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec
from blake3 import blake3

from snowdrop.content import safetensors
from snowdrop.content.cut import Piece, cut_fixed, cut_safetensors, is_tensor_file
from snowdrop.content.layout import PUBLIC_DOMAIN, manifest_key, pack_key
from snowdrop.content.manifest import encode_manifest, manifest_digest
from snowdrop.content.origin import Origin
from snowdrop.content.scan import IGNORED_IN_CODE, IGNORED_IN_MODELS, SourceFile, scan_directory
from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.ids import TenantId
from snowdrop.domain.manifest import (
    FORMAT_VERSION,
    PACK_BYTES_MAX,
    ArtefactRef,
    ChunkRef,
    Extent,
    FileEntry,
    Manifest,
    PackRef,
    TensorEntry,
    TreeKind,
)

CODE_BYTES_MAX = 256 << 20
CODE_FILES_MAX = 10_000
SPLIT_BYTES_MIN = 8 << 20
"""A weights file of at least this size starts a new pack: an unchanged shard is then an unchanged pack."""


class PushProgress(msgspec.Struct, frozen=True, kw_only=True):
    """Where a push is: bytes hashed so far, of how many, and the file in hand."""

    path: str
    done_bytes: int
    total_bytes: int


class PushResult(msgspec.Struct, frozen=True, kw_only=True):
    """`new_bytes` went to the origin; `reused_bytes` were there already, in packs or twice in the tree."""

    artefact: ArtefactRef
    new_bytes: int
    reused_bytes: int
    pack_count: int
    chunk_count: int


def _silent(_: PushProgress) -> None:
    pass


def push_directory(
    source: Path,
    origin: Origin,
    *,
    kind: TreeKind,
    tenant: TenantId,
    progress: Callable[[PushProgress], None] = _silent,
) -> PushResult:
    """Pushes a model directory. The same tree always gives the same manifest digest.

    Raises InvalidInputError naming the path (unreadable, escaping link, changed while being read, empty
    directory), CorruptContentError for broken weights, StorageFullError or UnavailableError from the origin.
    """
    files = scan_directory(source, ignored=IGNORED_IN_MODELS)
    return _push(source, files, origin, kind=kind, tenant=tenant, progress=progress)


def push_code(
    source: Path,
    origin: Origin,
    *,
    tenant: TenantId,
    progress: Callable[[PushProgress], None] = _silent,
) -> PushResult:
    """Pushes a service's code folder, leaving out IGNORED_IN_CODE and what its .snowdropignore names.

    Raises as `push_directory`, and InvalidInputError beyond CODE_BYTES_MAX or CODE_FILES_MAX.
    """
    files = scan_directory(source, ignored=IGNORED_IN_CODE, files_max=CODE_FILES_MAX)
    total = sum(file.size for file in files)
    if total > CODE_BYTES_MAX:
        largest = max(files, key=lambda file: file.size)
        raise InvalidInputError(
            f"the code folder has {total} bytes; its largest file is {largest.path}",
            where=f"{source}: code_bytes_max={CODE_BYTES_MAX}",
            next_step="push weights with `snowdrop model push`, leave the rest out with a .snowdropignore",
        )
    return _push(source, files, origin, kind="code", tenant=tenant, progress=progress)


def _push(
    source: Path,
    files: list[SourceFile],
    origin: Origin,
    *,
    kind: TreeKind,
    tenant: TenantId,
    progress: Callable[[PushProgress], None],
) -> PushResult:
    if not files:
        raise InvalidInputError(
            "there is nothing to push", where=str(source), next_step="name a directory with files"
        )
    headers = {file.path: _header_of(file) for file in files if is_tensor_file(file.path)}
    total = sum(file.size for file in files)
    packer = _Packer(origin, PUBLIC_DOMAIN)
    entries: list[FileEntry] = []
    done = 0
    for file in files:
        header = headers.get(file.path)
        pieces = cut_safetensors(header) if header is not None else cut_fixed(0, file.size)
        if header is not None and file.size >= SPLIT_BYTES_MIN:
            packer.flush()
        sha256 = hashlib.sha256()
        extents: list[Extent] = []
        for piece, data in _read_pieces(file, pieces):
            sha256.update(data)
            extents.append(Extent(piece.offset, piece.length, packer.add(data), 0))
            done += piece.length
            progress(PushProgress(path=file.path, done_bytes=done, total_bytes=total))
        tensors = header.tensors if header is not None else ()
        entries.append(_entry(file, sha256.hexdigest(), extents, tensors))
    packer.flush()
    manifest = Manifest(
        version=FORMAT_VERSION,
        kind=kind,
        key_domain=PUBLIC_DOMAIN,
        files=tuple(entries),
        chunks=tuple(packer.chunks),
        packs=tuple(packer.packs),
    )
    encoded = encode_manifest(manifest)
    digest = manifest_digest(encoded)
    if not origin.exists(manifest_key(PUBLIC_DOMAIN, digest)):
        origin.put(manifest_key(PUBLIC_DOMAIN, digest), encoded)
    return PushResult(
        artefact=ArtefactRef(manifest=digest, kind=kind, total_bytes=total, file_count=len(entries)),
        new_bytes=packer.new_bytes,
        reused_bytes=total - packer.new_bytes,
        pack_count=len(packer.packs),
        chunk_count=len(packer.chunks),
    )


def _entry(file: SourceFile, sha256: str, extents: list[Extent], tensors: tuple[TensorEntry, ...]) -> FileEntry:
    return FileEntry(
        path=file.path, size=file.size, mode=file.mode, sha256=sha256, extents=tuple(extents), tensors=tensors
    )


def _open(file: SourceFile) -> int:
    try:
        # O_NONBLOCK: a fifo put in the file's place must not hang the push.
        fd = os.open(file.location, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise InvalidInputError(
            f"{file.path} cannot be read: {error.strerror}", where=file.path, next_step="make it readable"
        ) from error
    return fd


def _changed(file: SourceFile) -> InvalidInputError:
    return InvalidInputError(
        f"{file.path} changed while it was being read",
        where=file.path,
        next_step="push again when nothing writes to it",
    )


def _header_of(file: SourceFile) -> safetensors.Header:
    fd = _open(file)
    try:
        return safetensors.read_header(
            lambda offset, length: os.pread(fd, length, offset), file.size, where=file.path
        )
    finally:
        os.close(fd)


def _read_pieces(file: SourceFile, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, bytes]]:
    fd = _open(file)
    try:
        for piece in pieces:
            data = os.pread(fd, piece.length, piece.offset)
            if len(data) != piece.length:
                raise _changed(file)
            yield piece, data
        status = os.fstat(fd)
        if (status.st_size, status.st_mtime_ns) != (file.size, file.changed_ns):
            raise _changed(file)
    except OSError as error:
        raise InvalidInputError(f"{file.path} cannot be read: {error.strerror}", where=file.path) from error
    finally:
        os.close(fd)


class _Packer:
    """Lays chunks into packs in the order they come, each distinct chunk once."""

    def __init__(self, origin: Origin, domain: str) -> None:
        self.chunks: list[ChunkRef] = []
        self.packs: list[PackRef] = []
        self.new_bytes = 0
        self._origin = origin
        self._domain = domain
        self._index: dict[str, int] = {}
        self._pack = bytearray()

    def add(self, data: bytes) -> int:
        """The index of the chunk `data`, which is laid into the current pack if it is new."""
        digest = blake3(data).hexdigest()
        known = self._index.get(digest)
        if known is not None:
            return known
        if len(self._pack) + len(data) > PACK_BYTES_MAX:
            self.flush()
        self._index[digest] = index = len(self.chunks)
        self.chunks.append(ChunkRef(digest, len(data), len(self.packs), len(self._pack), len(data)))
        self._pack += data
        return index

    def flush(self) -> None:
        """Puts the current pack, unless the origin has it already, and begins the next."""
        if not self._pack:
            return
        digest = blake3(self._pack).hexdigest()
        key = pack_key(self._domain, digest)
        if not self._origin.exists(key):
            with memoryview(self._pack) as view:
                self._origin.put(key, view)
            self.new_bytes += len(self._pack)
        self.packs.append(PackRef(digest, len(self._pack)))
        self._pack = bytearray()

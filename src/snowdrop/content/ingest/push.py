"""Push: the files of a source become chunks, packs and a manifest at the origin.

Write ordering: a manifest is put only after every pack that it names is durable at the origin, so whoever finds
a manifest finds all of it. A push that ends early leaves packs that nothing names, which a later push of the
same tree finds and re-uses, and no manifest. Weights are validated before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec

from snowdrop.content import safetensors
from snowdrop.content.cut import is_tensor_file
from snowdrop.content.ingest.directory import DirectorySource
from snowdrop.content.ingest.index import IngestIndex
from snowdrop.content.ingest.learn import learn, same_tree
from snowdrop.content.ingest.packs import PUTS_MAX, Packer, stored_as
from snowdrop.content.ingest.read import Compress, SpanReader
from snowdrop.content.ingest.source import Source, SourceFile
from snowdrop.content.ingest.walk import Walk
from snowdrop.content.keys import PUBLIC_HASHER, Hasher
from snowdrop.content.layout import manifest_key
from snowdrop.content.manifest import encode_manifest, manifest_digest
from snowdrop.content.origin import Origin
from snowdrop.content.scan import IGNORED_IN_CODE, IGNORED_IN_MODELS
from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.ids import Digest, TenantId
from snowdrop.domain.manifest import FORMAT_VERSION, ArtefactRef, Manifest, TreeKind

CODE_BYTES_MAX = 256 << 20
CODE_FILES_MAX = 10_000
READ_THREADS = 8
SPANS_AHEAD_MAX = 12
"""Spans that are read, hashed and compressed ahead; with the packs under way, memory stays below 500 MiB."""
_PEEK_BYTES = 256 << 10
"""Of a weights file, read at once for its header: most are shorter, and a remote source is asked once."""


class PushOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a tree is stored. `hasher` is of the key domain: public, or a tenant's for private content.

    `reread` reads every file, also those that an earlier push knows under the same version. `repair` reads back
    what is re-used at the origin, and puts anew what is wrong there.
    """

    kind: TreeKind = "model"
    hasher: Hasher = PUBLIC_HASHER
    compress: Compress = "none"
    reread: bool = False
    repair: bool = False


class PushProgress(msgspec.Struct, frozen=True, kw_only=True):
    """Where a push is: bytes done so far, of how many, and the file in hand."""

    path: str
    done_bytes: int
    total_bytes: int


class PushResult(msgspec.Struct, frozen=True, kw_only=True):
    """`new_bytes` went to the origin; `reused_bytes` were there already, in packs or twice in the tree.

    `read_bytes` were read from the source; the rest was known from an earlier push of the same files.
    """

    artefact: ArtefactRef
    new_bytes: int
    reused_bytes: int
    read_bytes: int
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
    """Pushes a model directory, remembering nothing. The same tree always gives the same manifest digest.

    Raises InvalidInputError naming the path (unreadable, escaping link, changed while being read, empty
    directory), CorruptContentError for broken weights, StorageFullError or UnavailableError from the origin.
    """
    files = DirectorySource(source, ignored=IGNORED_IN_MODELS)
    return push_source(files, origin, PushOptions(kind=kind), progress=progress)


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
    files = DirectorySource(source, ignored=IGNORED_IN_CODE, files_max=CODE_FILES_MAX)
    listed = files.files()
    total = sum(file.size for file in listed)
    if total > CODE_BYTES_MAX:
        largest = max(listed, key=lambda file: file.size)
        raise InvalidInputError(
            f"the code folder has {total} bytes; its largest file is {largest.path}",
            where=f"{source}: code_bytes_max={CODE_BYTES_MAX}",
            next_step="push weights with `snowdrop model push`, leave the rest out with a .snowdropignore",
        )
    return push_source(files, origin, PushOptions(kind="code", repair=True), progress=progress)


def push_source(
    source: Source,
    origin: Origin,
    options: PushOptions,
    *,
    index: IngestIndex | None = None,
    progress: Callable[[PushProgress], None] = _silent,
) -> PushResult:
    """Pushes what `source` has, and closes it.

    With `index` (of this origin and key domain) chunks that the origin has in other artefacts are re-used, what an
    earlier push made durable is not read again, and a push of a tree that is there already changes nothing.
    The origin must be one under a lease, so that what is found there stays until the manifest is put.
    Raises what the source and the origin raise, CorruptContentError for broken weights, IntegrityError for a file
    that is not what the source says it is.
    """
    try:
        files = source.files()
        if not files:
            raise InvalidInputError(
                "there is nothing to push", where=source.name, next_step="name a source that has files"
            )
        with (
            ThreadPoolExecutor(READ_THREADS, "read") as readers,
            ThreadPoolExecutor(PUTS_MAX, "put") as writers,
        ):
            try:
                return _Push(source, origin, options, index, progress, readers, writers).run(files)
            finally:
                # Before the threads are waited for: one of them may be waiting for a hub's rate limit.
                source.close()
                for threads in (readers, writers):
                    threads.shutdown(wait=False, cancel_futures=True)
    finally:
        source.close()


@dataclass(frozen=True)
class _Push:
    source: Source
    origin: Origin
    options: PushOptions
    index: IngestIndex | None
    progress: Callable[[PushProgress], None]
    readers: ThreadPoolExecutor
    writers: ThreadPoolExecutor

    def run(self, files: Sequence[SourceFile]) -> PushResult:
        hasher, index = self.options.hasher, self.index
        walk = Walk(self.source, files, self._headers(files), reread=self.options.reread)
        if index is not None:
            learn(index, self.origin, hasher, self.readers)
        packer = Packer(
            self.origin,
            hasher,
            self.writers,
            index=index,
            source=self.source.identity,
            durable=walk.unreported,
            repair=self.options.repair,
        )
        reader = SpanReader(
            self.source,
            hasher,
            self.readers,
            spans_ahead_max=SPANS_AHEAD_MAX,
            compress=self.options.compress,
            is_known=lambda digest: index is not None and index.find(digest) is not None,
        )
        total = sum(file.size for file in files)
        for path in walk.run(reader, packer, index):
            self.progress(PushProgress(path=path, done_bytes=walk.done_bytes, total_bytes=total))
        chunks, packs = packer.finish()
        manifest = Manifest(
            version=FORMAT_VERSION,
            kind=self.options.kind,
            key_domain=hasher.domain,
            files=tuple(walk.entries),
            chunks=chunks,
            packs=packs,
        )
        digest, manifest = _publish(self.origin, manifest, hasher, index, packer)
        return PushResult(
            artefact=artefact_ref(digest, manifest),
            new_bytes=packer.new_bytes,
            reused_bytes=total - packer.new_plain_bytes,
            read_bytes=walk.read_bytes,
            pack_count=len(manifest.packs),
            chunk_count=len(manifest.chunks),
        )

    def _headers(self, files: Sequence[SourceFile]) -> dict[str, safetensors.Header]:
        """Of every weights file, before anything is written."""
        weights = [file for file in files if is_tensor_file(file.path)]
        headers = self.readers.map(lambda file: _header_of(self.source, file), weights)
        return dict(zip((file.path for file in weights), headers, strict=True))


def artefact_ref(digest: Digest, manifest: Manifest) -> ArtefactRef:
    return ArtefactRef(
        manifest=digest,
        kind=manifest.kind,
        total_bytes=manifest.total_bytes,
        file_count=len(manifest.files),
        key_domain=manifest.key_domain,
    )


def _publish(
    origin: Origin, manifest: Manifest, hasher: Hasher, index: IngestIndex | None, packer: Packer
) -> tuple[Digest, Manifest]:
    """Puts the manifest, unless this tree has one already."""
    if index is not None:
        there = same_tree(index, origin, hasher, manifest.kind, manifest.files, has_pack=packer.has_pack)
        if there is not None:
            return there
    encoded = encode_manifest(manifest)
    digest = manifest_digest(encoded, hasher)
    key = manifest_key(hasher.domain, digest)
    if not stored_as(origin, key, encoded, check_bytes=True):
        origin.put(key, encoded)
        if index is not None:
            index.forget_manifests([digest])  # a damaged one taught nothing: the next push learns from this one
    return digest, manifest


def _header_of(source: Source, file: SourceFile) -> safetensors.Header:
    head = memoryview(bytearray(min(file.size, _PEEK_BYTES)))
    if head:
        source.read(file, 0, head)

    def read(offset: int, length: int) -> bytes:
        if offset + length <= len(head):
            return bytes(head[offset : offset + length])
        rest = memoryview(bytearray(length))
        source.read(file, offset, rest)
        return bytes(rest)

    return safetensors.read_header(read, file.size, where=file.path)

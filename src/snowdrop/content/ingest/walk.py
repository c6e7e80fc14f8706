"""Going through the files of a push in load order: what is read, hashed into which file, laid into packs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from snowdrop.content.cut import Piece, cut_at, cut_fixed, cut_safetensors
from snowdrop.content.ingest.index import IngestIndex, Progress
from snowdrop.content.ingest.packs import FileProgress, Packer
from snowdrop.content.ingest.read import Cut, Span, SpanReader, spans_of
from snowdrop.content.ingest.sha import Sha256, fresh_sha256, resumed_sha256
from snowdrop.content.ingest.source import Source, SourceFile
from snowdrop.content.safetensors import Header
from snowdrop.domain.errors import IntegrityError
from snowdrop.domain.manifest import Extent, FileEntry

SPLIT_BYTES_MIN = 8 << 20
"""A file of at least this size starts a new pack: an unchanged shard is then an unchanged pack."""


@dataclass
class _File:
    """A file on its way; `known` of it was durable before this push began."""

    file: SourceFile
    header: Header | None
    sha256: Sha256
    sha1: hashlib._Hash | None
    known: Progress | None = None
    done_bytes: int = 0
    digest: str = ""
    extents: list[Extent] = field(default_factory=list)
    unreported: list[tuple[int, int, str]] = field(default_factory=list)

    @classmethod
    def begin(cls, file: SourceFile, header: Header | None) -> _File:
        # Git's id of a blob; SHA-1 is what it is made of, and nothing is trusted for it alone.
        sha1 = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False) if file.git_blob else None
        return cls(file, header, fresh_sha256(), sha1)

    def pieces(self) -> Iterator[Piece]:
        if self.file.cuts:
            return cut_at(self.file.cuts, self.file.size)
        return cut_safetensors(self.header) if self.header is not None else cut_fixed(0, self.file.size)

    def pass_piece(self, piece: Piece, digest: str, chunk: int) -> None:
        self.extents.append(Extent(piece.offset, piece.length, chunk, 0))
        self.unreported.append((piece.offset, piece.length, digest))
        self.done_bytes += piece.length


class Walk:
    """One walk through `files`. `entries` are the files that are done, `done_bytes` counts all that was passed."""

    def __init__(
        self, source: Source, files: Sequence[SourceFile], headers: Mapping[str, Header], *, reread: bool
    ) -> None:
        self.entries: list[FileEntry] = []
        self.done_bytes = 0
        self.read_bytes = 0
        self._source = source
        self._reread = reread
        self._files = [(file, headers.get(file.path)) for file in files]
        self._begun: dict[str, _File] = {}
        self._unreported: list[_File] = []

    def run(self, reader: SpanReader, packer: Packer, index: IngestIndex | None) -> Iterator[str]:
        """Carries everything to `packer`; gives the path in hand after each step."""
        for span, cuts in reader.read(self._spans(packer, index)):
            state = self._begun[span.file.path]
            if span.pieces:
                self._take(state, span, cuts, packer)
            else:
                self._enter(state, packer)
            if state.done_bytes == state.file.size:
                self._leave(state)
            yield span.file.path

    def unreported(self) -> tuple[FileProgress, ...]:
        """How far the files are that moved since this was asked the last time."""
        moved, self._unreported = self._unreported, []
        report = []
        for state in moved:
            sha_state = None if state.digest else state.sha256.state()
            progress = Progress(state.done_bytes, sha_state, state.digest, tuple(state.unreported))
            report.append((state.file.path, state.file.version, progress))
            state.unreported = []
            if not state.digest:
                self._unreported.append(state)
        return tuple(report)

    def _spans(self, packer: Packer, index: IngestIndex | None) -> Iterator[Span]:
        for file, header in self._files:
            state = self._begun[file.path] = _File.begin(file, header)
            state.known = self._known(state, packer, index) if index is not None and not self._reread else None
            durable = state.known.durable_bytes if state.known is not None else 0
            yield from spans_of(file, (piece for piece in state.pieces() if piece.offset >= durable))

    def _known(self, state: _File, packer: Packer, index: IngestIndex) -> Progress | None:
        """What need not be read again: durable under this version, cut as now, and still at the origin."""
        file = state.file
        progress = index.progress(self._source.identity, file.path, file.version)
        if progress is None:
            return None
        if progress.sha256:
            if progress.durable_bytes != file.size or file.sha256 not in {"", progress.sha256}:
                return None
        elif file.git_blob or resumed_sha256(progress.state) is None:
            return None
        cut_now = [
            (piece.offset, piece.length) for piece in state.pieces() if piece.offset < progress.durable_bytes
        ]
        if [piece[:2] for piece in progress.pieces] != cut_now:
            return None
        if sum(length for _, length in cut_now) != progress.durable_bytes:
            return None
        if any(packer.place(digest, length) is None for _, length, digest in progress.pieces):
            return None
        return progress

    def _enter(self, state: _File, packer: Packer) -> None:
        if state.file.size >= SPLIT_BYTES_MIN:
            packer.flush()
        self._unreported.append(state)
        known = state.known
        if known is None:
            return
        for offset, length, digest in known.pieces:
            chunk = packer.known(digest, length)
            assert chunk is not None
            state.pass_piece(Piece(offset, length), digest, chunk)
        self.done_bytes += known.durable_bytes
        state.digest = known.sha256
        state.sha256 = resumed_sha256(known.state) or state.sha256

    def _take(self, state: _File, span: Span, cuts: list[Cut], packer: Packer) -> None:
        for cut in cuts:
            chunk = packer.known(cut.digest, cut.piece.length)
            if chunk is None:
                chunk = packer.add(cut.digest, cut.piece.length, cut.codec, cut.stored)
            # Only now: what the packer remembered meanwhile must not claim this piece.
            state.sha256.update(cut.plain)
            if state.sha1 is not None:
                state.sha1.update(cut.plain)
            state.pass_piece(cut.piece, cut.digest, chunk)
        self.done_bytes += span.length
        self.read_bytes += span.length

    def _leave(self, state: _File) -> None:
        """The whole file has been passed: is it what was listed, and what its source says it is?"""
        file = state.file
        if not state.digest:
            digest = state.sha256.hexdigest()
            if file.sha256 not in {"", digest}:
                raise _other_content(self._source.name, file.path, "SHA-256", file.sha256, digest)
            if state.sha1 is not None and state.sha1.hexdigest() != file.git_blob:
                raise _other_content(
                    self._source.name, file.path, "Git blob", file.git_blob, state.sha1.hexdigest()
                )
            self._source.settle(file)
            state.digest = digest
        self.entries.append(
            FileEntry(
                path=file.path,
                size=file.size,
                mode=file.mode,
                sha256=state.digest,
                extents=tuple(state.extents),
                tensors=state.header.tensors if state.header is not None else (),
            )
        )
        del self._begun[file.path]


def _other_content(source: str, path: str, kind: str, wanted: str, got: str) -> IntegrityError:
    return IntegrityError(
        f"{path} is not what its source says: {kind} is {got[:16]}, not {wanted[:16]}",
        where=f"{source}: {path}",
        next_step="push again; if it stays so, the source is damaged",
    )

"""What this machine knows of the origin's chunks, and how far its own pushes have come: a SQLite file.

Everything in it is a cache. Chunks are learned from the origin's manifests and from packs that this machine put;
before a chunk is re-used its pack is looked for at the origin. A file's progress names the bytes that are durable
at the origin, under the file's version. A damaged index is thrown away and begun anew.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from snowdrop.domain.errors import UnavailableError
from snowdrop.domain.ids import Digest
from snowdrop.domain.manifest import Codec

BUSY_S_MAX = 60.0
PROGRESS_AGE_S_MAX = 30 * 86_400.0
"""Files that no push has touched for so long are forgotten."""
_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE places (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE chunks (place INTEGER NOT NULL, digest BLOB NOT NULL, plain_bytes INTEGER NOT NULL,
  pack BLOB NOT NULL, pack_offset INTEGER NOT NULL, stored_bytes INTEGER NOT NULL, codec TEXT NOT NULL,
  PRIMARY KEY (place, digest)) WITHOUT ROWID;
CREATE INDEX chunks_by_pack ON chunks (place, pack);
CREATE TABLE packs (place INTEGER NOT NULL, digest BLOB NOT NULL, bytes INTEGER NOT NULL,
  PRIMARY KEY (place, digest)) WITHOUT ROWID;
CREATE TABLE manifests (place INTEGER NOT NULL, digest TEXT NOT NULL, tree BLOB,
  PRIMARY KEY (place, digest)) WITHOUT ROWID;
CREATE INDEX manifests_by_tree ON manifests (place, tree);
CREATE TABLE files (id INTEGER PRIMARY KEY, place INTEGER NOT NULL, source TEXT NOT NULL, path TEXT NOT NULL,
  version TEXT NOT NULL, durable_bytes INTEGER NOT NULL, state BLOB, sha256 TEXT NOT NULL, touched_s REAL NOT NULL,
  UNIQUE (place, source, path));
CREATE TABLE pieces (file INTEGER NOT NULL REFERENCES files (id) ON DELETE CASCADE, file_offset INTEGER NOT NULL,
  length INTEGER NOT NULL, digest BLOB NOT NULL, PRIMARY KEY (file, file_offset)) WITHOUT ROWID;
"""


class Place(NamedTuple):
    """Where a chunk lies at the origin."""

    plain_bytes: int
    pack: str
    pack_offset: int
    stored_bytes: int
    codec: Codec


class Known(NamedTuple):
    """A chunk with its place, to be remembered."""

    digest: str
    place: Place


class Progress(NamedTuple):
    """How much of a file is durable at the origin. `sha256` is empty until the whole file is."""

    durable_bytes: int
    state: bytes | None
    sha256: str
    pieces: tuple[tuple[int, int, str], ...]
    """(offset, length, chunk digest) of the durable bytes, or in `commit` of those that are new."""


class IngestIndex:
    """One origin's part of the file, in one key domain. May be used by several threads and several processes."""

    def __init__(self, path: Path, origin_url: str, domain: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = threading.Lock()
        self._path = path
        self._db = _open(path)
        with self._writing() as db:
            name = f"{domain} {origin_url}"
            db.execute("INSERT OR IGNORE INTO places (name) VALUES (?)", (name,))
            (self._place,) = db.execute("SELECT id FROM places WHERE name = ?", (name,)).fetchone()

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def find(self, digest: str) -> Place | None:
        """Where the chunk lies, as far as is known."""
        query = (
            "SELECT plain_bytes, pack, pack_offset, stored_bytes, codec FROM chunks WHERE place = ? AND digest = ?"
        )
        with self._reading() as db:
            row = db.execute(query, (self._place, bytes.fromhex(digest))).fetchone()
        return None if row is None else Place(row[0], row[1].hex(), row[2], row[3], row[4])

    def pack_bytes(self, pack: str) -> int | None:
        with self._reading() as db:
            row = db.execute(
                "SELECT bytes FROM packs WHERE place = ? AND digest = ?", (self._place, bytes.fromhex(pack))
            ).fetchone()
        return None if row is None else int(row[0])

    def forget_pack(self, pack: str) -> None:
        """The origin no longer has it: nor the chunks in it."""
        with self._writing() as db:
            for table, column in (("chunks", "pack"), ("packs", "digest")):
                db.execute(
                    f"DELETE FROM {table} WHERE place = ? AND {column} = ?",  # noqa: S608 (constants)
                    (self._place, bytes.fromhex(pack)),
                )

    def manifests(self) -> set[str]:
        """Digests of the manifests that were learned from, or that nothing can be learned from."""
        with self._reading() as db:
            rows = db.execute("SELECT digest FROM manifests WHERE place = ?", (self._place,)).fetchall()
        return {digest for (digest,) in rows}

    def forget_manifests(self, digests: Iterable[str]) -> None:
        with self._writing() as db:
            db.executemany(
                "DELETE FROM manifests WHERE place = ? AND digest = ?",
                [(self._place, digest) for digest in digests],
            )

    def learn(
        self, manifest: Digest, tree: bytes | None, chunks: Iterable[Known], packs: Iterable[tuple[str, int]]
    ) -> None:
        """Remembers a manifest at the origin. The first place of a chunk that was learned stays."""
        with self._writing() as db:
            self._add(db, chunks, packs)
            db.execute("INSERT OR REPLACE INTO manifests VALUES (?, ?, ?)", (self._place, manifest, tree))

    def trees(self, tree: bytes) -> list[Digest]:
        """Manifests of this very tree, in a fixed order."""
        query = "SELECT digest FROM manifests WHERE place = ? AND tree = ? ORDER BY digest"
        with self._reading() as db:
            return [Digest(digest) for (digest,) in db.execute(query, (self._place, tree)).fetchall()]

    def progress(self, source: str, path: str, version: str) -> Progress | None:
        """What is durable of a file in this version."""
        query = (
            "SELECT id, durable_bytes, state, sha256 FROM files"
            " WHERE place = ? AND source = ? AND path = ? AND version = ?"
        )
        with self._reading() as db:
            row = db.execute(query, (self._place, source, path, version)).fetchone()
            if row is None:
                return None
            pieces = db.execute(
                "SELECT file_offset, length, digest FROM pieces WHERE file = ? AND file_offset < ?"
                " ORDER BY file_offset",
                (row[0], row[1]),
            ).fetchall()
        return Progress(row[1], row[2], row[3], tuple((offset, size, raw.hex()) for offset, size, raw in pieces))

    def commit(
        self,
        source: str,
        files: Sequence[tuple[str, str, Progress]],
        chunks: Iterable[Known],
        packs: Iterable[tuple[str, int]],
    ) -> None:
        """Remembers packs that are durable, and with them how far the files (path, version, progress) are."""
        with self._writing() as db:
            self._add(db, chunks, packs)
            for path, version, progress in files:
                file = self._file(db, source, path, version, progress)
                db.executemany(
                    "INSERT OR REPLACE INTO pieces VALUES (?, ?, ?, ?)",
                    [(file, offset, size, bytes.fromhex(digest)) for offset, size, digest in progress.pieces],
                )

    def _file(self, db: sqlite3.Connection, source: str, path: str, version: str, progress: Progress) -> int:
        place = (self._place, source, path)
        db.execute(
            "DELETE FROM files WHERE place = ? AND source = ? AND path = ? AND version <> ?", (*place, version)
        )
        db.execute(
            "INSERT INTO files (place, source, path, version, durable_bytes, state, sha256, touched_s)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET durable_bytes = excluded.durable_bytes,"
            " state = excluded.state, sha256 = excluded.sha256, touched_s = excluded.touched_s",
            (*place, version, progress.durable_bytes, progress.state, progress.sha256, time.time()),
        )
        (row,) = db.execute("SELECT id FROM files WHERE place = ? AND source = ? AND path = ?", place).fetchone()
        return int(row)

    def _add(self, db: sqlite3.Connection, chunks: Iterable[Known], packs: Iterable[tuple[str, int]]) -> None:
        db.executemany(
            "INSERT OR IGNORE INTO packs VALUES (?, ?, ?)",
            [(self._place, bytes.fromhex(digest), size) for digest, size in packs],
        )
        db.executemany(
            "INSERT OR IGNORE INTO chunks VALUES (?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    self._place,
                    bytes.fromhex(digest),
                    place.plain_bytes,
                    bytes.fromhex(place.pack),
                    *place[2:],
                )
                for digest, place in chunks
            ],
        )

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._translated():
            yield self._db

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._translated(), _transaction(self._db):
            yield self._db

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise UnavailableError(
                f"the push index cannot be used: {error}",
                where=str(self._path),
                next_step="free space on its disk; if it goes on, delete the file: it is only a cache",
            ) from error


def _open(path: Path) -> sqlite3.Connection:
    """The database, made anew if it is damaged or of another version."""
    try:
        return _connect(path)
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            raise UnavailableError(
                f"the push index cannot be opened: {error}", where=str(path), next_step="check its disk, try again"
            ) from error
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        try:
            return _connect(path)
        except sqlite3.Error as error:
            raise UnavailableError(
                f"the push index cannot be opened: {error}", where=str(path), next_step="check the state folder"
            ) from error


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=BUSY_S_MAX, isolation_level=None, check_same_thread=False)
    try:
        _prepare(db)
        return db
    except BaseException:
        db.close()
        raise


def _prepare(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute("PRAGMA foreign_keys = ON")
    with _transaction(db):
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            for statement in _SCHEMA.split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
        elif version != _SCHEMA_VERSION:
            raise sqlite3.DatabaseError(f"schema version {version}")
        db.execute("DELETE FROM files WHERE touched_s < ?", (time.time() - PROGRESS_AGE_S_MAX,))


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")

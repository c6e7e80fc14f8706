"""An origin in an object store: `obstore` puts, lists, asks and deletes; our own reader brings the bytes.

`obstore` cannot read into memory that somebody gives it. It reads only where the fast way does not work: a store
that cannot sign URLs, a server whose answers have a form that the reader does not take.
"""

from __future__ import annotations

import random
import re
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime

import obstore
from obstore.exceptions import BaseError, NotSupportedError, PermissionDeniedError, UnauthenticatedError
from obstore.store import HTTPStore

from snowdrop.content.origin.connection import client_context
from snowdrop.content.origin.exchange import UnusableError
from snowdrop.content.origin.port import OBJECT_BYTES_MAX, ObjectInfo, cut_short, missing, place
from snowdrop.content.origin.ranges import RangeReader, ReadLimits
from snowdrop.content.origin.recent import ReadCounts
from snowdrop.content.origin.steer import Steer
from snowdrop.content.origin.stores import one_line, open_store
from snowdrop.content.origin.urls import PlainUrls, SignedUrls
from snowdrop.content.paths import parse_tree_path
from snowdrop.domain.errors import (
    IntegrityError,
    InvalidInputError,
    NotFoundError,
    OriginRefusedError,
    SnowdropError,
    StorageFullError,
    UnavailableError,
)
from snowdrop.domain.origin import OriginOptions

_STATUS = re.compile(r"status code: (\d{3})")
_FULL = re.compile(
    r"<Code>(QuotaExceeded|XMinioStorageFull|InsufficientStorage|InsufficientCapacity)</Code>|\b507\b"
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
LIST_PAGE = 1_000


class ObjectStoreOrigin:
    """Objects below a prefix of a bucket, or below an HTTP URL. An object is put whole and in one request."""

    def __init__(
        self,
        url: str,
        options: OriginOptions,
        *,
        steer: Steer | None = None,
        limits: ReadLimits | None = None,
        pause: Callable[[float], None] = time.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self._url = url.rstrip("/")
        context = _context(options)
        opened = open_store(url, options)
        self._opened = opened
        self._store = opened.store
        urls = SignedUrls(opened) if opened.signs else PlainUrls(opened, self._url)
        self._reader = RangeReader(urls, self._url, context, limits=limits, steer=steer, pause=pause, rng=rng)

    @property
    def counts(self) -> ReadCounts:
        """What the reader did so far."""
        return self._reader.counts

    def put(self, key: str, data: bytes | memoryview) -> None:
        key = parse_tree_path(key, error=InvalidInputError)
        if len(data) > OBJECT_BYTES_MAX:
            raise InvalidInputError(
                f"an object of {len(data)} bytes (object_bytes_max={OBJECT_BYTES_MAX})",
                where=place(self._url, key),
            )
        try:
            # One request: a put that ends early leaves no parts behind.
            obstore.put(self._store, key, data or bytes(data), use_multipart=False)
        except FileNotFoundError as error:
            raise NotFoundError(
                "there is no such bucket or folder at the origin", where=self._url, next_step="create it first"
            ) from error
        except (BaseError, ValueError) as error:
            raise self._translated(error, key, "put") from error

    def exists(self, key: str) -> bool:
        try:
            self.size(key)
        except NotFoundError:
            return False
        return True

    def size(self, key: str) -> int:
        key = parse_tree_path(key, error=InvalidInputError)
        # Who asks for a size reads the object next: over the reader's connection that is one way less.
        with suppress(UnusableError, IntegrityError, OriginRefusedError):
            total = self._reader.total_bytes(key)
            if total >= 0:
                return total
        return self._size_by_head(key)

    def _size_by_head(self, key: str) -> int:
        try:
            return int(obstore.head(self._store, key)["size"])
        except FileNotFoundError as error:
            raise missing(key, self._url) from error
        except (BaseError, ValueError) as error:
            raise self._translated(error, key, "ask for") from error

    def read_start(self, key: str, into: memoryview) -> int:
        key = parse_tree_path(key, error=InvalidInputError)
        with suppress(UnusableError, IntegrityError, OriginRefusedError):
            total = self._reader.read_start(key, into)
            if total >= 0:
                return total
        size = self.size(key)
        self.read_range(key, 0, into[:size])
        return size

    def read_range(self, key: str, offset: int, into: memoryview) -> None:
        key = parse_tree_path(key, error=InvalidInputError)
        if not into:
            return
        try:
            self._reader.read(key, offset, into)
        except UnusableError as error:
            if not self._opened.signs:
                raise OriginRefusedError(
                    f"the origin's answers cannot be read: {error}",
                    where=place(self._url, key),
                    next_step="use a server that answers ranges uncompressed and with their length",
                ) from error
            self._read_through_copy(key, offset, into)
        except OriginRefusedError as error:
            # Some servers refuse a range that goes beyond the end instead of giving what there is.
            held = self._size_if_told(key)
            if held is not None and held < offset + len(into):
                raise cut_short(key, len(into), max(held - offset, 0), self._url) from error
            raise

    def list(self, prefix: str) -> Iterator[str]:
        return (entry.key for entry in self.entries(prefix))

    def entries(self, prefix: str) -> Iterator[ObjectInfo]:
        # Stores list by whole path components; the rest of the prefix is compared here.
        folder = prefix.rpartition("/")[0]
        try:
            for page in obstore.list(self._store, folder or None, chunk_size=LIST_PAGE):
                for entry in page:
                    if entry["path"].startswith(prefix):
                        age = entry["last_modified"] - _EPOCH
                        unix_ns = (age.days * 86_400 + age.seconds) * 10**9 + age.microseconds * 1_000
                        yield ObjectInfo(entry["path"], int(entry["size"]), unix_ns)
        except FileNotFoundError:
            return
        except (BaseError, ValueError) as error:
            if isinstance(self._store, HTTPStore) and "status code: 404" in str(error):
                return  # WebDAV says so of a folder that is not there
            raise self._translated(error, prefix, "list") from error

    def delete(self, key: str) -> None:
        key = parse_tree_path(key, error=InvalidInputError)
        try:
            obstore.delete(self._store, key)
        except FileNotFoundError:
            return
        except (BaseError, ValueError) as error:
            raise self._translated(error, key, "delete") from error

    def sweep(self, before_unix_ns: int, *, dry_run: bool = False) -> tuple[int, int]:
        del before_unix_ns, dry_run
        return 0, 0

    def close(self) -> None:
        self._reader.close()

    def _size_if_told(self, key: str) -> int | None:
        try:
            return self._size_by_head(key)
        except SnowdropError:
            return None

    def _read_through_copy(self, key: str, offset: int, into: memoryview) -> None:
        try:
            data = obstore.get_range(self._store, key, start=offset, length=len(into))
        except FileNotFoundError as error:
            raise missing(key, self._url) from error
        except (BaseError, ValueError) as error:
            if "416" in str(error):
                raise cut_short(key, len(into), 0, self._url) from error
            raise self._translated(error, key, "read") from error
        if len(data) != len(into):
            raise cut_short(key, len(into), len(data), self._url)
        into[:] = memoryview(data)

    def _translated(self, error: Exception, key: str, verb: str) -> SnowdropError:
        where = place(self._url, key)
        text = str(error)
        found = _STATUS.search(text)
        status = int(found[1]) if found else 0
        if status == 507 or _FULL.search(text):
            return StorageFullError(
                "the origin is full", where=self._url, next_step="free space there or move the origin"
            )
        if isinstance(error, PermissionDeniedError | UnauthenticatedError) or status in {401, 403}:
            return OriginRefusedError(
                f"the origin does not let this node {verb} this object (it answered {status})",
                where=where,
                next_step="check the credentials and what they may do",
            )
        if isinstance(error, NotSupportedError) or status in {405, 501}:
            return OriginRefusedError(
                f"this origin cannot {verb}",
                where=where,
                next_step="use an object store or a WebDAV server for that",
            )
        if "NoSuchBucket" in text or (verb == "list" and status == 404):
            return NotFoundError(
                "there is no such bucket at the origin", where=self._url, next_step="create it first"
            )
        return UnavailableError(
            f"the origin did not {verb} this object: {one_line(error)}",
            where=where,
            next_step="check that the origin runs and that this node reaches it",
        )


def _context(options: OriginOptions) -> ssl.SSLContext:
    try:
        return client_context(options.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise InvalidInputError(
            f"{options.ca_file} cannot be used: {error.strerror or error}",
            where="content.origin_ca_file",
            next_step="name a PEM file of certificates",
        ) from error

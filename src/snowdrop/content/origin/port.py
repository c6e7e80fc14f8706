"""The origin: the region's object store, where packs and manifests are.

Objects are at most 64 MiB by the format, so they are put whole. Calls block and are made from threads; whoever
cancels a load does so between two ranges.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from snowdrop.domain.errors import IntegrityError, NotFoundError

OBJECT_BYTES_MAX = 64 << 20
"""Largest object that is put: a pack."""


class ObjectInfo(NamedTuple):
    """One object as a listing shows it. `modified_unix_ns` changes whenever the object is put again."""

    key: str
    bytes: int
    modified_unix_ns: int


class Origin(Protocol):
    """Keys are tree paths. Every method may be called from several threads at once.

    Missing objects raise NotFoundError, refused credentials UnauthorisedError, a full store StorageFullError,
    anything else that may pass UnavailableError or TimedOutError. Each names the origin and the object.
    """

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Stores an object, durable when this returns; a reader sees all of it or nothing."""

    def exists(self, key: str) -> bool: ...

    def size(self, key: str) -> int:
        """The object's length in bytes."""

    def read_start(self, key: str, into: memoryview) -> int:
        """Fills the front of `into` with the object from its beginning, as far as there is of both; its length.

        More reads of this origin follow at once: what has to be opened for them may be.
        """

    def read_range(self, key: str, offset: int, into: memoryview) -> None:
        """Fills `into` in place with the bytes from `offset`; verifies nothing.

        Raises IntegrityError if the object ends before; then, and after any other error, `into` may hold anything.
        """

    def list(self, prefix: str) -> Iterator[str]:
        """Keys that begin with `prefix`, in no particular order."""

    def entries(self, prefix: str) -> Iterator[ObjectInfo]:
        """What `list` gives, with sizes and times of the last put. Unfinished puts are not in it."""

    def delete(self, key: str) -> None:
        """Removes an object; does nothing if there is none."""

    def sweep(self, before_unix_ns: int, *, dry_run: bool = False) -> tuple[int, int]:
        """Removes what puts that ended early before that time have left; (count, bytes) of it."""

    def close(self) -> None:
        """Gives back descriptors and connections. May be repeated; the origin can be used again after it."""


def missing(key: str, origin: str = "") -> NotFoundError:
    """For an object that is not there."""
    return NotFoundError(
        "the origin has no such object", where=place(origin, key), next_step="push the artefact again"
    )


def cut_short(key: str, wanted: int, got: int, origin: str = "") -> IntegrityError:
    """For an object that ends before the range that was wanted."""
    return IntegrityError(
        f"object has {got} of the {wanted} bytes wanted from it",
        where=place(origin, key),
        next_step="push the artefact again",
    )


def place(origin: str, key: str) -> str:
    """An object as errors name it: the origin's URL, never with credentials, and the key."""
    return f"{origin.rstrip('/')}/{key}" if origin else key

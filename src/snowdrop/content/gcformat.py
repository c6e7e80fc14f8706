"""What pushes and collection tell each other at the origin: leases, condemned records, intents, roots.

leases/<id>            a push is under way: nothing that it may use may go
gc/condemned/<id>      objects that nothing names, and since when; written once, never changed
gc/deleting/<id>       an intent: these objects are being deleted until the given time
gc/roots/<platform>    manifests that a platform's state names without a ref (code, earlier revisions)

All are JSON. docs/explanation/collection.md has the protocol and why it is safe.
"""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from snowdrop.content.origin import Origin
from snowdrop.domain.errors import CorruptContentError, NotFoundError
from snowdrop.domain.ids import Digest

LEASES = "leases/"
CONDEMNED = "gc/condemned/"
DELETING = "gc/deleting/"
ROOTS = "gc/roots/"
_VERSION = 1
RECORD_BYTES_MAX = 64 << 20

LEASE_S = 600.0
"""How long a lease is good for after its last renewal."""
CLOCK_SKEW_S_MAX = 300.0
"""How far the clocks of two machines may be apart: leases and intents of others are believed that much longer."""
INTENT_S = 900.0
"""How long after its intent a collection may still delete. It takes stock of the whole origin within this time."""

_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,80}")
T = TypeVar("T", bound="Record")


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Fields that a later version adds are ignored; another `version` makes the record unreadable."""

    version: int = _VERSION


class Lease(Record, frozen=True, kw_only=True):
    """`knows` are the condemned records that the push has read, so that it re-uses nothing they name.

    `revived` are condemned objects that it puts anew.
    """

    id: str
    purpose: str
    started_unix_ns: int
    expires_unix_ns: int
    knows: tuple[str, ...] = ()
    revived: tuple[str, ...] = ()


class CondemnedRecord(Record, frozen=True, kw_only=True):
    """Keys, each with the time since when nothing has named it."""

    id: str
    since_unix_ns: dict[str, int]


class Intent(Record, frozen=True, kw_only=True):
    id: str
    expires_unix_ns: int
    keys: tuple[str, ...]


class Root(msgspec.Struct, frozen=True, array_like=True):
    """A manifest and the domain that it lies in."""

    key_domain: str
    manifest: Digest


class PlatformRoots(Record, frozen=True, kw_only=True):
    """What one platform's state names. `seen_unix_ns` is when it last said so."""

    platform: str
    seen_unix_ns: int
    roots: tuple[Root, ...]


def record_key(prefix: str, record_id: str) -> str:
    return prefix + record_id


def write_record(origin: Origin, key: str, record: Record) -> None:
    origin.put(key, msgspec.json.encode(record))


def read_record(origin: Origin, key: str, kind: type[T]) -> T | None:
    """None if it is gone. Raises CorruptContentError for one that this version does not understand."""
    try:
        size = origin.size(key)
        if size > RECORD_BYTES_MAX:
            raise _unreadable(key, f"{size} bytes (record_bytes_max={RECORD_BYTES_MAX})")
        data = bytearray(size)
        if size:
            origin.read_range(key, 0, memoryview(data))
    except NotFoundError:
        return None
    try:
        record = msgspec.json.decode(bytes(data), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _unreadable(key, str(error)) from error
    if record.version != _VERSION:
        raise _unreadable(key, f"version {record.version}")
    return record


def list_records(origin: Origin, prefix: str) -> list[str]:
    """Keys below `prefix` that have the form of a record's."""
    return sorted(key for key in origin.list(prefix) if _ID.fullmatch(key.removeprefix(prefix)))


def _unreadable(key: str, problem: str) -> CorruptContentError:
    return CorruptContentError(
        f"a record at the origin is not understood: {problem}"[:500],
        where=key,
        next_step="update Snowdrop here; if nothing newer writes to this origin, remove that object",
    )

"""The push's side of collection: a lease, and an origin on which nothing can vanish under it.

A push takes a lease first, then reads which objects are condemned (garbage that collection may delete), and says
in the lease that it has. From then on it sees the origin through `LeasedOrigin`, which does not show condemned
objects: they are packed and put anew. Putting one of them is the only dangerous case, because a collection may be
deleting that very key: the push first says in its lease that it revives the key, then waits until no collection
that might not have read this is at it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from snowdrop.content.gcformat import (
    CLOCK_SKEW_S_MAX,
    CONDEMNED,
    DELETING,
    INTENT_S,
    LEASE_S,
    LEASES,
    CondemnedRecord,
    Intent,
    Lease,
    list_records,
    read_record,
    record_key,
    write_record,
)
from snowdrop.content.origin import ObjectInfo, Origin
from snowdrop.domain.errors import CorruptContentError, NotFoundError, SnowdropError, UnavailableError
from snowdrop.domain.ids import fresh_id

RENEW_S = LEASE_S / 5
REVIVE_POLL_S = 0.5
REVIVE_S_MAX = INTENT_S + 2 * CLOCK_SKEW_S_MAX
STOP_S_MAX = 30.0
SECOND_NS = 1_000_000_000

log = logging.getLogger("snowdrop.content")


class Clock:
    """Time as leases need it; tests bring their own."""

    def now_unix_ns(self) -> int:
        return time.time_ns()

    def sleep(self, duration_s: float) -> None:
        time.sleep(duration_s)


class PushLease:
    """One push's claim. Made by `push_lease`; `origin` is what the push must use for everything."""

    def __init__(self, origin: Origin, purpose: str, clock: Clock) -> None:
        self._base = origin
        self._clock = clock
        self._lock = threading.Lock()
        now = clock.now_unix_ns()
        self._lease = Lease(
            id=fresh_id("lease"), purpose=purpose[:200], started_unix_ns=now, expires_unix_ns=_after(now, LEASE_S)
        )
        self._hidden: set[str] = set()
        self.origin = LeasedOrigin(origin, self)

    @property
    def id(self) -> str:
        return self._lease.id

    def take(self) -> None:
        """Puts the lease, then learns what is condemned. The order matters: see `content.collect`."""
        self._write()
        hidden, knows = set[str](), list[str]()
        # Intents before records: what is being deleted is in both, and a record may be replaced meanwhile.
        for intent in _active_intents(self._base, self._clock):
            hidden.update(intent.keys)
        for key in list_records(self._base, CONDEMNED):
            # A record that cannot be read is not known: collection then spares what it names, for this push.
            with suppress(CorruptContentError):
                record = read_record(self._base, key, CondemnedRecord)
                if record is not None:
                    hidden.update(record.since_unix_ns)
                    knows.append(record.id)
        with self._lock:
            self._hidden = hidden
        self._write(knows=tuple(knows))

    def renew(self) -> None:
        self._write()

    def check(self) -> None:
        """Raises UnavailableError once the lease has run out: what was re-used may have been collected."""
        with self._lock:
            expired = self._clock.now_unix_ns() >= self._lease.expires_unix_ns
        if expired:
            raise UnavailableError(
                "the lease of this push ran out, so what it re-uses may be gone",
                where=f"lease_s={LEASE_S:g}",
                next_step="push again: what has been stored is found and used",
            )

    def release(self) -> None:
        self._base.delete(record_key(LEASES, self.id))

    def hides(self, key: str) -> bool:
        """Whether `key` is condemned, and so counts as absent for this push."""
        with self._lock:
            return key in self._hidden

    def before_put(self, key: str) -> None:
        """Makes it safe to put a condemned key."""
        if not self.hides(key):
            return
        self._write(revive=key)
        limit_ns = _after(self._clock.now_unix_ns(), REVIVE_S_MAX)
        while any(key in intent.keys for intent in _active_intents(self._base, self._clock)):
            if self._clock.now_unix_ns() >= limit_ns:
                raise UnavailableError(
                    "collection is deleting an object that this push needs",
                    where=key,
                    next_step="push again when `snowdrop store gc` has ended",
                )
            self._clock.sleep(REVIVE_POLL_S)

    def after_put(self, key: str) -> None:
        with self._lock:
            self._hidden.discard(key)

    def _write(self, *, knows: tuple[str, ...] | None = None, revive: str | None = None) -> None:
        with self._lock:
            lease = self._lease
            self._lease = Lease(
                id=lease.id,
                purpose=lease.purpose,
                started_unix_ns=lease.started_unix_ns,
                expires_unix_ns=_after(self._clock.now_unix_ns(), LEASE_S),
                knows=lease.knows if knows is None else knows,
                revived=lease.revived if revive is None else (*lease.revived, revive),
            )
            try:
                write_record(self._base, record_key(LEASES, lease.id), self._lease)
            except BaseException:
                self._lease = lease  # what was not written does not count
                raise


class LeasedOrigin:
    """An origin without its condemned objects. Everything else goes straight through."""

    def __init__(self, origin: Origin, lease: PushLease) -> None:
        self._origin = origin
        self._lease = lease

    def put(self, key: str, data: bytes | memoryview) -> None:
        self._lease.before_put(key)
        self._origin.put(key, data)
        self._lease.after_put(key)

    def exists(self, key: str) -> bool:
        return not self._lease.hides(key) and self._origin.exists(key)

    def size(self, key: str) -> int:
        self._refuse_hidden(key)
        return self._origin.size(key)

    def read_start(self, key: str, into: memoryview) -> int:
        self._refuse_hidden(key)
        return self._origin.read_start(key, into)

    def read_range(self, key: str, offset: int, into: memoryview) -> None:
        self._refuse_hidden(key)
        self._origin.read_range(key, offset, into)

    def list(self, prefix: str) -> Iterator[str]:
        return (key for key in self._origin.list(prefix) if not self._lease.hides(key))

    def entries(self, prefix: str) -> Iterator[ObjectInfo]:
        return (entry for entry in self._origin.entries(prefix) if not self._lease.hides(entry.key))

    def delete(self, key: str) -> None:
        self._origin.delete(key)

    def sweep(self, before_unix_ns: int, *, dry_run: bool = False) -> tuple[int, int]:
        return self._origin.sweep(before_unix_ns, dry_run=dry_run)

    def close(self) -> None:
        self._origin.close()

    def _refuse_hidden(self, key: str) -> None:
        if self._lease.hides(key):
            raise NotFoundError("the object is about to be collected", where=key, next_step="put it again")


@contextmanager
def push_lease(
    origin: Origin, *, purpose: str, clock: Clock | None = None, renew_s: float = RENEW_S
) -> Iterator[PushLease]:
    """Holds a lease for the block, renewed by a thread of its own. Raises what the origin raises if it cannot."""
    lease = PushLease(origin, purpose, clock or Clock())
    ended = threading.Event()
    renewer = threading.Thread(
        target=_keep_renewing, args=(lease, ended, renew_s), name=f"renew {lease.id}", daemon=True
    )
    try:
        lease.take()
        renewer.start()
        yield lease
    finally:
        ended.set()
        if renewer.ident is not None:
            renewer.join(STOP_S_MAX)
        _release(lease)


def _release(lease: PushLease) -> None:
    try:
        lease.release()
    except SnowdropError as error:
        # It runs out by itself; the error of the push, if there is one, is the one to be told.
        log.warning("the lease %s could not be given back and runs out by itself: %s", lease.id, error)


def _keep_renewing(lease: PushLease, ended: threading.Event, renew_s: float) -> None:
    while not ended.wait(renew_s):
        try:
            lease.renew()
        except SnowdropError as error:
            # Tried again; if it stays so, `check` ends the push before it names anything.
            log.warning("the lease %s could not be renewed: %s", lease.id, error)


def check_lease(origin: Origin, lease_id: str, *, now_unix_ns: int) -> None:
    """For who is told of a push: raises UnavailableError if its lease is not at the origin or has run out."""
    lease = read_record(origin, record_key(LEASES, lease_id), Lease)
    if lease is None or now_unix_ns >= lease.expires_unix_ns:
        raise UnavailableError(
            "the push holds no lease any more, so what it re-uses may have been collected",
            where=f"lease {lease_id}",
            next_step="push again: what has been stored is found and used",
        )


def _active_intents(origin: Origin, clock: Clock) -> list[Intent]:
    """Intents that a collection may still act on. One that cannot be read counts until it is gone."""
    now = clock.now_unix_ns()
    found = (read_record(origin, key, Intent) for key in list_records(origin, DELETING))
    return [
        intent for intent in found if intent is not None and now < _after(intent.expires_unix_ns, CLOCK_SKEW_S_MAX)
    ]


def _after(then_unix_ns: int, duration_s: float) -> int:
    return then_unix_ns + int(duration_s * SECOND_NS)

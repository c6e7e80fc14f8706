"""Collection at the origin: what nothing names is condemned, and after a grace period deleted.

One run: take stock, record what is condemned, then for each batch of what can go: say so (an intent), take stock
again, delete what can still go, take the intent back. Runs may overlap, be killed anywhere, and be repeated, and
pushes may go on all the time. `policy.collection` decides; docs/explanation/collection.md has the protocol.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from snowdrop.content.gcformat import (
    CLOCK_SKEW_S_MAX,
    CONDEMNED,
    DELETING,
    INTENT_S,
    ROOTS,
    CondemnedRecord,
    Intent,
    read_record,
    record_key,
    write_record,
)
from snowdrop.content.leases import SECOND_NS, Clock
from snowdrop.content.observe import SAMPLE_MAX, Observation, Observer
from snowdrop.content.origin import Origin
from snowdrop.domain.errors import CorruptContentError, StorageFullError
from snowdrop.domain.ids import fresh_id
from snowdrop.policy.collection import CollectionInput, CollectionPlan, Mark, StoredObject, plan

BATCH_MAX = 1_000
"""Objects named by one intent: so many are deleted well within INTENT_S."""
DELETERS = 8
TEMPORARY_S_MIN = 3_600.0
"""Unfinished puts younger than this are left alone whatever the grace period: they may be under way."""


class CollectionProgress(msgspec.Struct, frozen=True, kw_only=True):
    """What a run is at, and how many objects of how many it has deleted."""

    step: str
    done: int
    total: int


class CollectionReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a run did, or with `dry_run` would do. `notes` name what was not understood and therefore kept."""

    dry_run: bool
    deleted_objects: int
    deleted_bytes: int
    condemned_objects: int
    condemned_bytes: int
    in_use_bytes: int
    leased_objects: int
    pushes: tuple[str, ...]
    temporary_objects: int
    temporary_bytes: int
    strangers: tuple[str, ...]
    stranger_count: int
    notes: tuple[str, ...]
    reason: str


def _silent(_: CollectionProgress) -> None:
    pass


class Collector:
    """Runs over one origin. `deleters=1` deletes in the calling thread."""

    def __init__(
        self,
        origin: Origin,
        observer: Observer,
        *,
        grace_s: float,
        clock: Clock | None = None,
        deleters: int = DELETERS,
        progress: Callable[[CollectionProgress], None] = _silent,
    ) -> None:
        self._origin = origin
        self._observer = observer
        self._grace_s = grace_s
        self._grace_ns = int(grace_s * SECOND_NS)
        self._clock = clock or Clock()
        self._deleters = deleters
        self._progress = progress

    def run(self, *, dry_run: bool = False) -> CollectionReport:
        """Raises what the origin raises; what had been deleted by then was garbage, and a later run goes on."""
        self._say("taking stock", 0, 0)
        observed = self._observe()
        decided = self._plan(observed.seen)
        before_ns = self._clock.now_unix_ns() - max(self._grace_ns, int(TEMPORARY_S_MIN * SECOND_NS))
        if dry_run:
            # Under a grace period of zero, what is condemned now would go in the same run.
            decided = self._plan(_condemned(observed.seen, decided, self._clock.now_unix_ns()))
            temporary = self._origin.sweep(before_ns, dry_run=True)
            return self._report(observed, decided, list(decided.delete), temporary, dry_run=True)
        try:
            temporary = self._origin.sweep(before_ns)
            self._clear(observed)
            record = self._write_condemned(observed, decided)
            marked = _condemned(observed.seen, decided, self._clock.now_unix_ns(), record)
            decided = self._plan(marked)
            deleted = self._delete_all(list(decided.delete))
            for replaced in observed.records:
                # Only now: pushes know what stands in these, and must be taken at their word.
                if replaced.id != record:
                    self._origin.delete(record_key(CONDEMNED, replaced.id))
        except StorageFullError as error:
            raise StorageFullError(
                "the origin is full, so that collection cannot write down what it is about to delete",
                where=error.where,
                next_step="make a little room there (some KiB are enough), then run `snowdrop store gc` again",
            ) from error
        return self._report(observed, decided, deleted, temporary, dry_run=False)

    def _observe(self) -> Observation:
        return self._observer.observe(now_unix_ns=self._clock.now_unix_ns())

    def _plan(self, seen: CollectionInput) -> CollectionPlan:
        return plan(seen, now_unix_ns=self._clock.now_unix_ns(), grace_ns=self._grace_ns)

    def _clear(self, observed: Observation) -> None:
        """Removes leases that have run out, intents that nobody acts on or believes any more, and hints for images
        that are gone."""
        for key in (*observed.dead_leases, *observed.stale_traces):
            self._origin.delete(key)
        for key in observed.intents:
            try:
                intent = read_record(self._origin, key, Intent)
            except CorruptContentError:
                continue  # of a newer version, which removes it by itself
            margin_ns = int(2 * CLOCK_SKEW_S_MAX * SECOND_NS)
            if intent is not None and self._clock.now_unix_ns() >= intent.expires_unix_ns + margin_ns:
                self._origin.delete(key)

    def _write_condemned(self, observed: Observation, decided: CollectionPlan) -> str:
        """Records all that is condemned; returns the record's id."""
        old = observed.records
        if len(old) == 1 and old[0].since_unix_ns == decided.condemned:
            return old[0].id  # nothing new: pushes that know it need not be asked to know another
        record = CondemnedRecord(id=fresh_id("condemned"), since_unix_ns=decided.condemned)
        if decided.condemned:
            write_record(self._origin, record_key(CONDEMNED, record.id), record)
        return record.id

    def _delete_all(self, doomed: list[StoredObject]) -> list[StoredObject]:
        """In batches, each under an intent of its own. What was deleted."""
        deleted: list[StoredObject] = []
        for first in range(0, len(doomed), BATCH_MAX):
            batch = doomed[first : first + BATCH_MAX]
            self._say("deleting", len(deleted), len(doomed))
            expires = self._clock.now_unix_ns() + int(INTENT_S * SECOND_NS)
            intent = Intent(
                id=fresh_id("delete"), expires_unix_ns=expires, keys=tuple(stored.key for stored in batch)
            )
            key = record_key(DELETING, intent.id)
            write_record(self._origin, key, intent)
            try:
                # Only now: a push that is not seen by this has seen the intent.
                again = self._observe()
                deleted += self._delete_batch(again, self._plan(again.seen), {o.key for o in batch}, expires)
            finally:
                self._origin.delete(key)
        return deleted

    def _delete_batch(
        self, observed: Observation, decided: CollectionPlan, batch: set[str], expires_unix_ns: int
    ) -> list[StoredObject]:
        doomed = [stored for stored in decided.delete if stored.key in batch]
        manifests = self._delete([stored for stored in doomed if stored.is_manifest], expires_unix_ns)
        gone = {stored.key for stored in manifests}
        staying = {
            pack
            for stored in observed.seen.objects
            if stored.is_manifest and stored.key not in gone
            for pack in observed.seen.packs_of.get(stored.key, ())
        }
        packs = [stored for stored in doomed if not stored.is_manifest and stored.key not in staying]
        return manifests + self._delete(packs, expires_unix_ns)

    def _delete(self, doomed: list[StoredObject], expires_unix_ns: int) -> list[StoredObject]:
        """Those that are gone for sure. The first error ends it, after those under way."""

        def delete_one(stored: StoredObject) -> StoredObject | None:
            if self._clock.now_unix_ns() >= expires_unix_ns:
                return None  # pushes no longer believe in the intent: a later run goes on
            self._origin.delete(stored.key)
            return stored

        if self._deleters == 1:
            found = [delete_one(stored) for stored in doomed]
        else:
            with ThreadPoolExecutor(self._deleters, thread_name_prefix="collect") as pool:
                found = list(pool.map(delete_one, doomed))
        return [stored for stored in found if stored is not None]

    def _say(self, step: str, done: int, total: int) -> None:
        self._progress(CollectionProgress(step=step, done=done, total=total))

    def _report(
        self,
        observed: Observation,
        decided: CollectionPlan,
        deleted: list[StoredObject],
        temporary: tuple[int, int],
        *,
        dry_run: bool,
    ) -> CollectionReport:
        gone = {stored.key for stored in deleted}
        left = [
            stored
            for stored in observed.seen.objects
            if stored.key in decided.condemned and stored.key not in gone
        ]
        return CollectionReport(
            dry_run=dry_run,
            deleted_objects=len(deleted),
            deleted_bytes=sum(stored.size_bytes for stored in deleted),
            condemned_objects=len(left),
            condemned_bytes=sum(stored.size_bytes for stored in left),
            in_use_bytes=decided.bytes_by_verdict.get("in-use", 0),
            leased_objects=sum(1 for verdict in decided.verdicts.values() if verdict == "leased"),
            pushes=tuple(f"{lease.id}: {lease.purpose}" for lease in observed.leases),
            temporary_objects=temporary[0],
            temporary_bytes=temporary[1],
            strangers=observed.strangers[:SAMPLE_MAX],
            stranger_count=len(observed.strangers),
            notes=observed.notes + tuple(f"{d}: {why}" for d, why in sorted(observed.seen.closed_domains.items())),
            reason=decided.reason,
        )


def _condemned(
    seen: CollectionInput, decided: CollectionPlan, now_unix_ns: int, record: str = "this run"
) -> CollectionInput:
    """`seen` as it is once what was decided to be condemned stands in `record`."""
    marks = {
        key: (*seen.marks.get(key, ()), Mark(record=record, since_unix_ns=min(since, now_unix_ns)))
        for key, since in decided.condemned.items()
    }
    return msgspec.structs.replace(seen, marks=marks)


def forget_platform(origin: Origin, platform: str) -> None:
    """Takes away what a platform that is gone for ever has said it names."""
    origin.delete(record_key(ROOTS, platform))

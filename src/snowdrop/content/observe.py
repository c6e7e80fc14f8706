"""Taking stock of an origin: every object, what names it, and what cannot be understood.

The order of reads matters (docs/explanation/collection.md): active pushes first, then what is named, so that a
push which has ended meanwhile is seen by what it named.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import msgspec

from snowdrop.content.gcformat import (
    CLOCK_SKEW_S_MAX,
    CONDEMNED,
    DELETING,
    LEASES,
    ROOTS,
    CondemnedRecord,
    Lease,
    PlatformRoots,
    Root,
    read_record,
)
from snowdrop.content.keys import Keyring
from snowdrop.content.layout import manifest_key, pack_key
from snowdrop.content.manifest import decode_manifest
from snowdrop.content.origin import ObjectInfo, Origin
from snowdrop.content.refs import decode_ref, fetch_ref
from snowdrop.domain.errors import CorruptContentError, IntegrityError, NotFoundError
from snowdrop.domain.ids import Digest
from snowdrop.domain.manifest import MANIFEST_BYTES_MAX
from snowdrop.policy.collection import ActivePush, CollectionInput, Mark, StoredObject

READERS = 8
SECOND_NS = 1_000_000_000
SAMPLE_MAX = 20
"""Of what is not understood, so many are named."""

_CONTENT = re.compile(r"([a-z0-9][a-z0-9-]{0,62})/(packs|manifests)/([0-9a-f]{2})/([0-9a-f]{64})")
_TRACE = re.compile(r"([a-z0-9][a-z0-9-]{0,62})/traces/[a-z0-9-]+/([0-9a-f]{2})/([0-9a-f]{64})/[0-9a-f]{32}")
_REF = re.compile(r"([a-z0-9][a-z0-9-]{0,62})/refs/[a-z0-9-]+/[a-z0-9-]+")


class Artefact(msgspec.Struct, frozen=True, kw_only=True):
    """A manifest at the origin. `packs` are keys; `problem` says why it could not be read."""

    key: str
    domain: str
    kind: str
    plain_bytes: int
    packs: tuple[str, ...]
    problem: str = ""
    is_damaged: bool = False


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """Everything at an origin. `seen` is what the decision is made from."""

    seen: CollectionInput
    artefacts: dict[str, Artefact]
    refs: dict[str, str]
    """Ref keys, each with the key of the manifest that it names."""
    platforms: tuple[PlatformRoots, ...]
    leases: tuple[Lease, ...]
    dead_leases: tuple[str, ...]
    intents: tuple[str, ...]
    records: tuple[CondemnedRecord, ...]
    strangers: tuple[str, ...]
    stale_traces: tuple[str, ...]
    """Of images that are not there any more."""
    notes: tuple[str, ...]


class Observer:
    """Reads an origin as often as asked; manifests, which never change, are read once.

    `own_roots` says what this platform, `own_platform`, names; it is asked each time, and what stands about it at
    the origin does not count. `readers=1` reads in the calling thread.
    """

    def __init__(
        self,
        origin: Origin,
        own_roots: Callable[[], Iterable[Root]],
        *,
        keyring: Callable[[], Keyring],
        own_platform: str = "",
        readers: int = READERS,
    ) -> None:
        self._origin = origin
        self._own_roots = own_roots
        self._keyring = keyring
        self._own_record = ROOTS + own_platform
        self._readers = readers
        self._artefacts: dict[str, Artefact] = {}

    def observe(self, *, now_unix_ns: int) -> Observation:
        """Raises what the origin raises: an origin that cannot be listed is not understood at all."""
        notes: list[str] = []
        leases, pushes, dead = self._read_leases(now_unix_ns, notes)
        roots = set(self._own_roots())
        listed = list(self._origin.entries(""))
        records = self._read_records(listed, notes)
        platforms = self._read_platforms(listed, notes)
        closed: dict[str, str] = {}
        refs = self._read_refs(listed, closed)
        roots.update(root for platform in platforms or () for root in platform.roots)
        if platforms is None:
            notes.append("a platform's list of roots is not understood, so everything is kept")
        live = set(refs.values()) | {manifest_key(root.key_domain, root.manifest) for root in roots}
        objects, strangers = _sort(listed)
        there = {stored.key for stored in objects if stored.is_manifest}
        artefacts = self._read_artefacts(there | live)
        lost = sorted(live - set(artefacts))
        notes += [f"{key} is named but not there: push it again, or remove what names it" for key in lost]
        for artefact in artefacts.values():
            if artefact.problem and (artefact.key in live or not artefact.is_damaged):
                closed.setdefault(artefact.domain, f"{artefact.key}: {artefact.problem}")
        if platforms is None:
            closed.update((stored.domain, "a list of roots is not understood") for stored in objects)
        marks: defaultdict[str, list[Mark]] = defaultdict(list)
        for record in records:
            for key, since in record.since_unix_ns.items():
                marks[key].append(Mark(record=record.id, since_unix_ns=since))
        return Observation(
            seen=CollectionInput(
                objects=objects,
                live=frozenset(live),
                packs_of={key: artefact.packs for key, artefact in artefacts.items()},
                closed_domains=closed,
                marks={key: tuple(found) for key, found in marks.items()},
                pushes=pushes,
            ),
            artefacts=artefacts,
            refs=refs,
            platforms=tuple(platforms or ()),
            leases=leases,
            dead_leases=dead,
            intents=tuple(sorted(entry.key for entry in listed if entry.key.startswith(DELETING))),
            records=records,
            strangers=strangers,
            stale_traces=_stale_traces(listed, there),
            notes=tuple(notes),
        )

    def _read_leases(
        self, now_unix_ns: int, notes: list[str]
    ) -> tuple[tuple[Lease, ...], tuple[ActivePush, ...], tuple[str, ...]]:
        leases, pushes, dead = list[Lease](), list[ActivePush](), list[str]()
        for key in sorted(self._origin.list(LEASES)):
            try:
                lease = read_record(self._origin, key, Lease)
            except CorruptContentError as error:
                # It may be that of a newer version's push, which knows nothing of our records.
                notes.append(f"{key} is not understood, so everything that is not condemned yet is kept: {error}")
                pushes.append(_push_of_unknown(key))
                continue
            if lease is None:
                continue
            if now_unix_ns >= lease.expires_unix_ns + int(CLOCK_SKEW_S_MAX * SECOND_NS):
                dead.append(key)
                continue
            leases.append(lease)
            pushes.append(
                ActivePush(
                    lease=lease.id,
                    started_unix_ns=lease.started_unix_ns,
                    knows=frozenset(lease.knows),
                    revived=frozenset(lease.revived),
                )
            )
        return tuple(leases), tuple(pushes), tuple(dead)

    def _read_records(self, listed: list[ObjectInfo], notes: list[str]) -> tuple[CondemnedRecord, ...]:
        found: list[CondemnedRecord] = []
        for entry in listed:
            if entry.key.startswith(CONDEMNED):
                try:
                    record = read_record(self._origin, entry.key, CondemnedRecord)
                except CorruptContentError as error:
                    notes.append(f"{entry.key} is ignored: {error}")  # fewer marks: more is kept
                    continue
                if record is not None:
                    found.append(record)
        return tuple(found)

    def _read_platforms(self, listed: list[ObjectInfo], notes: list[str]) -> list[PlatformRoots] | None:
        """None if one is not understood."""
        found: list[PlatformRoots] = []
        for entry in listed:
            if entry.key.startswith(ROOTS) and entry.key != self._own_record:
                try:
                    platform = read_record(self._origin, entry.key, PlatformRoots)
                except CorruptContentError as error:
                    notes.append(f"{entry.key}: {error}")
                    return None
                if platform is not None:
                    found.append(platform)
        return found

    def _read_refs(self, listed: list[ObjectInfo], closed: dict[str, str]) -> dict[str, str]:
        """Not verified: a ref that must not be believed still keeps what it names."""
        refs: dict[str, str] = {}
        for entry in listed:
            domain, _, rest = entry.key.partition("/")
            if not rest.startswith("refs/"):
                continue
            try:
                if not _REF.fullmatch(entry.key):
                    raise CorruptContentError("its name has another form", where=entry.key)
                ref = decode_ref(fetch_ref(self._origin, entry.key), where=entry.key)
            except NotFoundError:
                continue
            except CorruptContentError as error:
                closed.setdefault(domain, f"{entry.key}: {error.message}")
                continue
            refs[entry.key] = manifest_key(ref.key_domain, ref.manifest)
        return refs

    def _read_artefacts(self, keys: set[str]) -> dict[str, Artefact]:
        wanted = sorted(key for key in keys if key not in self._artefacts)
        if self._readers > 1:
            with ThreadPoolExecutor(self._readers, thread_name_prefix="manifests") as pool:
                read = list(pool.map(self._read_artefact, wanted))
        else:
            read = [self._read_artefact(key) for key in wanted]
        for artefact in read:
            if artefact is not None:
                self._artefacts[artefact.key] = artefact
        return {key: self._artefacts[key] for key in keys if key in self._artefacts}

    def _read_artefact(self, key: str) -> Artefact | None:
        """None if it is not there."""
        match = _CONTENT.fullmatch(key)
        if match is None:
            return None
        domain, digest = match[1], Digest(f"blake3:{match[4]}")
        try:
            size = self._origin.size(key)
            data = bytearray(min(size, MANIFEST_BYTES_MAX + 1))
            if data:
                self._origin.read_range(key, 0, memoryview(data))
        except NotFoundError:
            return None
        keyring = self._keyring()
        hasher = keyring.hasher(domain) if domain in keyring.domains else None
        try:
            manifest = decode_manifest(bytes(data), expected=digest if hasher else None, hasher=hasher)
        except IntegrityError:
            return _broken(key, domain, "its bytes do not match its name", is_damaged=True)
        except CorruptContentError as error:
            return _broken(key, domain, error.message, is_damaged=False)
        return Artefact(
            key=key,
            domain=domain,
            kind=manifest.kind,
            plain_bytes=manifest.total_bytes,
            packs=tuple(pack_key(manifest.key_domain, pack.digest) for pack in manifest.packs),
        )


def _broken(key: str, domain: str, problem: str, *, is_damaged: bool) -> Artefact:
    return Artefact(
        key=key, domain=domain, kind="", plain_bytes=0, packs=(), problem=problem[:300], is_damaged=is_damaged
    )


def _push_of_unknown(key: str) -> ActivePush:
    return ActivePush(lease=key, started_unix_ns=0, knows=frozenset(), revived=frozenset())


def _sort(listed: list[ObjectInfo]) -> tuple[tuple[StoredObject, ...], tuple[str, ...]]:
    """Packs and manifests, and the keys that are nothing we know."""
    objects: list[StoredObject] = []
    strangers: list[str] = []
    for entry in listed:
        match = _CONTENT.fullmatch(entry.key)
        if match is not None and match[4].startswith(match[3]):
            objects.append(
                StoredObject(
                    key=entry.key,
                    is_manifest=match[2] == "manifests",
                    domain=match[1],
                    size_bytes=entry.bytes,
                    modified_unix_ns=entry.modified_unix_ns,
                )
            )
        elif _REF.fullmatch(entry.key) or _TRACE.fullmatch(entry.key):
            continue
        elif not entry.key.startswith((LEASES, CONDEMNED, DELETING, ROOTS)):
            strangers.append(entry.key)
    return tuple(objects), tuple(sorted(strangers))


def _stale_traces(listed: list[ObjectInfo], manifests: set[str]) -> tuple[str, ...]:
    found: list[str] = []
    for entry in listed:
        match = _TRACE.fullmatch(entry.key)
        if match and manifest_key(match[1], Digest(f"blake3:{match[3]}")) not in manifests:
            found.append(entry.key)
    return tuple(sorted(found))


def sizes(objects: Iterable[StoredObject]) -> Mapping[str, int]:
    return {stored.key: stored.size_bytes for stored in objects}

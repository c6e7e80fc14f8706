"""What control keeps at the origin: signed refs of models, and the list of everything else that its state names.

Order of writes (docs/explanation/collection.md): what names content is at the origin before the state names it, so
that a collection by another platform on the same origin never takes something that is named.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread

from snowdrop.content.gcformat import ROOTS, PlatformRoots, Root, record_key, write_record
from snowdrop.content.layout import manifest_key, ref_key
from snowdrop.content.leases import check_lease
from snowdrop.content.origin import Origin
from snowdrop.content.refs import REF_BYTES_MAX, check_named, fetch_ref, verify_ref
from snowdrop.content.signing import KeyStore
from snowdrop.control.world import World
from snowdrop.domain.deployment import ModelRecord
from snowdrop.domain.errors import (
    ConflictError,
    CorruptContentError,
    InvalidInputError,
    NotFoundError,
    UntrustedError,
)
from snowdrop.domain.ids import ModelName, TenantId, fresh_id
from snowdrop.domain.manifest import ArtefactRef
from snowdrop.domain.ref import Ref
from snowdrop.state.port import StateStore
from snowdrop.wire.api import PutModel, StoreRoot, StoreRoots


class OriginRoots:
    """One change at a time: `changing` is held from looking at what is named until it is named."""

    def __init__(self, origin: Origin, keys: KeyStore, state: StateStore, world: World, platform: str) -> None:
        self.changing = anyio.Lock()
        self._origin = origin
        self._keys = keys
        self._state = state
        self._world = world
        self._platform = platform
        self._published: frozenset[Root] | None = None

    # --- refs ---------------------------------------------------------------------------------------------

    async def next_generation(self, tenant: TenantId, name: ModelName, kind: str = "") -> int:
        """One above the newest that was ever believed here or stands, believable, at the origin.

        Raises ConflictError if the name is that of another `kind`: before anything is pushed for it.
        """
        record = await self._state.get_model(tenant, name)
        if kind:
            _check_kind(record, kind, where=f"name {name}")
        newest = await self._state.newest_ref(tenant, name)
        domain = record.artefact.key_domain if record is not None else "public"
        current = await anyio.to_thread.run_sync(self._current, domain, tenant, name)
        return 1 + max(newest.generation if newest else 0, current.generation if current else 0)

    async def publish(self, tenant: TenantId, name: ModelName, body: PutModel) -> ModelRecord:
        """Checks a ref, puts it at the origin and records the model. The caller holds `changing`.

        Raises UntrustedError, CorruptContentError, ConflictError (another push was first), NotFoundError (no such
        manifest), UnavailableError (the push has lost its lease), and what the origin raises.
        """
        where = f"ref of {name}"
        if len(body.ref) > REF_BYTES_MAX:
            raise InvalidInputError(
                f"the ref has {len(body.ref)} characters", where=f"ref_bytes_max={REF_BYTES_MAX}"
            )
        ref = verify_ref(body.ref.encode(), self._keys.trusted(), where=where)
        check_named(ref, tenant=tenant, name=name, where=where)
        previous = await self._state.get_model(tenant, name)
        _check_kind(previous, ref.kind, where=where)
        await self._check_generation(ref, previous)
        await self.publish_roots([ref.artefact])
        await anyio.to_thread.run_sync(self._put_ref, ref, body)
        record = ModelRecord(
            tenant=tenant,
            name=name,
            artefact=ref.artefact,
            created_unix_ns=ref.created_unix_ns,
            source=body.source,
            generation=ref.generation,
        )
        await self._state.put_model(record)
        if previous is not None and previous.artefact.key_domain != ref.key_domain:
            old = ref_key(previous.artefact.key_domain, tenant, name)
            await anyio.to_thread.run_sync(self._origin.delete, old)
        return record

    async def unpublish(self, record: ModelRecord) -> None:
        """Takes the ref of a model away from the origin."""
        key = ref_key(record.artefact.key_domain, record.tenant, record.name)
        await anyio.to_thread.run_sync(self._origin.delete, key)

    async def _check_generation(self, ref: Ref, previous: ModelRecord | None) -> None:
        if previous is not None and (previous.generation, previous.artefact) == (ref.generation, ref.artefact):
            return  # the same change, told again because its answer was lost
        wanted = await self.next_generation(ref.tenant, ref.name)
        if ref.generation < wanted:
            raise ConflictError(
                f"model {ref.name!r} was pushed by somebody else meanwhile (generation {wanted - 1})",
                where=f"generation {ref.generation}",
                next_step=f"`snowdrop model show {ref.name}` says what is there now; push again to replace it",
            )
        if ref.generation > wanted:
            raise InvalidInputError(
                f"generation {ref.generation} leaves out {wanted}",
                where=f"ref of {ref.name}",
                next_step="push again",
            )

    def _put_ref(self, ref: Ref, body: PutModel) -> None:
        if body.lease:
            check_lease(self._origin, body.lease, now_unix_ns=time.time_ns())
        manifest = manifest_key(ref.key_domain, ref.manifest)
        if not self._origin.exists(manifest):
            raise NotFoundError("the ref names a manifest that is not at the origin", where=manifest)
        self._origin.put(ref_key(ref.key_domain, ref.tenant, ref.name), body.ref.encode())

    def _current(self, domain: str, tenant: TenantId, name: ModelName) -> Ref | None:
        """The ref at the origin, if it is to be believed; one that is not is there to be replaced."""
        key = ref_key(domain, tenant, name)
        try:
            ref = verify_ref(fetch_ref(self._origin, key), self._keys.trusted(), where=key)
            check_named(ref, tenant=tenant, name=name, domain=domain, where=key)
        except (NotFoundError, CorruptContentError, UntrustedError):
            return None
        return ref

    # --- roots --------------------------------------------------------------------------------------------

    async def gather(self) -> StoreRoots:
        """Everything that this platform names now. The caller holds `changing`."""
        named: defaultdict[Root, set[str]] = defaultdict(set)
        for model in await self._state.list_models(None):
            named[_root(model.artefact)].add(f"model {model.tenant}/{model.name}")
        revisions = await self._state.list_all_revisions()
        revisions += [entry.order.revision for entry in self._world.replicas.values() if entry.order is not None]
        for revision in revisions:
            place = f"deployment {revision.tenant}/{revision.deployment}"
            named[_root(revision.code)].add(place)
            for bound in revision.models:
                named[_root(bound.artefact)].add(place)
        roots = (
            StoreRoot(key_domain=root.key_domain, manifest=root.manifest, named_by=tuple(sorted(names)))
            for root, names in named.items()
        )
        return StoreRoots(platform=self._platform, roots=tuple(roots))

    async def check_push(self, lease: str) -> None:
        """Raises UnavailableError if the push that stored the content of a change has lost its lease."""
        if lease:
            check = partial(check_lease, self._origin, lease, now_unix_ns=time.time_ns())
            await anyio.to_thread.run_sync(check)

    async def publish_roots(self, more: Iterable[ArtefactRef]) -> None:
        """Makes `more` known at the origin as named, before the state names it. The caller holds `changing`."""
        added = {_root(artefact) for artefact in more}
        if self._published is None:
            # The first time in this life: what stands at the origin is not known, so all of it is said.
            await self._write_roots(_roots_of(await self.gather()) | added)
        elif not added <= self._published:
            await self._write_roots(self._published | added)

    async def publish_all(self) -> StoreRoots:
        """What `gather` gives, said at the origin in the place of what stood there: what is gone goes from it."""
        found = await self.gather()
        await self._write_roots(_roots_of(found))
        return found

    async def _write_roots(self, roots: frozenset[Root]) -> None:
        ordered = tuple(sorted(roots, key=lambda root: (root.key_domain, root.manifest)))
        record = PlatformRoots(platform=self._platform, seen_unix_ns=time.time_ns(), roots=ordered)
        key = record_key(ROOTS, self._platform)
        await anyio.to_thread.run_sync(partial(write_record, self._origin, key, record))
        self._published = roots


def _roots_of(found: StoreRoots) -> frozenset[Root]:
    return frozenset(Root(root.key_domain, root.manifest) for root in found.roots)


def _root(artefact: ArtefactRef) -> Root:
    return Root(artefact.key_domain, artefact.manifest)


def platform_id(path: Path) -> str:
    """This platform's own name among those that share an origin; made once."""
    with suppress(FileNotFoundError):
        # Empty after a loss of power: another name keeps everything that the lost one named.
        if found := path.read_text().strip():
            return found
    made = fresh_id("platform")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f"{path.name}.{fresh_id('new')}")
    with temporary.open("w") as file:
        file.write(made + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    return made


def _check_kind(record: ModelRecord | None, kind: str, *, where: str) -> None:
    """Raises ConflictError if the name is another kind's."""
    if record is None or record.artefact.kind == kind:
        return
    other = record.artefact.kind
    raise ConflictError(
        f"the name {record.name!r} is taken by {'an' if other == 'image' else 'a'} {other}",
        where=where,
        next_step=f"choose another name, or `snowdrop {other} rm {record.name}` first",
    )

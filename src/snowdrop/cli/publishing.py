"""What `model push` and `deploy` do around the bytes: the lease before, the signed ref after."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from snowdrop.cli.output import Context
from snowdrop.content.leases import PushLease, push_lease
from snowdrop.content.origin import Origin, open_origin
from snowdrop.content.refs import make_ref
from snowdrop.content.signing import KeyStore
from snowdrop.domain.deployment import ModelRecord
from snowdrop.domain.ids import TenantId
from snowdrop.domain.manifest import ArtefactRef
from snowdrop.wire.api import Info, NextGeneration, PutModel


class Publication(msgspec.Struct, frozen=True, kw_only=True):
    """A push of a model under way. `origin` is what everything must be put to and asked of."""

    name: str
    lease: PushLease
    generation: int

    @property
    def origin(self) -> Origin:
        return self.lease.origin

    def publish(self, ctx: Context, artefact: ArtefactRef, *, source: str) -> ModelRecord:
        """Signs the ref and gives it to control, which checks it, puts it at the origin and records the model.

        Raises ConflictError if the name was pushed by somebody else since this push began.
        """
        self.lease.check()
        ref = make_ref(
            artefact,
            tenant=TenantId(ctx.tenant),
            name=self.name,
            generation=self.generation,
            created_unix_ns=time.time_ns(),
            signer=KeyStore(ctx.layout.keys).signer(),
        )
        body = PutModel(ref=ref.decode(), lease=self.lease.id, source=source)
        return ctx.client.send(ModelRecord, "PUT", "models", self.name, body=body)


@contextmanager
def publication(ctx: Context, name: str) -> Iterator[Publication]:
    """Holds the lease of one push of a model."""
    info = ctx.client.get(Info, "info")
    begun = ctx.client.get(NextGeneration, "models", name, "generation")
    origin = open_origin(info.origin_url, info.origin)
    with push_lease(origin, purpose=f"push of model {ctx.tenant}/{name}") as lease:
        yield Publication(name=name, lease=lease, generation=begun.generation)

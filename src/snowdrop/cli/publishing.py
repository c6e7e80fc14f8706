"""What `model push` and `deploy` do around the bytes: the lease before, the signed ref after."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from snowdrop.cli.output import Context
from snowdrop.content.ingest import PushResult, push_code
from snowdrop.content.leases import PushLease, push_lease
from snowdrop.content.origin import Origin, open_origin
from snowdrop.content.refs import make_ref
from snowdrop.content.signing import KeyStore
from snowdrop.domain.deployment import ModelRecord
from snowdrop.domain.ids import TenantId
from snowdrop.domain.manifest import ArtefactRef
from snowdrop.domain.service import ServiceSpec
from snowdrop.wire.api import Deploy, Deployed, Info, NextGeneration, PutModel


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


def publish_revision(ctx: Context, name: str, spec: ServiceSpec, folder: Path) -> tuple[Deployed, PushResult]:
    """Packs the code in `folder` and makes a revision with it. Raises as control does."""
    info = ctx.client.get(Info, "info")
    # The lease is held until the revision names the code: until then collection must not take it for garbage.
    origin = open_origin(info.origin_url, info.origin)
    with push_lease(origin, purpose=f"deploy of {ctx.tenant}/{name}") as lease:
        code = push_code(folder, lease.origin, tenant=TenantId(ctx.tenant))
        lease.check()
        body = Deploy(spec=spec, code=code.artefact, lease=lease.id)
        return ctx.client.send(Deployed, "POST", "deployments", name, body=body), code


@contextmanager
def publication(ctx: Context, name: str, *, kind: str = "model") -> Iterator[Publication]:
    """Holds the lease of one push. Raises ConflictError if the name is that of another `kind`."""
    info = ctx.client.get(Info, "info")
    begun = ctx.client.get(NextGeneration, "models", name, "generation", kind=kind)
    origin = open_origin(info.origin_url, info.origin)
    with push_lease(origin, purpose=f"push of model {ctx.tenant}/{name}") as lease:
        yield Publication(name=name, lease=lease, generation=begun.generation)

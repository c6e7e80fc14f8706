"""Deployments and revisions as they are stored, and models by name."""

from enum import StrEnum

import msgspec

from snowdrop.domain.ids import DeploymentName, Digest, ModelName, RevisionId, TenantId
from snowdrop.domain.manifest import ArtefactRef
from snowdrop.domain.rollout import Rollout
from snowdrop.domain.scale import Scale, ScaleBounds
from snowdrop.domain.service import ServiceSpec


class BoundModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model of a revision, resolved to immutable content when the revision was made."""

    name: ModelName
    param: str
    artefact: ArtefactRef
    lazy: bool = False


class Revision(msgspec.Struct, frozen=True, kw_only=True):
    """Immutable code + environment + models of a deployment."""

    id: RevisionId
    tenant: TenantId
    deployment: DeploymentName
    created_unix_ns: int
    spec: ServiceSpec
    code: ArtefactRef
    models: tuple[BoundModel, ...] = ()


class DeploymentHealth(StrEnum):
    """Whether starting replicas of the current revision is worth trying."""

    OK = "ok"
    BACKING_OFF = "backing-off"
    CRASH_LOOPING = "crash-looping"


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """A named, tenant-owned serving target. `generation` grows with each write and fences stale ones.

    `revision` is what all traffic goes to but for a rollout under way; `rollouts` are the latest that ended, the
    newest first. `scale` overrides the revision's own when set with `snowdrop scale`; `revision_bounds` bounds
    single revisions within it.
    """

    tenant: TenantId
    name: DeploymentName
    revision: RevisionId
    generation: int
    created_unix_ns: int
    scale: Scale | None = None
    revision_bounds: dict[RevisionId, ScaleBounds] = msgspec.field(default_factory=dict)
    deleting: bool = False
    rollout: Rollout | None = None
    rollouts: tuple[Rollout, ...] = ()

    @property
    def rival(self) -> RevisionId | None:
        """The other revision of a rollout under way: the new one until all traffic is shifted, then the old."""
        if self.rollout is None:
            return None
        return self.rollout.stable if self.revision == self.rollout.candidate else self.rollout.candidate


class ModelRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A model's name and the content it points to now. `generation` is that of its signed ref."""

    tenant: TenantId
    name: ModelName
    artefact: ArtefactRef
    created_unix_ns: int
    source: str = ""
    generation: int = 0


class NodeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A node that an agent has announced."""

    id: str
    instance_type: str
    memory_bytes: int
    cpus: float
    devices: tuple[str, ...] = ()
    sandbox: str = ""
    seen_unix_ns: int = 0
    environment: Digest | str = ""

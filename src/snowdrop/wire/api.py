"""The control API's bodies, shared by server and clients. All are JSON; errors are `{"error": ErrorBody}`."""

from __future__ import annotations

from typing import Literal

import msgspec

from snowdrop.domain.deployment import ModelRecord, NodeRecord, Revision
from snowdrop.domain.errors import ErrorBody
from snowdrop.domain.ids import DeploymentName, Digest, ModelName, RevisionId
from snowdrop.domain.manifest import ArtefactRef
from snowdrop.domain.origin import OriginOptions
from snowdrop.domain.replica import ReplicaReport
from snowdrop.domain.rollout import Rollout
from snowdrop.domain.scale import Scale, Schedule
from snowdrop.domain.service import ServiceSpec

TENANT_HEADER = "x-snowdrop-tenant"
"""Whoever can open control's socket runs the platform, and may act for any tenant."""


class Info(msgspec.Struct, frozen=True, kw_only=True):
    """What a client needs to know of the platform."""

    version: str
    state: str
    gateway_url: str
    origin_url: str
    sandbox: str
    nodes: tuple[NodeRecord, ...]
    gateways: tuple[str, ...]
    origin: OriginOptions = OriginOptions()


class PutModel(msgspec.Struct, frozen=True, kw_only=True):
    """Points a model's name at pushed content: the signed ref, as it is to stand at the origin.

    `lease` is that of the push, which must still hold it; empty when a ref is only signed again.
    """

    ref: str
    lease: str = ""
    source: str = ""


class NextGeneration(msgspec.Struct, frozen=True, kw_only=True):
    """The generation that the next ref of a model's name must have."""

    generation: int


class StoreModels(msgspec.Struct, frozen=True, kw_only=True):
    """The models of all tenants."""

    models: tuple[ModelRecord, ...]


class StoreRoot(msgspec.Struct, frozen=True, kw_only=True):
    """A manifest that control's state names, and what names it."""

    key_domain: str
    manifest: Digest
    named_by: tuple[str, ...]


class StoreRoots(msgspec.Struct, frozen=True, kw_only=True):
    """All that must be kept of this platform, over all tenants; it also stands at the origin, under `platform`."""

    platform: str
    roots: tuple[StoreRoot, ...]


class Deploy(msgspec.Struct, frozen=True, kw_only=True):
    """A new revision: what the code says of itself and the packed code, pushed under `lease`."""

    spec: ServiceSpec
    code: ArtefactRef
    lease: str = ""


class Deployed(msgspec.Struct, frozen=True, kw_only=True):
    deployment: DeploymentName
    revision: RevisionId
    created: bool
    url: str


class SetScale(msgspec.Struct, frozen=True, kw_only=True):
    """Fields left out stay as they are. With `revision`, `min` and `max` bound that revision only."""

    min: int | None = None
    max: int | None = None
    idle_s: float | None = None
    buffer: int | None = None
    idle: Literal["fixed", "auto"] | None = None
    wait_price: float | None = None
    target: float | None = None
    schedules: tuple[Schedule, ...] | None = None
    revision: RevisionId | None = None


class Rollback(msgspec.Struct, frozen=True, kw_only=True):
    """Back to a revision; empty for the one before."""

    revision: str = ""


class Rival(msgspec.Struct, frozen=True, kw_only=True):
    """A revision in a rollout and what is seen of it; of the new one since the step began. `p95_s` 0: unknown."""

    revision: RevisionId
    role: str
    weight: float
    done: int
    failed: int
    p95_s: float


class RolloutView(msgspec.Struct, frozen=True, kw_only=True):
    """The rollout of a deployment that is under way, and the last ones that ended, the newest first."""

    deployment: DeploymentName
    revision: RevisionId
    summary: str
    active: Rollout | None
    ended: tuple[Rollout, ...]
    revisions: tuple[Rival, ...]


class RevisionView(msgspec.Struct, frozen=True, kw_only=True):
    """A revision as `revisions` lists it."""

    id: RevisionId
    created_unix_ns: int
    manifest: Digest
    weight: float
    ready: int
    replicas: int
    note: str


class PutSecret(msgspec.Struct, frozen=True):
    """The only message of this API that has a secret's value; no answer has one."""

    value: str

    def __repr__(self) -> str:
        return "PutSecret(***)"


class SecretView(msgspec.Struct, frozen=True, kw_only=True):
    """A secret as `secret ls` lists it."""

    name: str
    version: int
    created_unix_ns: int
    changed_unix_ns: int
    used_by: tuple[DeploymentName, ...]


class Rotated(msgspec.Struct, frozen=True, kw_only=True):
    """All secrets are wrapped with the platform key `key_id` now; `removed` older keys are gone."""

    key_id: str
    rewrapped: int
    removed: int


class CreateVolume(msgspec.Struct, frozen=True, kw_only=True):
    size_bytes_max: int = 0


class VolumeView(msgspec.Struct, frozen=True, kw_only=True):
    """A persistent volume as `volume ls` lists it. `used_bytes` are on the disk."""

    name: str
    created_unix_ns: int
    size_bytes_max: int
    used_bytes: int
    files: int
    used_by: tuple[DeploymentName, ...]


class DeploymentView(msgspec.Struct, frozen=True, kw_only=True):
    """A deployment as `ps` shows it."""

    name: DeploymentName
    revision: RevisionId
    url: str
    health: str
    health_reason: str
    desired: int
    ready: int
    starting: int
    draining: int
    in_flight: int
    queued: int
    why: str
    scale: Scale
    concurrency: int
    created_unix_ns: int
    rollout: str = ""


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """A deployment with everything known of it."""

    view: DeploymentView
    revision: Revision
    replicas: tuple[ReplicaReport, ...]
    recent: tuple[ReplicaReport, ...]
    sandbox: str
    placement: str
    models: tuple[ModelName, ...]


class MakeKey(msgspec.Struct, frozen=True, kw_only=True):
    """Requests with the key get no higher priority in queues than `priority_max` (None: as any)."""

    priority_max: int | None = None


class NewKey(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to making a key: the only time its secret is seen."""

    name: str
    secret: str


class ApiError(msgspec.Struct, frozen=True):
    error: ErrorBody


class ReplicaLine(msgspec.Struct, frozen=True, kw_only=True):
    """A log line and whose it is."""

    replica: str
    unix_ms: int
    stream: str
    text: str

"""CLI -> agent: directories in which a person wants a model. HTTP bodies on the agent's socket."""

from __future__ import annotations

import msgspec

from snowdrop.domain.ids import TenantId
from snowdrop.domain.manifest import ArtefactRef


class PersonalMount(msgspec.Struct, frozen=True, kw_only=True):
    """A mounted directory; also what the agent keeps of it over its restarts.

    `start` names what is going to be started in an image, if its reads are to be recorded and fetched ahead.
    """

    directory: str
    tenant: TenantId
    model: str
    artefact: ArtefactRef
    start: str = ""


class Unmount(msgspec.Struct, frozen=True, kw_only=True):
    """Asks that the mount at a directory be removed."""

    directory: str


class MountReady(msgspec.Struct, frozen=True, kw_only=True):
    """Says that what was started in the image at a directory is ready; answered by `StartSummary`."""

    directory: str


class StartSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A start in a mounted image; bytes as in `wire.dataplane.StartTold`, without `is_known` all 0."""

    directory: str
    is_known: bool
    foreseen_bytes: int = 0
    recorded_bytes: int = 0
    missed_bytes: int = 0
    late_bytes: int = 0

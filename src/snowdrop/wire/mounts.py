"""CLI -> agent: directories in which a person wants a model. HTTP bodies on the agent's socket."""

from __future__ import annotations

import msgspec

from snowdrop.domain.ids import TenantId
from snowdrop.domain.manifest import ArtefactRef


class PersonalMount(msgspec.Struct, frozen=True, kw_only=True):
    """A mounted directory; also what the agent keeps of it over its restarts."""

    directory: str
    tenant: TenantId
    model: str
    artefact: ArtefactRef


class Unmount(msgspec.Struct, frozen=True, kw_only=True):
    """Asks that the mount at a directory be removed."""

    directory: str

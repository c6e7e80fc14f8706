"""Ref: the signed name of an artefact. `snowdrop.content.refs` encodes, signs and checks; here are the values."""

import msgspec

from snowdrop.domain.ids import Digest, ModelName, TenantId
from snowdrop.domain.manifest import ArtefactRef, TreeKind

REF_VERSION = 1


class Ref(msgspec.Struct, frozen=True, kw_only=True):
    """What a ref says: in this tenant, from `created_unix_ns` on, `name` means this artefact.

    `generation` grows by one with each push of the name, so that an older ref can be told from a newer one.
    `key_id` names the key that signed it.
    """

    version: int
    name: ModelName
    tenant: TenantId
    key_domain: str
    manifest: Digest
    kind: TreeKind
    total_bytes: int
    file_count: int
    generation: int
    created_unix_ns: int
    key_id: str

    @property
    def seen(self) -> "Seen":
        return Seen(generation=self.generation, manifest=self.manifest)

    @property
    def artefact(self) -> ArtefactRef:
        return ArtefactRef(
            manifest=self.manifest,
            kind=self.kind,
            total_bytes=self.total_bytes,
            file_count=self.file_count,
            key_domain=self.key_domain,
        )


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of the newest ref that was believed of a name."""

    generation: int
    manifest: Digest

    def allows(self, generation: int, manifest: Digest) -> bool:
        """Whether a ref is newer than this one, or this one."""
        return generation > self.generation or (generation == self.generation and manifest == self.manifest)

"""Typed ids and the rules for names that people choose.

Ids are plain strings at run time; the types keep a replica id from being passed for a deployment's name.
"""

import re
import secrets
from typing import NewType

from snowdrop.domain.errors import InvalidInputError

TenantId = NewType("TenantId", str)
DeploymentName = NewType("DeploymentName", str)
RevisionId = NewType("RevisionId", str)
ReplicaId = NewType("ReplicaId", str)
NodeId = NewType("NodeId", str)
ReceiptId = NewType("ReceiptId", str)
RequestId = NewType("RequestId", str)
TaskId = NewType("TaskId", str)
ModelName = NewType("ModelName", str)
Digest = NewType("Digest", str)
"""`blake3:` or `sha256:` followed by 64 lower-case hex digits."""

DEFAULT_TENANT = TenantId("default")

NAME_CHARS_MAX = 63
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_DIGEST = re.compile(r"(blake3|sha256):[0-9a-f]{64}")
RESERVED_NAMES = frozenset({"v1", "readyz", "healthz", "metrics", "admin", "api"})
"""First path segments that the gateway keeps for itself, so no deployment may be called so."""


def parse_name(text: str, *, what: str) -> str:
    """`text` if it is a usable name (DNS label: a-z, 0-9, inner hyphens, at most 63 characters).

    Raises InvalidInputError naming `what` (for example "deployment name") and the rule that was broken.
    """
    if not _NAME.fullmatch(text):
        raise InvalidInputError(
            f"{what} {text!r} is not usable",
            where=what,
            next_step=f"use lower-case letters, digits and inner hyphens, at most {NAME_CHARS_MAX} characters",
        )
    if text in RESERVED_NAMES:
        raise InvalidInputError(
            f"{what} {text!r} is reserved for the gateway", where=what, next_step="choose another name"
        )
    return text


def parse_digest(text: str) -> Digest:
    """`text` as a Digest; raises InvalidInputError if it has another form."""
    if not _DIGEST.fullmatch(text):
        raise InvalidInputError(
            f"{text[:80]!r} is not a digest", where="digest", next_step="expected blake3:<64 hex digits>"
        )
    return Digest(text)


def fresh_id(prefix: str) -> str:
    """A new random id like `rep-5f2c09d1a7b3`: 48 random bits, enough for names that one platform hands out."""
    return f"{prefix}-{secrets.token_hex(6)}"


def receipt_id_of(replica: ReplicaId) -> ReceiptId:
    """A start has exactly one receipt, so its id follows from the replica's and nobody has to ask for it."""
    return ReceiptId("rcp-" + replica.removeprefix("rep-"))

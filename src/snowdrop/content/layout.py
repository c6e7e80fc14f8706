"""Names of objects at the origin. Sharded by the first byte of the digest: directories stay small."""

from __future__ import annotations

from snowdrop.domain.ids import Digest, TenantId

PUBLIC_DOMAIN = "public"
"""Key domain of content whose chunks are named by their plain hash, shared by all tenants."""


def pack_key(domain: str, digest: str) -> str:
    """`digest` is 64 hex digits, as in PackRef."""
    return f"{domain}/packs/{digest[:2]}/{digest}"


def manifest_prefix(domain: str) -> str:
    """What the keys of all manifests of a domain begin with."""
    return f"{domain}/manifests/"


def manifest_key(domain: str, digest: Digest) -> str:
    name = digest.removeprefix("blake3:")
    return f"{domain}/manifests/{name[:2]}/{name}"


def ref_key(domain: str, tenant: TenantId, name: str) -> str:
    return f"{domain}/refs/{tenant}/{name}"


def trace_prefix(domain: str, tenant: TenantId, manifest: Digest) -> str:
    """What the keys of all traces of an image begin with that belong to a tenant's starts."""
    name = manifest.removeprefix("blake3:")
    return f"{domain}/traces/{tenant}/{name[:2]}/{name}/"


def trace_key(domain: str, tenant: TenantId, manifest: Digest, name: str) -> str:
    """`name` is 32 hex digits."""
    return trace_prefix(domain, tenant, manifest) + name

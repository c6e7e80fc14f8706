"""API keys: 256 random bits that the caller keeps; Snowdrop keeps their SHA-256.

A fast hash is right here, because the secret is not guessable: there is nothing to slow down.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping

from snowdrop.domain.errors import UnauthorisedError
from snowdrop.domain.ids import DEFAULT_TENANT, TenantId

KEY_PREFIX = "sd_"


def make_key() -> tuple[str, str]:
    """A new secret, shown once, and the hash to store."""
    secret = KEY_PREFIX + secrets.token_urlsafe(32)
    return secret, key_sha256(secret)


def key_sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def bearer(header: str | None) -> str | None:
    """The secret in an Authorization header; None without one. Raises UnauthorisedError for another scheme."""
    if header is None:
        return None
    scheme, _, secret = header.partition(" ")
    if scheme.lower() != "bearer" or not secret.strip() or not secret.isascii():
        raise UnauthorisedError(
            "the Authorization header is not of the form `Bearer KEY`", where="header authorization"
        )
    return secret.strip()


def authenticate(digest: str | None, keys: Mapping[str, TenantId], *, required: bool) -> TenantId:
    """Whose request it is. Without a key it is the default tenant's, unless a key is `required`.

    `digest` is the SHA-256 of the secret, `keys` maps such digests to tenants. A wrong key is refused even where
    none is required: whoever sends one expects it to count.
    """
    if digest is None:
        if required:
            raise UnauthorisedError(
                "an API key is required",
                where="header authorization",
                next_step="send `Authorization: Bearer KEY`",
            )
        return DEFAULT_TENANT
    tenant = keys.get(digest)
    if tenant is None:
        raise UnauthorisedError(
            "unknown API key", where="header authorization", next_step="create one with `snowdrop key create NAME`"
        )
    return tenant

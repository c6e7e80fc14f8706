"""Key domains: in whose name content is hashed.

`public` content is named by plain BLAKE3 and shared by all tenants. Private content is named by BLAKE3 in keyed
mode with a key of its tenant, so that nobody else can compute the name of a file and see whether it is there.
Its domain is `t-` and the key's id, which says nothing about the key.

A tenant's keys lie in one file of the key folder, readable by the platform's user only. The last one is used for
new content; earlier ones stay for what was pushed under them.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import msgspec
from blake3 import blake3

from snowdrop.content.layout import PUBLIC_DOMAIN
from snowdrop.domain.errors import InvalidInputError, NotFoundError
from snowdrop.domain.ids import TenantId
from snowdrop.domain.manifest import Manifest

KEY_BYTES = 32
KEYS_PER_TENANT_MAX = 1000
KEY_FILE_BYTES_MAX = 1 << 20
_ID_CONTEXT = "snowdrop 2026 content key id v1"
_TENANT = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_DOMAIN = re.compile(r"public|t-[0-9a-f]{32}")


class Hasher:
    """Names bytes in one key domain. May be used by several threads at once."""

    def __init__(self, domain: str, key: bytes | None) -> None:
        self.domain = domain
        self._key = key

    def hexdigest(self, data: bytes | bytearray | memoryview) -> str:
        """64 hex digits; large data is hashed without the GIL."""
        return (blake3(data) if self._key is None else blake3(data, key=self._key)).hexdigest()


PUBLIC_HASHER = Hasher(PUBLIC_DOMAIN, None)


class HasherSource(Protocol):
    """Whatever has the keys of some key domains."""

    def hasher(self, domain: str) -> Hasher:
        """Raises NotFoundError if the domain's key is not here. May block."""


class Keyring:
    """The keys that this process holds, by domain. `public` is always there."""

    def __init__(self, keys: Mapping[str, bytes] | None = None) -> None:
        self._hashers = {PUBLIC_DOMAIN: PUBLIC_HASHER}
        for domain, key in (keys or {}).items():
            if len(key) != KEY_BYTES or key_domain(key) != domain:
                raise InvalidInputError(
                    "content key does not belong to its domain", where=f"key domain {domain[:80]}"
                )
            self._hashers[domain] = Hasher(domain, key)

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self._hashers)

    def hasher(self, domain: str) -> Hasher:
        """Raises NotFoundError if the domain's key is not in this ring."""
        try:
            return self._hashers[domain]
        except KeyError:
            raise NotFoundError(
                "the key of this private content is not here",
                where=f"key domain {domain[:80]}",
                next_step="copy its tenant's file from the key folder of the machine that pushed it",
            ) from None


PUBLIC_KEYRING = Keyring()


def chunk_hasher(manifest: Manifest, keyring: Keyring) -> Hasher:
    """What names the chunks, the packs and the manifest itself; raises NotFoundError without its key."""
    return keyring.hasher(manifest.key_domain)


def key_domain(key: bytes) -> str:
    """The domain of content named with `key`. It can be published: the key does not follow from it."""
    return "t-" + blake3(key, derive_key_context=_ID_CONTEXT).hexdigest(length=16)


def is_key_domain(text: str) -> bool:
    return _DOMAIN.fullmatch(text) is not None


class _KeyFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`keys` are hex, the one in use last."""

    version: int
    keys: tuple[str, ...]


def load_keyring(folder: Path) -> Keyring:
    """All keys of all tenants in `folder`; without the folder, only `public`.

    Raises InvalidInputError naming the file if one is damaged or others than its owner may read it.
    """
    keys: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        keys.update((key_domain(key), key) for key in _read(path))
    return Keyring(keys)


def tenant_key(folder: Path, tenant: TenantId) -> bytes:
    """The key that new private content of `tenant` gets; made if it has none yet."""
    path = _path(folder, tenant)
    if not path.exists():
        _write(path, (), is_new=True)
    return _read(path)[-1]


def tenant_keys(folder: Path, tenant: TenantId) -> tuple[bytes, ...]:
    """All keys of `tenant`, the one for new content last; none if it has no private content."""
    path = _path(folder, tenant)
    return _read(path) if path.exists() else ()


def rotate_key(folder: Path, tenant: TenantId) -> bytes:
    """A new key for new content of `tenant`. What was pushed under earlier keys stays readable."""
    path = _path(folder, tenant)
    _write(path, tenant_keys(folder, tenant), is_new=False)
    return _read(path)[-1]


def _path(folder: Path, tenant: TenantId) -> Path:
    if not _TENANT.fullmatch(tenant):
        raise InvalidInputError(f"tenant {tenant[:80]!r} is not usable", where="tenant")
    return folder / f"{tenant}.json"


def _read(path: Path) -> tuple[bytes, ...]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        with open(fd, "rb") as stream:
            if stat.S_IMODE(os.fstat(fd).st_mode) & 0o077:
                raise InvalidInputError(
                    "others may read this key file", where=str(path), next_step=f"chmod 600 {path}"
                )
            decoded = msgspec.json.decode(stream.read(KEY_FILE_BYTES_MAX), type=_KeyFile)
        keys = tuple(bytes.fromhex(text) for text in decoded.keys)
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"content key file cannot be read: {error}", where=str(path), next_step="restore it from a backup"
        ) from error
    if decoded.version != 1 or not keys or any(len(key) != KEY_BYTES for key in keys):
        raise InvalidInputError(
            "content key file is damaged", where=str(path), next_step="restore it from a backup"
        )
    return keys


def _write(path: Path, earlier: tuple[bytes, ...], *, is_new: bool) -> None:
    """Adds a fresh key, durably. Of two that make the first one at once, one wins and both then read it."""
    if len(earlier) >= KEYS_PER_TENANT_MAX:
        raise InvalidInputError("too many keys", where=f"{path}: keys_per_tenant_max={KEYS_PER_TENANT_MAX}")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    keys = tuple(key.hex() for key in (*earlier, secrets.token_bytes(KEY_BYTES)))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as stream:
            stream.write(msgspec.json.encode(_KeyFile(version=1, keys=keys)) + b"\n")
            stream.flush()
            os.fsync(fd)
        if is_new:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return
        else:
            temporary.replace(path)
        _sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

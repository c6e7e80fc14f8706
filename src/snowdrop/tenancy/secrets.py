"""Secrets at rest: each under a key of its own, which is wrapped with a key of the platform that is not in the
database (ADR 19).

AES-256-GCM for both. The tenant, the name and the version are authenticated with them, so that a record moved to
another place in the database does not open. Platform keys come from SNOWDROP_SECRET_KEYS, or lie in a folder, one
file each, readable by the platform's user only; the newest is used for what is written.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import secrets
import stat
import time
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from snowdrop.domain.errors import ConflictError, InvalidInputError, NotFoundError, SnowdropError
from snowdrop.domain.secret import KEYS_VARIABLE, SecretRecord, SecretValue, check_value

KEY_BYTES = 32
NONCE_BYTES = 12
KEY_FILES_MAX = 1_000


class PlatformKeys:
    """The keys that wrap; `current` is the id of the one in use. Ids say nothing about their keys."""

    def __init__(self, folder: Path, variable: str = "") -> None:
        self._folder = folder
        self._from_environment = bool(variable)
        self._keys: dict[str, bytes] = {}
        self.current = ""
        if variable:
            keys = [_decoded(word, f"environment variable {KEYS_VARIABLE}") for word in variable.split(",")]
            self._keys = {key_id(key): key for key in keys}
            self.current = key_id(keys[0])

    def load(self) -> None:
        """Reads the folder; makes the first key if there is none. Blocking.

        Raises SnowdropError for a file that others may read, InvalidInputError for one that is no key.
        """
        if self._from_environment:
            return
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = sorted(self._folder.glob("*.key"))[:KEY_FILES_MAX]
        keys = [_decoded(_read_private(path), str(path)) for path in found]
        self._keys = {key_id(key): key for key in keys}
        if keys:
            self.current = key_id(keys[-1])
        else:
            self.add()

    def add(self) -> str:
        """A new key, in use from now on; its id. Durable when this returns. Blocking."""
        if self._from_environment:
            raise ConflictError(
                "the platform's keys come from the environment",
                where=KEYS_VARIABLE,
                next_step=f"put a new key before the old ones in {KEYS_VARIABLE}, restart, rotate again",
            )
        key = secrets.token_bytes(KEY_BYTES)
        path = self._folder / f"{time.time_ns():020d}-{key_id(key)}.key"
        fresh = path.with_suffix(".new")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(base64.b64encode(key) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(path)
        _sync_folder(self._folder)
        self._keys[key_id(key)] = key
        self.current = key_id(key)
        return self.current

    def drop_others(self) -> int:
        """Removes the files of all keys but the one in use: nothing is wrapped with them any more. Blocking."""
        gone = [path for path in self._folder.glob("*.key") if not path.stem.endswith(self.current)]
        if self._from_environment:
            return 0
        for path in gone:
            path.unlink()
        _sync_folder(self._folder)
        self._keys = {self.current: self._keys[self.current]}
        return len(gone)

    @property
    def from_environment(self) -> bool:
        return self._from_environment

    def cipher(self, which: str) -> AESGCM:
        """Raises NotFoundError if that key is not here."""
        key = self._keys.get(which)
        if key is None:
            raise NotFoundError(
                f"the platform key {which} is not here, so secrets wrapped with it cannot be opened",
                where=KEYS_VARIABLE if self._from_environment else str(self._folder),
                next_step="bring the key back from its backup, or set the secrets again",
            )
        return AESGCM(key)


def seal(keys: PlatformKeys, value: str, before: SecretRecord | None, empty: SecretRecord) -> SecretRecord:
    """`empty` (names and times) with the value sealed under a fresh key; its version is one above `before`."""
    check_value(value)
    own = AESGCM.generate_key(bit_length=8 * KEY_BYTES)
    record = msgspec.structs.replace(
        empty,
        version=1 if before is None else before.version + 1,
        created_unix_ns=empty.created_unix_ns if before is None else before.created_unix_ns,
    )
    sealed = _encrypt(AESGCM(own), value.encode(), _place(record))
    return _wrap(keys, msgspec.structs.replace(record, sealed=sealed), own)


def unseal(keys: PlatformKeys, record: SecretRecord) -> SecretValue:
    """Raises NotFoundError without the platform's key, SnowdropError for a record that was changed."""
    own = _unwrap(keys, record)
    return SecretValue(_decrypt(AESGCM(own), record.sealed, _place(record), record).decode())


def rewrap(keys: PlatformKeys, record: SecretRecord) -> SecretRecord:
    """The same secret under the key in use; what is sealed stays as it is."""
    return _wrap(keys, record, _unwrap(keys, record))


def key_id(key: bytes) -> str:
    """A name for a key, from which it does not follow."""
    return hashlib.blake2b(key, digest_size=8, person=b"sd secret key id").hexdigest()


def _wrap(keys: PlatformKeys, record: SecretRecord, own: bytes) -> SecretRecord:
    wrapped = _encrypt(keys.cipher(keys.current), own, _place(record) + keys.current.encode())
    return msgspec.structs.replace(record, key_id=keys.current, wrapped=wrapped)


def _unwrap(keys: PlatformKeys, record: SecretRecord) -> bytes:
    return _decrypt(keys.cipher(record.key_id), record.wrapped, _place(record) + record.key_id.encode(), record)


def _place(record: SecretRecord) -> bytes:
    return msgspec.json.encode([record.tenant, record.name, record.version])


def _encrypt(cipher: AESGCM, data: bytes, place: bytes) -> bytes:
    nonce = os.urandom(NONCE_BYTES)
    return nonce + cipher.encrypt(nonce, data, place)


def _decrypt(cipher: AESGCM, data: bytes, place: bytes, record: SecretRecord) -> bytes:
    try:
        return cipher.decrypt(data[:NONCE_BYTES], data[NONCE_BYTES:], place)
    except (InvalidTag, ValueError) as error:
        raise SnowdropError(
            f"secret {record.name!r} was changed in the database, or its key is another one",
            where=f"secret {record.tenant}/{record.name}",
            next_step=f"set it again: `snowdrop secret set {record.name}`",
        ) from error


def _decoded(word: str, where: str) -> bytes:
    try:
        key = base64.b64decode(word.strip(), validate=True)
    except binascii.Error:
        key = b""
    if len(key) != KEY_BYTES:
        raise InvalidInputError(
            f"a platform key is not {KEY_BYTES} bytes in base64",
            where=where,
            next_step="make one: `head -c 32 /dev/urandom | base64`",
        )
    return key


def _read_private(path: Path) -> str:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise SnowdropError(
            f"the platform key can be read by others (mode {mode:04o})",
            where=str(path),
            next_step="chmod 600 it, and consider the secrets known: set them again at their issuers",
        )
    return path.read_text()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

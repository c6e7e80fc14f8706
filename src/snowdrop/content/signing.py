"""Ed25519 keys: the one that signs refs here, and those that are trusted to.

keys/signing.pem    the private key (PKCS #8, mode 0600); made when it is first needed
keys/trusted.json   public keys whose refs are believed, the own one among them

Rotation: `rotate` makes a new signing key and trusts it beside the old one; refs are signed again; then the old
one is distrusted. Files are replaced whole, so a reader sees the old set or the new one.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from blake3 import blake3
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from snowdrop.domain.errors import (
    ConflictError,
    CorruptContentError,
    InvalidInputError,
    NotFoundError,
    UntrustedError,
)
from snowdrop.domain.ids import fresh_id

KEY_ID_CHARS = 16
PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64
TRUSTED_KEYS_MAX = 1_000
_FILE_VERSION = 1


class TrustedKey(msgspec.Struct, frozen=True, kw_only=True):
    """A public key (64 hex digits) that is believed, and since when."""

    key_id: str
    public_key: str
    added_unix_ns: int
    note: str = ""


class _TrustedFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: int
    keys: tuple[TrustedKey, ...]


def key_id_of(public_key: bytes) -> str:
    """The first 16 hex digits of the key's BLAKE3."""
    return blake3(public_key).hexdigest()[:KEY_ID_CHARS]


class Signer:
    """A private key."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public_key = private.public_key().public_bytes_raw()
        self.key_id = key_id_of(self.public_key)

    @classmethod
    def make(cls) -> Signer:
        return cls(Ed25519PrivateKey.generate())

    def sign(self, message: bytes) -> bytes:
        """64 bytes."""
        return self._private.sign(message)

    def pem(self) -> bytes:
        return self._private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


class TrustedKeys:
    """The keys whose signatures are believed."""

    def __init__(self, keys: dict[str, bytes]) -> None:
        self._keys = {key_id: Ed25519PublicKey.from_public_bytes(public) for key_id, public in keys.items()}

    def __contains__(self, key_id: str) -> bool:
        return key_id in self._keys

    def verify(self, key_id: str, message: bytes, signature: bytes, *, where: str) -> None:
        """Raises UntrustedError if the key is not trusted or the signature is not its own over `message`."""
        key = self._keys.get(key_id)
        if key is None:
            raise UntrustedError(
                f"signed by key {key_id}, which is not trusted here",
                where=where,
                next_step="`snowdrop store keys trust` it if you know whose it is, or push the model again",
            )
        try:
            key.verify(signature, message)
        except InvalidSignature as error:
            raise UntrustedError(
                f"the signature is not that of key {key_id}", where=where, next_step="push the model again"
            ) from error


class KeyStore:
    """The key files of one state folder."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._signing = directory / "signing.pem"
        self._trusted = directory / "trusted.json"

    def signer(self) -> Signer:
        """The signing key, made and trusted here if there is none yet."""
        with self._locked():
            if not self._signing.exists():
                self._adopt(Signer.make())
            return self._read_signer()

    def trusted(self) -> TrustedKeys:
        return TrustedKeys({key.key_id: bytes.fromhex(key.public_key) for key in self.list_keys()})

    def list_keys(self) -> tuple[TrustedKey, ...]:
        """Trusted keys, oldest first. Raises CorruptContentError for a file that makes no sense."""
        try:
            data = self._trusted.read_bytes()
        except FileNotFoundError:
            return ()
        try:
            found = msgspec.json.decode(data, type=_TrustedFile)
            if found.version != _FILE_VERSION or len(found.keys) > TRUSTED_KEYS_MAX:
                raise _bad_file(self._trusted, f"version {found.version} with {len(found.keys)} keys")
            for key in found.keys:
                if key_id_of(parse_public_key(key.public_key)) != key.key_id:
                    raise _bad_file(self._trusted, f"key {key.key_id[:64]} does not have this id")
        except (msgspec.DecodeError, InvalidInputError) as error:
            raise _bad_file(self._trusted, str(error)) from error
        return found.keys

    def signing_key_id(self) -> str | None:
        """Of the key that signs here; None if none has been made."""
        return self._read_signer().key_id if self._signing.exists() else None

    def rotate(self) -> Signer:
        """A new signing key, trusted beside those that were."""
        with self._locked():
            signer = Signer.make()
            self._adopt(signer)
            return signer

    def trust(self, public_key: str, note: str = "") -> TrustedKey:
        """Trusts a key given as 64 hex digits; one that is trusted already stays as it is."""
        raw = parse_public_key(public_key)
        with self._locked():
            return self._add(raw, note)

    def distrust(self, key_id: str) -> TrustedKey:
        """Refs signed by it are refused from now on. Raises NotFoundError, ConflictError for the signing key."""
        with self._locked():
            keys = self.list_keys()
            found = next((key for key in keys if key.key_id == key_id), None)
            if found is None:
                raise NotFoundError(
                    f"no trusted key has the id {key_id!r}",
                    where="key id",
                    next_step="`snowdrop store keys ls` lists them",
                )
            if key_id == self.signing_key_id():
                raise ConflictError(
                    f"key {key_id} signs the refs of this platform",
                    where=str(self._signing),
                    next_step="`snowdrop store keys rotate` first; then distrust it",
                )
            self._write_trusted(tuple(key for key in keys if key.key_id != key_id))
            return found

    def _adopt(self, signer: Signer) -> None:
        # Trusted before it signs: a crash in between leaves a trusted key that nobody has, which harms nobody.
        self._add(signer.public_key, "made here")
        self._write(self._signing, signer.pem())

    def _add(self, raw: bytes, note: str) -> TrustedKey:
        keys = self.list_keys()
        known = next((key for key in keys if key.key_id == key_id_of(raw)), None)
        if known is not None:
            return known
        added = TrustedKey(key_id=key_id_of(raw), public_key=raw.hex(), added_unix_ns=time.time_ns(), note=note)
        self._write_trusted((*keys, added))
        return added

    def _write_trusted(self, keys: tuple[TrustedKey, ...]) -> None:
        encoded = msgspec.json.encode(_TrustedFile(version=_FILE_VERSION, keys=keys))
        self._write(self._trusted, msgspec.json.format(encoded, indent=2) + b"\n")

    def _read_signer(self) -> Signer:
        try:
            private = serialization.load_pem_private_key(self._signing.read_bytes(), password=None)
        except (ValueError, TypeError) as error:
            raise _bad_file(self._signing, str(error)) from error
        if not isinstance(private, Ed25519PrivateKey):
            raise _bad_file(self._signing, "not an Ed25519 key")
        return Signer(private)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Two commands at once must not make two keys, or lose one of two changes."""
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)  # held for a few file operations, never across a wait
            yield
        finally:
            os.close(fd)

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        temporary = path.with_name(f"{path.name}.{fresh_id('new')}")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def parse_public_key(text: str) -> bytes:
    """Raises InvalidInputError unless `text` is 64 hex digits that a key can be made of."""
    try:
        raw = bytes.fromhex(text)
        if len(raw) != PUBLIC_KEY_BYTES or raw.hex() != text:
            raise ValueError("not 64 lower-case hex digits")
        Ed25519PublicKey.from_public_bytes(raw)
    except ValueError as error:
        raise InvalidInputError(
            f"{text[:80]!r} is not a public key: {error}",
            where="public key",
            next_step="expected the 64 hex digits that `snowdrop store keys ls` shows on the other platform",
        ) from error
    return raw


def _bad_file(path: Path, problem: str) -> CorruptContentError:
    return CorruptContentError(
        f"the key file makes no sense: {problem}"[:500],
        where=str(path),
        next_step="restore it from a copy; without one, remove it and push the models again",
    )

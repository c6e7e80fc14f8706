"""Signed refs: encoding, signing, and the checks that every reader makes.

A ref object is canonical JSON `{"ref": {...}, "signature": "<128 hex digits>"}`. Ed25519 signs the bytes of the
inner object as they stand in the file, after a fixed prefix that no other signed thing begins with. The tenant,
the name and the domain are inside, so a valid ref that is moved elsewhere is refused; the generation is inside, so
an older one is told from a newer one by whoever remembers the newest that it saw.
"""

from __future__ import annotations

import re
from typing import Protocol

import msgspec

from snowdrop.content.layout import ref_key
from snowdrop.content.origin import Origin
from snowdrop.content.signing import KEY_ID_CHARS, SIGNATURE_BYTES, Signer, TrustedKeys
from snowdrop.domain.errors import CorruptContentError, InvalidInputError, UntrustedError
from snowdrop.domain.ids import ModelName, TenantId, parse_digest, parse_name
from snowdrop.domain.manifest import ArtefactRef
from snowdrop.domain.ref import REF_VERSION, Ref, Seen

REF_BYTES_MAX = 4096
NUMBER_MAX = 1 << 62
SIGNED_PREFIX = b"snowdrop ref 1\0"
_DOMAIN = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_KEY_ID = re.compile(rf"[0-9a-f]{{{KEY_ID_CHARS}}}")
_SIGNATURE = re.compile(rf"[0-9a-f]{{{2 * SIGNATURE_BYTES}}}")


class _Envelope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    ref: Ref
    signature: str


class _AnyVersion(msgspec.Struct, frozen=True, kw_only=True):
    version: int


class _AnyEnvelope(msgspec.Struct, frozen=True, kw_only=True):
    ref: _AnyVersion


_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(_Envelope)


class SeenRefs(Protocol):
    """Remembers, durably, the newest ref of each name."""

    def newest(self, tenant: TenantId, name: ModelName) -> Seen | None: ...

    def remember(self, ref: Ref) -> None:
        """Called with a ref that is not older than `newest`."""


def make_ref(
    artefact: ArtefactRef,
    *,
    tenant: TenantId,
    name: str,
    generation: int,
    created_unix_ns: int,
    signer: Signer,
) -> bytes:
    """The signed object that names `artefact`. Raises InvalidInputError for a name that is not usable."""
    ref = Ref(
        version=REF_VERSION,
        name=ModelName(name),
        tenant=tenant,
        key_domain=artefact.key_domain,
        manifest=artefact.manifest,
        kind=artefact.kind,
        total_bytes=artefact.total_bytes,
        file_count=artefact.file_count,
        generation=generation,
        created_unix_ns=created_unix_ns,
        key_id=signer.key_id,
    )
    _validate(ref, where=f"ref of {name[:80]}")
    signature = signer.sign(SIGNED_PREFIX + _ENCODER.encode(ref))
    return _ENCODER.encode(_Envelope(ref=ref, signature=signature.hex()))


def sign_again(ref: Ref, signer: Signer) -> bytes:
    """The same statement, next generation, by another key. For rotation."""
    return make_ref(
        ref.artefact,
        tenant=ref.tenant,
        name=ref.name,
        generation=ref.generation + 1,
        created_unix_ns=ref.created_unix_ns,
        signer=signer,
    )


def decode_ref(data: bytes, *, where: str) -> Ref:
    """What a ref says, NOT verified. For readers that only need to know what it may name (collection).

    Raises CorruptContentError naming `where` if it is not a canonical ref of a known version.
    """
    return _decode(data, where).ref


def verify_ref(data: bytes, trusted: TrustedKeys, *, where: str) -> Ref:
    """What a ref says, signed by a trusted key. Raises CorruptContentError or UntrustedError naming `where`."""
    envelope = _decode(data, where)
    message = SIGNED_PREFIX + _ENCODER.encode(envelope.ref)
    trusted.verify(envelope.ref.key_id, message, bytes.fromhex(envelope.signature), where=where)
    return envelope.ref


def check_named(ref: Ref, *, tenant: TenantId, name: str, domain: str | None = None, where: str) -> None:
    """Raises UntrustedError if a valid ref is not the one of this tenant, name and domain."""
    if (ref.tenant, ref.name) != (tenant, name) or domain not in {None, ref.key_domain}:
        raise UntrustedError(
            f"this is the ref of {ref.tenant}/{ref.name} in {ref.key_domain}, put under another name",
            where=where,
            next_step="push the model again; find out who can write to the origin",
        )


def check_not_older(ref: Ref, newest: Seen | None, *, where: str) -> None:
    """Raises UntrustedError if a newer ref of this name, or another one of its generation, was seen before."""
    if newest is None or newest.allows(ref.generation, ref.manifest):
        return
    raise UntrustedError(
        f"rolled back: generation {ref.generation}, but {newest.generation} has been seen with {newest.manifest}",
        where=where,
        next_step="push the model again; find out who put the old ref back",
    )


def read_ref(
    origin: Origin, domain: str, tenant: TenantId, name: str, *, trusted: TrustedKeys, seen: SeenRefs
) -> Ref:
    """The current ref of a name, after all checks; remembered as the newest.

    Raises NotFoundError if there is none, CorruptContentError or UntrustedError if it must not be believed.
    """
    key = ref_key(domain, tenant, name)
    ref = verify_ref(fetch_ref(origin, key), trusted, where=key)
    check_named(ref, tenant=tenant, name=name, domain=domain, where=key)
    check_not_older(ref, seen.newest(tenant, ref.name), where=key)
    seen.remember(ref)
    return ref


def fetch_ref(origin: Origin, key: str) -> bytes:
    """The bytes of a ref object. Raises NotFoundError, and CorruptContentError for one that is too large."""
    size = origin.size(key)
    if size > REF_BYTES_MAX:
        raise _corrupt(f"ref has {size} bytes (ref_bytes_max={REF_BYTES_MAX})", key)
    data = bytearray(size)
    if size:
        origin.read_range(key, 0, memoryview(data))
    return bytes(data)


def _decode(data: bytes, where: str) -> _Envelope:
    if len(data) > REF_BYTES_MAX:
        raise _corrupt(f"ref has {len(data)} bytes (ref_bytes_max={REF_BYTES_MAX})", where)
    try:
        version = msgspec.json.decode(data, type=_AnyEnvelope).ref.version
        if version != REF_VERSION:
            raise _corrupt(f"ref of version {version}; this is read: {REF_VERSION}", where)
        envelope = _DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _corrupt(f"undecodable ref: {error}", where) from error
    try:
        _validate(envelope.ref, where=where)
    except CorruptContentError:
        raise
    except InvalidInputError as error:
        raise _corrupt(f"ref with bad names: {error.message}", where) from error
    if not _SIGNATURE.fullmatch(envelope.signature):
        raise _corrupt("the signature is not 128 hex digits", where)
    if _ENCODER.encode(envelope) != data:
        raise _corrupt("the ref's encoding is not the canonical one", where)
    return envelope


def _validate(ref: Ref, *, where: str) -> None:
    parse_name(ref.name, what="model name")
    parse_name(ref.tenant, what="tenant")
    parse_digest(ref.manifest)
    if not ref.manifest.startswith("blake3:"):
        raise _corrupt("a manifest is named by its BLAKE3", where)
    if not _DOMAIN.fullmatch(ref.key_domain) or not _KEY_ID.fullmatch(ref.key_id):
        raise _corrupt("key domain or key id has another form", where)
    numbers = (ref.total_bytes, ref.file_count, ref.generation, ref.created_unix_ns)
    if min(numbers) < 0 or max(numbers) > NUMBER_MAX or ref.generation < 1:
        raise _corrupt("a number is out of bounds", where)


def _corrupt(message: str, where: str) -> CorruptContentError:
    return CorruptContentError(message[:500], where=where, next_step="push the model again")

"""OCI's documents: references, manifests, indexes and configs, parsed with bounds. Pure.

Docker's documents of schema 2 have the same form under other media types and are taken as well; schema 1 is not.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from snowdrop.content.imagetree import check_config
from snowdrop.domain.errors import CorruptContentError, InvalidInputError, NotFoundError
from snowdrop.domain.image import ImageConfig

DOCUMENT_BYTES_MAX = 8 << 20
LAYERS_MAX = 512
INDEX_ENTRIES_MAX = 1024
BLOB_BYTES_MAX = 1 << 40
DOCKER_HUB = "registry-1.docker.io"
_HUB_NAMES = frozenset({"docker.io", "index.docker.io", DOCKER_HUB})

INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?")
_TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)


class Reference(msgspec.Struct, frozen=True):
    """Where an image is in a registry; `tag` or `digest` names it, the digest if both are given."""

    host: str
    repository: str
    tag: str = ""
    digest: str = ""

    @property
    def wanted(self) -> str:
        return self.digest or self.tag

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.host}/{self.repository}{tag}{digest}"


class Platform(msgspec.Struct, frozen=True):
    """What an image is made for."""

    os: str = "linux"
    architecture: str = "amd64"
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


class Blob(msgspec.Struct, frozen=True, kw_only=True):
    """A blob as a manifest names it. `size` is in bytes; -1 if it is not said."""

    digest: str
    size: int
    media_type: str = ""


class ImageDocument(msgspec.Struct, frozen=True, kw_only=True):
    """An OCI manifest with its config blob and layers, lowest first."""

    config: Blob
    layers: tuple[Blob, ...]


class ConfigDocument(msgspec.Struct, frozen=True, kw_only=True):
    """An image's config, and the digests of its layers' plain bytes, lowest first."""

    config: ImageConfig
    diff_ids: tuple[str, ...]


def parse_reference(text: str) -> Reference:
    """`[HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST]`; without a host it is Docker Hub, without a tag `latest`.

    Raises InvalidInputError saying which part is wrong.
    """
    rest, at, digest = text.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise _bad_reference(text, "digest is not sha256: with 64 hex digits")
    tag = ""
    colon = rest.rfind(":")
    if colon > rest.rfind("/"):
        rest, tag = rest[:colon], rest[colon + 1 :]
        if not _TAG.fullmatch(tag):
            raise _bad_reference(text, "tag has other characters than letters, digits, `_`, `.` and `-`")
    first, slash, remainder = rest.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        host, repository = first, remainder
        if not _HOST.fullmatch(host):
            raise _bad_reference(text, "host is not usable")
    else:
        host, repository = DOCKER_HUB, rest
    if host in _HUB_NAMES:
        host = DOCKER_HUB
        repository = repository if "/" in repository else f"library/{repository}"
    if not _REPOSITORY.fullmatch(repository) or len(repository) > 255:
        raise _bad_reference(text, "repository must be of lower-case letters, digits and separators")
    return Reference(host, repository, tag or ("" if digest else "latest"), digest)


def parse_platform(text: str) -> Platform:
    """`OS/ARCHITECTURE[/VARIANT]`."""
    parts = text.split("/")
    if len(parts) not in {2, 3} or not all(re.fullmatch(r"[a-z0-9_.]{1,32}", part) for part in parts):
        raise InvalidInputError(
            f"{text[:80]!r} is no platform", where="--platform", next_step="use OS/ARCHITECTURE, as in linux/arm64"
        )
    return Platform(*parts)


def machine_platform(machine: str) -> Platform:
    """The platform of a machine that calls itself so (uname -m)."""
    names = {"x86_64": ("amd64", ""), "aarch64": ("arm64", ""), "armv7l": ("arm", "v7"), "i686": ("386", "")}
    return Platform("linux", *names.get(machine, (machine, "")))


def parse_document(data: bytes, *, where: str) -> dict[str, Any]:
    """A JSON object of bounded size."""
    if len(data) > DOCUMENT_BYTES_MAX:
        raise _corrupt(f"has {len(data)} bytes (document_bytes_max={DOCUMENT_BYTES_MAX})", where)
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _corrupt(f"is no JSON object: {error}", where) from error


def is_index(document: dict[str, Any]) -> bool:
    return "manifests" in document


def choose(index: dict[str, Any], platform: Platform | None, *, where: str, name: str = "") -> Blob:
    """The one manifest of an index that is of `platform`, and carries the ref name `name` if one is given.

    Raises NotFoundError that lists what there is, InvalidInputError if several fit.
    """
    entries = index["manifests"]
    if not isinstance(entries, list) or len(entries) > INDEX_ENTRIES_MAX:
        raise _corrupt("is no index, or one with too many entries", where)
    found: list[Blob] = []
    offered: list[str] = []
    for entry in entries:
        blob = _blob(entry, where)
        if blob.media_type and blob.media_type not in (*MANIFEST_TYPES, *INDEX_TYPES):
            continue
        annotations = entry.get("annotations") or {}
        ref_name = str(annotations.get("org.opencontainers.image.ref.name", ""))
        stated = entry.get("platform")
        made_for = _platform(stated) if isinstance(stated, dict) else None
        offered.append(" ".join(text for text in (ref_name, str(made_for or "")) if text) or blob.digest[:19])
        if name and name not in (ref_name, blob.digest):
            continue
        if platform is not None and made_for is not None and not _fits(made_for, platform):
            continue
        if blob not in found:
            found.append(blob)
    if not found:
        raise NotFoundError(
            f"no image {name or ''} for {platform} there".replace("  ", " "),
            where=where,
            next_step=f"choose one of: {', '.join(offered[:20]) or 'nothing'}",
        )
    if len(found) > 1:
        raise InvalidInputError(
            f"{len(found)} images there, and nothing says which is meant",
            where=where,
            next_step=f"name one (SOURCE:TAG) or a platform; there are: {', '.join(offered[:20])}",
        )
    return found[0]


def parse_manifest(document: dict[str, Any], *, where: str) -> ImageDocument:
    if document.get("schemaVersion") != 2 or "config" not in document:
        raise _corrupt("is no image manifest of schema 2", where)
    layers = document.get("layers")
    if not isinstance(layers, list) or len(layers) > LAYERS_MAX:
        raise _corrupt(f"has no layers, or more than layers_max={LAYERS_MAX}", where)
    for layer in layers:
        if isinstance(layer, dict) and ("encrypted" in str(layer.get("mediaType")) or layer.get("urls")):
            raise _corrupt("has a layer that is encrypted or lies elsewhere", where)
    return ImageDocument(
        config=_blob(document["config"], where), layers=tuple(_blob(layer, where) for layer in layers)
    )


def parse_config(data: bytes, *, where: str) -> ConfigDocument:
    document = parse_document(data, where=where)
    run = document.get("config") or {}
    rootfs = document.get("rootfs") or {}
    if not isinstance(run, dict) or not isinstance(rootfs, dict):
        raise _corrupt("is no image config", where)
    diff_ids = _strings(rootfs.get("diff_ids"), "rootfs.diff_ids", where)
    if not all(_DIGEST.fullmatch(text) for text in diff_ids):
        raise _corrupt("rootfs.diff_ids are not SHA-256 digests", where)
    config = ImageConfig(
        env=tuple(text for text in _strings(run.get("Env"), "Env", where) if text.find("=") > 0),
        entrypoint=_strings(run.get("Entrypoint"), "Entrypoint", where),
        cmd=_strings(run.get("Cmd"), "Cmd", where),
        user=_text(run.get("User"), "User", where),
        workdir=_text(run.get("WorkingDir"), "WorkingDir", where),
        stop_signal=_text(run.get("StopSignal"), "StopSignal", where),
        os=_text(document.get("os"), "os", where) or "linux",
        architecture=_text(document.get("architecture"), "architecture", where),
        variant=_text(document.get("variant"), "variant", where),
    )
    check_config(config)
    return ConfigDocument(config=config, diff_ids=diff_ids)


def _platform(stated: dict[str, Any]) -> Platform:
    return Platform(*(str(stated.get(key) or "") for key in ("os", "architecture", "variant")))


def _fits(made_for: Platform, wanted: Platform) -> bool:
    if (made_for.os, made_for.architecture) != (wanted.os, wanted.architecture):
        return False
    # v8 of arm64 is what everybody means by arm64.
    return not wanted.variant or not made_for.variant or made_for.variant == wanted.variant


def _blob(entry: object, where: str) -> Blob:
    if not isinstance(entry, dict):
        raise _corrupt("names a blob that is no object", where)
    digest, size = entry.get("digest"), entry.get("size")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise _corrupt("names a blob without a SHA-256 digest", where)
    if not isinstance(size, int) or not 0 <= size <= BLOB_BYTES_MAX:
        raise _corrupt("names a blob without its size, or above blob_bytes_max", where)
    return Blob(digest=digest, size=size, media_type=_text(entry.get("mediaType"), "mediaType", where))


def _strings(value: object, what: str, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise _corrupt(f"{what} is no list of strings", where)
    return tuple(value)


def _text(value: object, what: str, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _corrupt(f"{what} is no string", where)
    return value


def _bad_reference(text: str, message: str) -> InvalidInputError:
    return InvalidInputError(
        f"{text[:200]!r} is no image reference: {message}",
        where="SOURCE",
        next_step="use HOST/REPOSITORY:TAG or HOST/REPOSITORY@sha256:DIGEST",
    )


def _corrupt(message: str, where: str) -> CorruptContentError:
    return CorruptContentError(message, where=where, next_step="make the image anew, or get it again")

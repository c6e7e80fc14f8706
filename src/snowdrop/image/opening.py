"""From what a person writes to the source of an image."""

from __future__ import annotations

from pathlib import Path

import msgspec

from snowdrop.domain.errors import InvalidInputError, NotFoundError
from snowdrop.image.archive import (
    LAYOUT_FILE,
    DirectoryFiles,
    DockerArchiveSource,
    Files,
    LayoutSource,
    TarFiles,
)
from snowdrop.image.oci import Platform, parse_reference
from snowdrop.image.source import ImageSource

FORMS = "docker://HOST/REPOSITORY:TAG, oci:PATH[:TAG] (directory or tar), docker-archive:PATH[:TAG], or a path"
_LAYOUT_SCHEMES = ("oci:", "oci-archive:")
_ARCHIVE_SCHEME = "docker-archive:"
_REGISTRY_SCHEME = "docker://"


class ReachOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How an image is chosen and reached. `insecure` hosts get no TLS; `mirrors` (hosts) are asked first."""

    platform: Platform
    insecure: tuple[str, ...] = ()
    mirrors: tuple[str, ...] = ()
    ca_file: str = ""
    docker_config: Path | None = None
    user: str = ""
    password: str = ""


def open_image(text: str, options: ReachOptions) -> tuple[ImageSource, bool]:
    """The source that `text` names, and whether it is far away: then layers are fetched before they are unpacked.

    What has no scheme and exists is a path, anything else a reference. Raises InvalidInputError or NotFoundError.
    """
    for scheme in _LAYOUT_SCHEMES:
        if text.startswith(scheme):
            path, wanted = _path_and_tag(text.removeprefix(scheme))
            return _layout(path, text, wanted, options.platform), False
    if text.startswith(_ARCHIVE_SCHEME):
        path, wanted = _path_and_tag(text.removeprefix(_ARCHIVE_SCHEME))
        return DockerArchiveSource(TarFiles(path), name=text, wanted=wanted), False
    if not text.startswith(_REGISTRY_SCHEME):
        if "://" in text:
            raise InvalidInputError(f"{text[:200]!r} is no source", where="SOURCE", next_step=f"name {FORMS}")
        if text.startswith(("/", "./", "../")) or Path(text).exists():
            return _by_looking(Path(text), text, options), False
    # Only this source needs an HTTP client.
    from snowdrop.image.registry import RegistrySource  # noqa: PLC0415

    return RegistrySource(parse_reference(text.removeprefix(_REGISTRY_SCHEME)), options), True


def _by_looking(path: Path, text: str, options: ReachOptions) -> ImageSource:
    if path.is_dir():
        return _layout(path, text, "", options.platform)
    files = TarFiles(path)
    if files.has(LAYOUT_FILE):
        return LayoutSource(files, name=text, wanted="", platform=options.platform)
    if files.has("manifest.json"):
        return DockerArchiveSource(files, name=text, wanted="")
    raise InvalidInputError(
        f"{text[:200]!r} holds no image", where="SOURCE", next_step="make it with `docker save` or `skopeo copy`"
    )


def _layout(path: Path, text: str, wanted: str, platform: Platform) -> ImageSource:
    files: Files = DirectoryFiles(path) if path.is_dir() else TarFiles(path)
    if not files.has(LAYOUT_FILE):
        raise NotFoundError(
            "there is no OCI layout", where=text[:200], next_step="name a directory or tar with a file oci-layout"
        )
    return LayoutSource(files, name=text, wanted=wanted, platform=platform)


def _path_and_tag(text: str) -> tuple[Path, str]:
    """`PATH[:TAG]`; a path that exists as it stands has no tag."""
    if Path(text).exists():
        return Path(text), ""
    path, colon, tag = text.rpartition(":")
    return (Path(path), tag) if colon and "/" not in tag else (Path(text), "")

"""The origin of a URL."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from snowdrop.content.origin.directory import DirectoryOrigin
from snowdrop.content.origin.objects import ObjectStoreOrigin
from snowdrop.content.origin.port import Origin
from snowdrop.content.origin.steer import Steer
from snowdrop.content.origin.stores import SCHEMES
from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.origin import OriginOptions


def open_origin(url: str, options: OriginOptions | None = None, *, steer: Steer | None = None) -> Origin:
    """The origin at `url`; raises InvalidInputError that says which schemes are served.

    Nothing is asked of it yet: one that is not there is noticed by the first call. Reads are measured by `steer`.
    """
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.scheme in SCHEMES:
        return ObjectStoreOrigin(url, options or OriginOptions(), steer=steer)
    if parts.scheme != "file" or parts.netloc not in {"", "localhost"} or not path.startswith("/") or "\0" in path:
        raise InvalidInputError(
            f"origin {url!r} cannot be opened",
            where="origin_url",
            next_step="use file:///absolute/path, s3://, gs:// or az://bucket/prefix, https:// or http://",
        )
    return DirectoryOrigin(Path(path), steer=steer)

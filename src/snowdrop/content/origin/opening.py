"""The origin of a URL."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from snowdrop.content.origin.directory import DirectoryOrigin
from snowdrop.content.origin.port import Origin
from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.origin import OriginOptions


def open_origin(url: str, options: OriginOptions | None = None) -> Origin:
    """The origin at `url`; raises InvalidInputError that says which schemes are served."""
    del options
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.scheme != "file" or parts.netloc not in {"", "localhost"} or not path.startswith("/") or "\0" in path:
        raise InvalidInputError(
            f"origin {url!r} cannot be opened",
            where="origin_url",
            next_step="this version serves directories only: file:///absolute/path",
        )
    return DirectoryOrigin(Path(path))

"""Where a request goes: a URL taken apart. Pure."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

from snowdrop.content.origin.head import GarbledError

URL_BYTES_MAX = 8 << 10


class Target(NamedTuple):
    """`path` has the query in it, which may be a signature: it belongs in no message and no log."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def server(self) -> tuple[str, str, int]:
        """What connections are shared by."""
        return self.scheme, self.host, self.port

    @property
    def authority(self) -> str:
        """The value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def shown(self) -> str:
        """The URL without what may be secret in it."""
        return f"{self.scheme}://{self.authority}{self.path.partition('?')[0]}"


class Located(NamedTuple):
    """Where to ask for an object, and the value of the Authorization header ("": none)."""

    target: Target
    authorization: str = ""


_DEFAULT_PORTS = {"http": 80, "https": 443}


def parse_target(url: str) -> Target:
    """Raises GarbledError for anything but an http or https URL of a sane length."""
    if len(url) > URL_BYTES_MAX or not url.isascii() or not url.isprintable() or " " in url:
        raise GarbledError("a URL with characters that do not belong in one, or too long")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise GarbledError(f"a URL that is none: {error}") from error
    if parts.scheme not in _DEFAULT_PORTS or not host:
        raise GarbledError(f"a URL with scheme {parts.scheme[:20]!r}")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(parts.scheme, host, port or _DEFAULT_PORTS[parts.scheme], path)


def redirected(target: Target, location: str | None) -> Target:
    """Where `location` leads from `target`. Raises GarbledError; an encrypted way never goes on in the clear."""
    if not location:
        raise GarbledError("a redirect without a location")
    base = f"{target.scheme}://{target.authority}{target.path}"
    onward = parse_target(urljoin(base, location))
    if target.scheme == "https" and onward.scheme != "https":
        raise GarbledError(f"a redirect from https to {onward.shown}")
    return onward

"""HTTP to one registry: the token dance, redirects, ranges, and answers turned into typed errors."""

from __future__ import annotations

import ipaddress
import re
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlencode, urljoin, urlsplit

import httpx2
import msgspec

from snowdrop.domain.errors import (
    CorruptContentError,
    InvalidInputError,
    NotFoundError,
    SnowdropError,
    TimedOutError,
    UnauthorisedError,
    UnavailableError,
)
from snowdrop.image.credentials import Credentials
from snowdrop.image.oci import DOCUMENT_BYTES_MAX
from snowdrop.image.source import Read

CONNECT_S_MAX = 15.0
STALL_S_MAX = 30.0
REDIRECTS_MAX = 5
RETRY_AFTER_S_MAX = 60.0
TOKEN_BYTES_MAX = 1 << 20
ERROR_BYTES_MAX = 4096
_CHALLENGE = re.compile(r'([a-zA-Z_]+)="([^"]*)"')
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_PIECE_BYTES = 256 << 10


class _Token(msgspec.Struct, frozen=True):
    token: str = ""
    access_token: str = ""


class Connection:
    """One repository at one host. `credentials` is asked once, when the host wants to know who we are.

    Loopback hosts and `is_insecure` ones are spoken to without TLS, unless there is a `ca_file` for them.
    """

    def __init__(
        self,
        host: str,
        repository: str,
        *,
        credentials: Callable[[str], Credentials | None],
        is_insecure: bool,
        ca_file: str,
    ) -> None:
        self.host = host
        self._repository = repository
        self._credentials = credentials
        self._is_plain = (is_insecure or _is_loopback(host)) and not ca_file
        self._authorization = ""
        try:
            context = ssl.create_default_context(cafile=ca_file or None)
        except OSError as error:
            raise InvalidInputError(f"CA file cannot be read: {error}", where=ca_file) from error
        timeout = httpx2.Timeout(STALL_S_MAX, connect=CONNECT_S_MAX)
        self._client = httpx2.Client(verify=context, timeout=timeout, follow_redirects=False)

    def close(self) -> None:
        self._client.close()

    def document(self, kind: str, name: str, accept: str) -> bytes:
        """A manifest or a small blob, whole."""
        with self._asked(self._url(kind, name), {"Accept": accept}) as response:
            return _whole(response, DOCUMENT_BYTES_MAX, f"{self.host}: {name}")

    @contextmanager
    def open_blob(self, digest: str, offset: int) -> Iterator[Read]:
        """A blob's bytes from `offset` on, also if the host does not know ranges."""
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        where = f"{self.host}: {digest}"
        with self._asked(self._url("blobs", digest), headers) as response:
            read = _reader(response, where)
            if offset and response.status_code != 206:
                left = offset
                while left > 0 and (data := read(min(left, _PIECE_BYTES))):
                    left -= len(data)
            elif offset:
                stated = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
                if stated is None or int(stated.group(1)) != offset:
                    raise UnavailableError("the registry answers with another range", where=where)
            yield read

    def _url(self, kind: str, name: str) -> str:
        scheme = "http" if self._is_plain else "https"
        return f"{scheme}://{self.host}/v2/{self._repository}/{kind}/{name}"

    @contextmanager
    def _asked(self, url: str, headers: dict[str, str]) -> Iterator[httpx2.Response]:
        """The answer to a GET, redirects followed, after logging in if that is wanted."""
        with _translated(self.host):
            response = self._follow(url, headers)
            try:
                if response.status_code == 401:
                    challenge = response.headers.get("www-authenticate", "")
                    response.close()
                    self._authorization = self._log_in(challenge)
                    response = self._follow(url, headers)
                _check(response, self.host, url)
                yield response
            finally:
                response.close()

    def _follow(self, url: str, headers: dict[str, str]) -> httpx2.Response:
        here = url
        for _ in range(REDIRECTS_MAX):
            sent = {"Accept-Encoding": "identity", "User-Agent": "snowdrop", **headers}
            # Whom we are redirected to gets its own rights with the URL, and never ours.
            if self._authorization and urlsplit(here)[:2] == urlsplit(url)[:2]:
                sent["Authorization"] = self._authorization
            response = self._client.send(self._client.build_request("GET", here, headers=sent), stream=True)
            location = response.headers.get("location", "")
            if response.status_code not in {301, 302, 303, 307, 308} or not location:
                return response
            response.close()
            there = urljoin(here, location)
            if urlsplit(there).scheme not in ({"http", "https"} if self._is_plain else {"https"}):
                raise UnavailableError("the registry redirects to a place without TLS", where=self.host)
            here = there
        raise UnavailableError(f"more than redirects_max={REDIRECTS_MAX}", where=self.host)

    def _log_in(self, challenge: str) -> str:
        """What to send as Authorization, as a 401 asks for it."""
        scheme, _, rest = challenge.partition(" ")
        known = self._credentials(self.host)
        if scheme.lower() == "basic":
            if known is None:
                raise _unauthorised(self.host, "it wants a user and a password")
            return known.basic
        fields = dict(_CHALLENGE.findall(rest))
        realm = fields.get("realm", "")
        if scheme.lower() != "bearer" or not realm:
            raise _unauthorised(self.host, f"it asks for {scheme[:40]!r}, which is not known here")
        if urlsplit(realm).scheme != "https" and not self._is_plain:
            raise _unauthorised(self.host, "it sends us to get a token without TLS")
        scope = fields.get("scope") or f"repository:{self._repository}:pull"
        return f"Bearer {self._token(realm, fields.get('service', ''), scope, known)}"

    def _token(self, realm: str, service: str, scope: str, known: Credentials | None) -> str:
        if known is not None and known.identity_token:
            form = {
                "grant_type": "refresh_token",
                "refresh_token": known.identity_token,
                "client_id": "snowdrop",
                "service": service,
                "scope": scope,
            }
            request = self._client.build_request("POST", realm, data=form)
        else:
            query = urlencode([("service", service)] * bool(service) + [("scope", scope)])
            headers = {"Authorization": known.basic} if known is not None else {}
            joined = f"{realm}{'&' if urlsplit(realm).query else '?'}{query}"
            request = self._client.build_request("GET", joined, headers=headers)
        response = self._client.send(request, stream=True)
        try:
            _check(response, urlsplit(realm).netloc, realm)
            found = msgspec.json.decode(_whole(response, TOKEN_BYTES_MAX, realm), type=_Token)
        except msgspec.DecodeError as error:
            raise UnavailableError(f"no token in what it answers: {error}", where=realm) from error
        finally:
            response.close()
        token = found.token or found.access_token
        if not token or not token.isascii() or not token.isprintable():
            raise UnavailableError("no token in what it answers", where=realm)
        return token


def _reader(response: httpx2.Response, where: str) -> Read:
    pieces = response.iter_raw(_PIECE_BYTES)
    rest = b""

    def read(most: int) -> bytes:
        nonlocal rest
        if not rest:
            with _translated(where):
                rest = next(pieces, b"")
        data, rest = rest[:most], rest[most:]
        return data

    return read


def _whole(response: httpx2.Response, bytes_max: int, where: str) -> bytes:
    read = _reader(response, where)
    data = bytearray()
    while piece := read(_PIECE_BYTES):
        data += piece
        if len(data) > bytes_max:
            raise CorruptContentError(f"a document above document_bytes_max={bytes_max}", where=where)
    return bytes(data)


def _check(response: httpx2.Response, host: str, url: str) -> None:
    status = response.status_code
    if status in {200, 206}:
        return
    where = f"{host}: {urlsplit(url).path}"
    if status in {401, 403}:
        raise _unauthorised(where, f"it answers {status}")
    if status == 404:
        raise NotFoundError("the registry does not have it", where=where, next_step="check name, tag and platform")
    if status in {408, 429} or status >= 500:
        raise UnavailableError(
            f"the registry answers {status}",
            where=where,
            next_step="push again later; it goes on where it was",
            retry_after_s=_retry_after_s(response),
        )
    raise SnowdropError(f"the registry answers {status}", where=where)


def _retry_after_s(response: httpx2.Response) -> float | None:
    text = response.headers.get("retry-after", "")
    return min(float(text), RETRY_AFTER_S_MAX) if text.isascii() and text.isdigit() else None


def _unauthorised(where: str, message: str) -> UnauthorisedError:
    return UnauthorisedError(
        f"the registry does not let us in: {message}",
        where=where,
        next_step="log in with `docker login` or `podman login`, or give --user and SNOWDROP_REGISTRY_PASSWORD",
    )


@contextmanager
def _translated(where: str) -> Iterator[None]:
    try:
        yield
    except httpx2.TimeoutException as error:
        raise TimedOutError(
            f"the registry stalls: {type(error).__name__}",
            where=f"{where}: stall_s_max={STALL_S_MAX:.0f}",
            next_step="push again; it goes on where it was",
        ) from error
    except httpx2.TransportError as error:
        raise UnavailableError(
            f"the registry cannot be reached: {str(error) or type(error).__name__}",
            where=where,
            next_step="check the host, its certificate and the network; push again to go on",
        ) from error
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise UnavailableError(f"the registry cannot be asked: {error}", where=where) from error


def _is_loopback(host: str) -> bool:
    name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False

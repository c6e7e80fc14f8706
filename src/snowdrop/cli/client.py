"""A blocking client for control's API and the agent's (unix sockets) and for the gateway (TCP)."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import msgspec

from snowdrop.domain.errors import PlatformDownError, ProtocolError, SnowdropError, error_from_body
from snowdrop.domain.layout import StateLayout
from snowdrop.wire.api import TENANT_HEADER, ApiError
from snowdrop.wire.upkeep import WorkLine

CALL_S_MAX = 60.0
T = TypeVar("T")


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float | None) -> None:
        super().__init__("control", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(self.timeout)
        try:
            sock.connect(str(self._path))
        except OSError:
            sock.close()
            raise
        self.sock = sock


class Client:
    """Calls control for one tenant. Every method raises the typed error that control answers."""

    def __init__(self, layout: StateLayout, tenant: str, socket_path: Path | None = None) -> None:
        self._layout = layout
        self._tenant = tenant
        self._socket = socket_path or layout.control_socket

    def of(self, tenant: str) -> Client:
        """The same, for another tenant."""
        return Client(self._layout, tenant)

    def agent(self) -> Client:
        """The same, for this machine's agent."""
        return Client(self._layout, self._tenant, self._layout.agent_socket)

    def get(self, kind: type[T], /, *path: str, **query: Any) -> T:
        return self._decoded(kind, "GET", path, None, query)

    def send(self, kind: type[T], method: str, *path: str, body: Any = None) -> T:
        return self._decoded(kind, method, path, body, {})

    def delete(self, *path: str) -> None:
        response = self._request("DELETE", path, None, {}, CALL_S_MAX)
        with response:
            response.read()

    def raw(self, *path: str) -> http.client.HTTPResponse:
        """An answer that is no JSON of ours, to be read and closed; a failure raises as ever."""
        return self._request("GET", path, None, {}, CALL_S_MAX)

    def work(self, *path: str, body: Any) -> Iterator[WorkLine]:
        """Long work that control has done for us: how far it is, as it comes. Raises the error that ends it."""
        with self._request("POST", path, body, {}, CALL_S_MAX) as response:
            is_done = False
            try:
                for line in response:
                    if b'"error"' in line:
                        raise answered_error(line)
                    told = msgspec.json.decode(line, type=WorkLine)
                    is_done = told.is_done
                    yield told
            except (OSError, http.client.HTTPException, msgspec.DecodeError) as error:
                raise _broken_off(path, error) from error
            if not is_done:
                raise _broken_off(path, EOFError("its answer ends early"))

    def lines(self, *path: str, **query: Any) -> Iterator[bytes]:
        """The lines of a streaming answer, as they come, for as long as they come."""
        try:
            with self._request("GET", path, None, query, None) as response:
                yield from response
        except http.client.HTTPException as error:
            raise PlatformDownError(
                "control went away while it answered", where="/".join(path), next_step="run the command again"
            ) from error

    def _decoded(self, kind: type[T], method: str, path: tuple[str, ...], body: Any, query: dict[str, Any]) -> T:
        try:
            with self._request(method, path, body, query, CALL_S_MAX) as response:
                return msgspec.json.decode(response.read(), type=kind)
        except (OSError, http.client.HTTPException) as error:
            raise PlatformDownError(
                f"control broke off its answer: {str(error) or type(error).__name__}",
                where=str(self._socket),
                next_step="try again; if it stays so, see the logs in the state folder",
            ) from error
        except msgspec.DecodeError as error:
            raise ProtocolError(
                f"control's answer is not understood: {error}",
                where="/".join(path),
                next_step="command and platform differ in version: `snowdrop down`, then `snowdrop up`",
            ) from error

    def _request(
        self, method: str, path: tuple[str, ...], body: Any, query: dict[str, Any], timeout_s: float | None
    ) -> http.client.HTTPResponse:
        url = "/v1/" + "/".join(quote(part, safe="") for part in path)
        given = {key: value for key, value in query.items() if value is not None}
        if given:
            url += "?" + urlencode(given)
        connection = _UnixConnection(self._socket, timeout_s)
        try:
            data = None if body is None else msgspec.json.encode(body)
            # Each call has a connection of its own, whose socket then ends with the response.
            connection.request(method, url, data, {TENANT_HEADER: self._tenant, "Connection": "close"})
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise PlatformDownError(
                "the platform is not running",
                where=str(self._layout.root),
                next_step="start it with `snowdrop up`, or name another state folder with --state",
            ) from error
        if response.status >= 400:
            with response:
                raise answered_error(response.read())
        return response


def _broken_off(path: tuple[str, ...], error: Exception) -> PlatformDownError:
    return PlatformDownError(
        f"the work was broken off: {str(error) or type(error).__name__}",
        where="/".join(path),
        next_step="run the command again: it goes on from what is there",
    )


def answered_error(data: bytes) -> SnowdropError:
    """The typed error in an answer's body."""
    try:
        return error_from_body(msgspec.json.decode(data, type=ApiError).error)
    except msgspec.DecodeError:
        return SnowdropError(data.decode(errors="replace")[:500] or "an empty answer")

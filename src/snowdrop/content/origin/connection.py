"""Sockets to the servers of an origin, kept open from one request to the next.

A connection never blocks, except in `receive_within`, which is where the bytes come: there one call takes all that
comes, straight into the memory it is for.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import struct
import threading
import time
import weakref
from collections import defaultdict
from contextlib import suppress
from typing import Any

IDLE_S_MAX = 15.0
"""Servers close idle connections after some time; this is below what the usual ones allow."""
IDLE_CONNECTIONS_MAX = 64
RESOLVED_S_MAX = 60.0
BAD_ADDRESS_S = 60.0

Server = tuple[str, str, int]
"""Scheme, host, port."""
Address = tuple[int, Any]
"""Family and what `connect` takes."""


class Connection:
    """One connection to `server`, by the first of `addresses` that answers."""

    def __init__(
        self, server: Server, addresses: list[Address], context: ssl.SSLContext | None, pool: Pool
    ) -> None:
        self.server = server
        self.fresh = True
        self.idle_since_s = 0.0
        self.events = select.POLLOUT
        self._addresses = addresses
        self._context = context
        self._pool = pool
        self._wait_s = 0.0
        self._phase = "connecting"
        self._sock = self._connect_next()

    @property
    def ready(self) -> bool:
        return self._phase == "ready"

    def fileno(self) -> int:
        return self._sock.fileno()

    def advance(self) -> bool:
        """Goes on connecting as far as that needs no wait; whether it is done. Raises OSError."""
        if self._phase == "connecting" and not self._try_connected():
            return False
        if self._phase == "handshake":
            assert isinstance(self._sock, ssl.SSLSocket)
            try:
                self._sock.do_handshake()
            except ssl.SSLWantReadError:
                self.events = select.POLLIN
                return False
            except ssl.SSLWantWriteError:
                self.events = select.POLLOUT
                return False
            self._phase = "ready"
        return True

    def send_now(self, data: memoryview) -> int:
        """How many of `data` went out without waiting; 0 if none."""
        try:
            sent = self._sock.send(data)
        except ssl.SSLWantReadError:
            self.events = select.POLLIN
            return 0
        except (BlockingIOError, ssl.SSLWantWriteError):
            self.events = select.POLLOUT
            return 0
        return sent

    def receive_now(self, into: memoryview) -> int | None:
        """How many bytes came; 0 at the end of the stream, None if there are none yet."""
        self._set_wait(0.0)
        try:
            return self._sock.recv_into(into)
        except ssl.SSLWantWriteError:
            self.events = select.POLLOUT
        except (BlockingIOError, ssl.SSLWantReadError):
            self.events = select.POLLIN
        return None

    def receive_within(self, into: memoryview, wait_s: float) -> int | None:
        """As `receive_now`, but waits up to `wait_s`, for all of `into` where the transport can."""
        self._set_wait(wait_s)
        try:
            if self._context is not None:
                return self._sock.recv_into(into)
            return self._sock.recv_into(into, 0, socket.MSG_WAITALL)
        except (TimeoutError, BlockingIOError):
            return None

    def pending(self) -> bool:
        """Whether bytes have come that poll() does not know of, being decrypted already."""
        return isinstance(self._sock, ssl.SSLSocket) and self._phase == "ready" and self._sock.pending() > 0

    def is_quiet(self) -> bool:
        """Whether an idle connection is as it should be: open, and nothing came that nobody asked for."""
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        return not self.pending() and not poller.poll(0)

    def close(self) -> None:
        self._sock.close()

    def _connect_next(self) -> socket.socket:
        while True:
            family, address = self._addresses[0]
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                code = sock.connect_ex(address)
                if code not in {0, errno.EINPROGRESS}:
                    raise OSError(code, os.strerror(code))
            except OSError:
                sock.close()
                if not self._has_another_address():
                    raise
                continue
            return sock

    def _has_another_address(self) -> bool:
        """Gives up the one that failed."""
        self._pool.mark_bad(self.server, self._addresses.pop(0))
        return bool(self._addresses)

    def _try_connected(self) -> bool:
        poller = select.poll()
        poller.register(self._sock, select.POLLOUT)
        if not poller.poll(0):
            return False
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._sock.close()
            if not self._has_another_address():
                raise OSError(code, os.strerror(code))
            self._sock = self._connect_next()
            return False
        if self._context is None:
            self._phase = "ready"
            return True
        self._sock = self._context.wrap_socket(
            self._sock, server_hostname=self.server[1], do_handshake_on_connect=False
        )
        self._phase = "handshake"
        return True

    def _set_wait(self, wait_s: float) -> None:
        """0 is not at all. A plain socket waits in the kernel (SO_RCVTIMEO), so that MSG_WAITALL holds."""
        if wait_s == self._wait_s:
            return
        self._wait_s = wait_s
        if self._context is not None or wait_s == 0.0:
            self._sock.settimeout(wait_s)
            return
        self._sock.settimeout(None)
        whole = int(wait_s)
        timeval = struct.pack("@ll", whole, max(int((wait_s - whole) * 1e6), 1))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)


class Pool:
    """Connections that are between two requests, and what host names stand for. Used from several threads."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._idle: dict[Server, list[Connection]] = defaultdict(list)
        self._resolved: dict[Server, tuple[float, list[Address]]] = {}
        self._bad: dict[tuple[Server, Address], float] = {}
        self._turn = 0
        # An origin that nobody closed leaves no open sockets behind.
        self._finalizer = weakref.finalize(self, _close_all, self._idle)

    def take(self, server: Server, *, fresh: bool = False) -> Connection:
        """An idle connection, or one that begins to connect. Raises OSError if the name cannot be resolved."""
        while not fresh:
            with self._lock:
                idle = self._idle[server]
                if not idle:
                    break
                connection = idle.pop()
            if time.monotonic() - connection.idle_since_s < IDLE_S_MAX and connection.is_quiet():
                connection.fresh = False
                return connection
            connection.close()
        context = self._context if server[0] == "https" else None
        return Connection(server, self._addresses(server), context, self)

    def open_ahead(self, server: Server, count: int) -> None:
        """Begins to connect until `count` connections are idle or on their way. Raises OSError as `take`."""
        with self._lock:
            missing = count - len(self._idle[server])
        for _ in range(missing):
            self.give_back(self.take(server, fresh=True))

    def give_back(self, connection: Connection) -> None:
        """After a response that was read to its end."""
        connection.idle_since_s = time.monotonic()
        with self._lock:
            idle = self._idle[connection.server]
            idle.append(connection)
            surplus = [idle.pop(0)] if len(idle) > IDLE_CONNECTIONS_MAX else []
        for old in surplus:
            old.close()

    def mark_bad(self, server: Server, address: Address) -> None:
        """No connection could be made to it: others are tried first for a while."""
        with self._lock:
            self._bad[server, address] = time.monotonic()

    def close(self) -> None:
        with self._lock:
            _close_all(self._idle)

    def _addresses(self, server: Server) -> list[Address]:
        now_s = time.monotonic()
        with self._lock:
            resolved_s, found = self._resolved.get(server, (0.0, []))
        if not found or now_s - resolved_s > RESOLVED_S_MAX:
            infos = socket.getaddrinfo(server[1], server[2], type=socket.SOCK_STREAM)
            found = [(int(family), address) for family, _, _, _, address in infos]
            with self._lock:
                self._resolved[server] = (now_s, found)
        with self._lock:
            self._turn += 1
            first = self._turn % len(found)
            self._bad = {key: at for key, at in self._bad.items() if now_s - at < BAD_ADDRESS_S}
            turned = found[first:] + found[:first]
            return sorted(turned, key=lambda address: (server, address) in self._bad)


def _close_all(idle: dict[Server, list[Connection]]) -> None:
    for connections in idle.values():
        for connection in connections:
            with suppress(OSError):
                connection.close()
    idle.clear()


def client_context(ca_file: str) -> ssl.SSLContext:
    """Trusts the system's certificates and those of `ca_file`. Raises OSError."""
    context = ssl.create_default_context()
    if ca_file:
        context.load_verify_locations(cafile=ca_file)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context

"""The sockets between a landing area and its readers: wake-ups go out, wants come in."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import anyio
import anyio.abc

from snowdrop.content.artefact import Artefact
from snowdrop.content.fetch import FetchEngine
from snowdrop.content.progress import WANTS_MAX, decode_wants

WANTS_REST_S = 0.02
"""Between two turns of one reader: one that sends without end gets no more of the loop than this."""
PACKETS_MAX = 32
"""In one turn."""


class Readers:
    """For one event loop."""

    def __init__(self, engine: FetchEngine) -> None:
        self._engine = engine

    def attach(self, tasks: anyio.abc.TaskGroup, artefact: Artefact, holder: str, *, lazy: bool) -> socket.socket:
        """Begins to fill the artefact's area for `holder`; gives the reader's end of its socket."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with self._engine.lock:
            artefact.fill.attach(holder, ours, is_lazy=lazy)
        self._engine.kick(artefact.fill)
        tasks.start_soon(self._listen, artefact, holder, ours)
        return theirs

    def detach(self, artefact: Artefact, holder: str) -> None:
        """`holder` no longer reads: what only it wanted is not fetched."""
        with self._engine.lock:
            artefact.fill.detach(holder)
            self._engine.lock.notify_all()  # others may have waited for what it was about to bring
        artefact.tell()

    async def _listen(self, artefact: Artefact, holder: str, wake: socket.socket) -> None:
        """Takes a reader's wants until it closes its end or is detached."""
        try:
            while True:
                await anyio.wait_readable(wake)
                # A reader that goes through a model sends one for each tensor: those that have come are one turn.
                for packet in _packets(wake):
                    if not packet:
                        return
                    wants = decode_wants(packet, len(artefact.manifest.chunks))
                    with self._engine.lock:
                        artefact.fill.want(wants)
                self._engine.kick(artefact.fill)
                await anyio.sleep(WANTS_REST_S)
        finally:
            artefact.fill.drop_wake(holder, wake)


def _packets(wake: socket.socket) -> Iterator[bytes]:
    """What lies ready, at most PACKETS_MAX; an empty one if the reader is gone."""
    for _ in range(PACKETS_MAX):
        try:
            packet = wake.recv(4 * WANTS_MAX)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        yield packet

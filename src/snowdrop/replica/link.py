"""The replica's end of the channel to its agent.

A thread of its own reads it, not the event loop: user code may hold the loop (or there may be none yet, while it
imports), and still the end of the agent must end the replica, and an answer must reach a thread that waits.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading
from collections.abc import Callable

import msgspec

from snowdrop.domain.errors import ErrorBody, ProtocolError, TimedOutError, error_from_body
from snowdrop.replica.stages import EXIT_AGENT_GONE
from snowdrop.wire.codec import Message
from snowdrop.wire.packet import PacketChannel
from snowdrop.wire.replica import (
    CallOpened,
    DirectoryReady,
    Drain,
    ModelHandle,
    ModelRenewed,
    OpenCall,
    RenewModel,
    ToReplica,
    WaitForDirectory,
)

SEND_S_MAX = 10
"""An agent that takes nothing for so long is treated as gone."""


RENEW_S_MAX = 60.0
"""How long the agent may take to give a model again; a data plane that died is there again in a second."""


Opened = Callable[[ErrorBody | None, tuple[int, ...]], None]


class _Wait(msgspec.Struct):
    done: threading.Event
    error: ErrorBody | None = None
    handle: ModelHandle | None = None
    fds: tuple[int, ...] = ()


def leave_at_once() -> None:
    """Ends the process without unwinding user code, which may be stuck."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_AGENT_GONE)


class AgentLink:
    """Sends from any thread; `on_gone` is called in the reading thread when the agent has closed."""

    def __init__(
        self, sock: socket.socket, channel: PacketChannel[ToReplica], on_gone: Callable[[], None] = leave_at_once
    ) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_S_MAX, 0))
        self._channel = channel
        self._on_gone = on_gone
        self._lock = threading.Lock()
        self._waits: dict[str, _Wait] = {}
        self._renewals: dict[str, list[_Wait]] = {}
        self._calls: dict[int, Opened] = {}
        self._calls_asked = 0
        self._drain: Drain | None = None
        self._on_drain: Callable[[Drain], None] | None = None

    def start(self) -> None:
        threading.Thread(target=self._read, name="agent link", daemon=True).start()

    def send(self, message: Message) -> None:
        """Sends one message; without an agent there is nothing left to do, so failure ends the process."""
        try:
            with self._lock:
                self._channel.send_blocking(message)
        except OSError:
            self._on_gone()

    def call_on_drain(self, handler: Callable[[Drain], None]) -> None:
        """`handler` gets every Drain, in the reading thread; at once one that came before."""
        with self._lock:
            self._on_drain = handler
            early, self._drain = self._drain, None
        if early is not None:
            handler(early)

    def wait_directory(self, model: str, s_max: float) -> None:
        """Blocks until the model's directory is complete. Raises what the agent says, or TimedOutError."""
        with self._lock:
            first = model not in self._waits
            wait = self._waits.setdefault(model, _Wait(threading.Event()))
        if first:
            self.send(WaitForDirectory(model=model))
        if not wait.done.wait(s_max):
            raise TimedOutError(
                f"the directory of model {model!r} is not complete",
                where=f"startup_s_max={s_max:g}",
                next_step="raise `startup_s_max`, or read tensors and single files, which need no whole directory",
            )
        if wait.error is not None:
            raise error_from_body(wait.error)

    def renew_model(self, model: str) -> tuple[ModelHandle, tuple[int, ...]]:
        """Asks for the model again, for its data plane is gone; the descriptors are the caller's.

        Blocks. Raises what the agent says, or TimedOutError.
        """
        wait = _Wait(threading.Event())
        with self._lock:
            self._renewals.setdefault(model, []).append(wait)
        self.send(RenewModel(model=model))
        if not wait.done.wait(RENEW_S_MAX) and self._forget(model, wait):
            raise TimedOutError(
                f"the node does not give model {model!r} again",
                where=f"renew_s_max={RENEW_S_MAX:g}",
                next_step="see the agent's log in the state folder",
            )
        if wait.error is not None:
            raise error_from_body(wait.error)
        if wait.handle is None:
            raise ProtocolError("the model was given again without a handle", where="agent link")
        return wait.handle, wait.fds

    def open_call(self, opened: Opened) -> None:
        """Asks for a connection to the gateway.

        `opened` gets it as a descriptor that is then its own, or why there is none, in the reading thread.
        """
        with self._lock:
            self._calls_asked += 1
            number = self._calls_asked
            self._calls[number] = opened
        self.send(OpenCall(number=number))

    def _forget(self, model: str, wait: _Wait) -> bool:
        """Gives up a renewal, so that its late answer is nobody's; False if it has come just now."""
        with self._lock:
            waits = self._renewals.get(model, [])
            kept = [other for other in waits if other is not wait]
            self._renewals[model] = kept
            return len(kept) < len(waits)

    def _read(self) -> None:
        try:
            while True:
                message, fds = self._channel.receive_blocking()
                if isinstance(message, ModelRenewed) and self._renewed(message, fds):
                    continue
                if isinstance(message, CallOpened):
                    with self._lock:
                        opened = self._calls.pop(message.number, None)
                    if opened is not None:
                        opened(message.error, fds)
                        continue
                for fd in fds:
                    os.close(fd)
                self._handle(message)
        except (EOFError, OSError):
            pass
        except ProtocolError as error:
            print(f"agent link: {error}", file=sys.stderr)
        self._on_gone()

    def _renewed(self, message: ModelRenewed, fds: tuple[int, ...]) -> bool:
        """Gives an answer to whoever waits longest; False if nobody does."""
        with self._lock:
            waits = self._renewals.get(message.model)
            wait = waits.pop(0) if waits else None
            if wait is None:
                return False
            wait.error, wait.handle, wait.fds = message.error, message.handle, fds
            wait.done.set()
        return True

    def _handle(self, message: ToReplica) -> None:
        match message:
            case ModelRenewed() | CallOpened():
                pass  # its asker has given up
            case DirectoryReady():
                with self._lock:
                    wait = self._waits.pop(message.model, None)
                if wait is not None:
                    wait.error = message.error
                    wait.done.set()
            case Drain():
                with self._lock:
                    handler = self._on_drain
                    if handler is None:
                        self._drain = message
                if handler is not None:
                    handler(message)
            case _:
                raise ProtocolError(f"unexpected {type(message).__name__} after Boot", where="agent link")

"""The gateway's connection to control: opened again whenever it breaks. The gateway serves on without it."""

from __future__ import annotations

import logging

import anyio
import anyio.abc

from snowdrop.domain.errors import ProtocolError, SnowdropError, error_from_body
from snowdrop.gateway.owner import Owner
from snowdrop.wire.codec import PROTOCOL_VERSION, Message
from snowdrop.wire.control import TO_GATEWAY, GatewayHello, LinkRefused, ToGateway
from snowdrop.wire.stream import MessageStream

RECONNECT_S = 0.1
OUTBOX_MAX = 10_000
log = logging.getLogger("snowdrop.gateway")


class ControlLink:
    """The uplink of an Owner. `run` never returns unless control refuses this gateway's version."""

    def __init__(self, socket_path: str, gateway: str, owner: Owner) -> None:
        self._socket_path = socket_path
        self._gateway = gateway
        self._owner = owner
        self._outbox: list[Message] = []
        self._load_dirty = False
        self._wake = anyio.Event()

    def send_soon(self, message: Message) -> None:
        # Past the bound the oldest go: what control needs is said again when it reconnects.
        del self._outbox[: max(0, len(self._outbox) - OUTBOX_MAX + 1)]
        self._outbox.append(message)
        self._wake.set()

    def load_changed(self) -> None:
        self._load_dirty = True
        self._wake.set()

    async def run(self) -> None:
        while True:
            try:
                stream = await anyio.connect_unix(self._socket_path)
            except OSError:
                await anyio.sleep(RECONNECT_S)
                continue
            await self._connected(MessageStream(stream, TO_GATEWAY))
            await anyio.sleep(RECONNECT_S)

    async def _connected(self, messages: MessageStream[ToGateway]) -> None:
        try:
            await messages.send(GatewayHello(version=PROTOCOL_VERSION, gateway=self._gateway))
            self._outbox.clear()
            self._owner.connected(self)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._write, messages)
                async for message in messages:
                    if isinstance(message, LinkRefused):
                        raise _refused(message)
                    self._owner.from_control(message)
                tasks.cancel_scope.cancel()
        except anyio.BrokenResourceError:
            return
        finally:
            self._owner.disconnected()
            await messages.aclose()

    async def _write(self, messages: MessageStream[ToGateway]) -> None:
        while True:
            await self._wake.wait()
            self._wake = anyio.Event()
            outbox, self._outbox = self._outbox, []
            dirty, self._load_dirty = self._load_dirty, False
            try:
                if dirty:
                    await self._send(messages, self._owner.load_report())
                for message in outbox:
                    await self._send(messages, message)
            except anyio.BrokenResourceError:
                return

    async def _send(self, messages: MessageStream[ToGateway], message: Message) -> None:
        """One message that cannot be encoded is lost; it must not end the gateway and all requests."""
        try:
            await messages.send(message)
        except ProtocolError as error:
            log.error("not told to control: %s", error)


def _refused(message: LinkRefused) -> SnowdropError:
    error = error_from_body(message.error)
    return error if isinstance(error, ProtocolError) else ProtocolError(str(error), where="control link")

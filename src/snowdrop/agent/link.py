"""The agent's connection to control: opened again whenever it breaks. Replicas live on without it."""

from __future__ import annotations

import logging

import anyio

from snowdrop.agent.node import Node
from snowdrop.domain.deployment import NodeRecord
from snowdrop.domain.errors import ProtocolError
from snowdrop.domain.replica import ReplicaReport
from snowdrop.wire.codec import PROTOCOL_VERSION, Message
from snowdrop.wire.control import TO_AGENT, AgentHello, ReplicaChanged, ToAgent, UsageBatch
from snowdrop.wire.stream import MessageStream

RECONNECT_S = 0.1
OUTBOX_MAX = 10_000
HELLO_REPLICAS_MAX = 2_000

log = logging.getLogger("snowdrop.agent")


class AgentLink:
    """Says hello with everything the node holds, then what changes; carries orders to the node."""

    def __init__(self, socket_path: str, api_socket: str, node: NodeRecord, incarnation: str) -> None:
        self._socket_path = socket_path
        self._api_socket = api_socket
        self._record = node
        self._incarnation = incarnation
        self._outbox: list[Message] = []
        self._usage_ready = True
        self._wake = anyio.Event()

    async def run(self, node: Node) -> None:
        """For ever; ends with ProtocolError if control refuses this agent."""
        node.changed = self._changed
        node.usage_ready = self._usage
        while True:
            try:
                stream = await anyio.connect_unix(self._socket_path)
            except OSError:
                await anyio.sleep(RECONNECT_S)
                continue
            await self._connected(MessageStream(stream, TO_AGENT), node)
            await anyio.sleep(RECONNECT_S)

    def _changed(self, report: ReplicaReport) -> None:
        # While control is away this may overflow: the hello then says everything again.
        del self._outbox[: max(0, len(self._outbox) - OUTBOX_MAX + 1)]
        self._outbox.append(ReplicaChanged(report=report))
        self._wake.set()

    def _usage(self) -> None:
        self._usage_ready = True
        self._wake.set()

    async def _connected(self, messages: MessageStream[ToAgent], node: Node) -> None:
        try:
            self._outbox.clear()
            await messages.send(
                AgentHello(
                    version=PROTOCOL_VERSION,
                    node=self._record,
                    incarnation=self._incarnation,
                    api_socket=self._api_socket,
                    replicas=node.reports()[-HELLO_REPLICAS_MAX:],
                )
            )
            self._usage()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._write, messages, node)
                while (message := await _next(messages)) is not None:
                    await node.handle(message)
                    self._usage()  # more may be pending than one batch held
                tasks.cancel_scope.cancel()
        except anyio.BrokenResourceError:
            return
        finally:
            await messages.aclose()

    async def _write(self, messages: MessageStream[ToAgent], node: Node) -> None:
        sent_sequence = 0
        while True:
            await self._wake.wait()
            self._wake = anyio.Event()
            outbox, self._outbox = self._outbox, []
            try:
                for message in outbox:
                    await messages.send(message)
                if self._usage_ready:
                    self._usage_ready = False
                    records = await node.usage_pending()
                    if records and records[-1].sequence > sent_sequence:
                        await messages.send(UsageBatch(records=records))
                        sent_sequence = records[-1].sequence
            except anyio.BrokenResourceError:
                return


async def _next(messages: MessageStream[ToAgent]) -> ToAgent | None:
    """What control sends next; None when it is gone, or when what it sends makes no sense."""
    try:
        return await messages.receive()
    except (anyio.EndOfStream, anyio.ClosedResourceError):
        return None
    except ProtocolError as error:
        log.error("control link: %s; connecting again", error)
        return None

"""Connections of agents and gateways: hello, version check, then messages both ways.

A peer that connects again under its old name replaces the old connection.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import anyio
import anyio.abc
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from snowdrop.control.asking import WaitQuestions
from snowdrop.control.loop import ControlLoop
from snowdrop.control.routes import deployment_route
from snowdrop.control.world import NodeEntry
from snowdrop.domain.errors import ProtocolError
from snowdrop.domain.ids import NodeId, ReceiptId, TenantId
from snowdrop.domain.receipt import CallerTimes
from snowdrop.tenancy.keys import authenticate
from snowdrop.wire.codec import Message, check_version
from snowdrop.wire.control import (
    FROM_PEER,
    AgentHello,
    CallerServed,
    CallerStored,
    FromAgent,
    FromGateway,
    GatewayHello,
    KeyGrant,
    LinkRefused,
    LoadReport,
    ReplicaChanged,
    ReplicaIdle,
    ReplicaUnreachable,
    Routes,
    UsageBatch,
    UsageStored,
    WaitsTold,
)
from snowdrop.wire.stream import MessageStream

HELLO_S_MAX = 5.0
OUTBOX_MAX = 50_000

log = logging.getLogger("snowdrop.control")
FromPeer = FromAgent | FromGateway


class Peers:
    """Accepts peers and gives the loop its way to reach them."""

    def __init__(self, loop: ControlLoop, *, settle_s_max: float) -> None:
        self._loop = loop
        self._settle_s_max = settle_s_max
        self._agents: dict[NodeId, MemoryObjectSendStream[Message]] = {}
        self._gateways: dict[str, MemoryObjectSendStream[Message]] = {}
        self.questions = WaitQuestions(lambda: set(self._gateways), self._to_gateways)
        self._settled = anyio.Event()
        self._keys: tuple[KeyGrant, ...] = ()
        self.caller_served: Callable[[ReceiptId, CallerTimes], None] = lambda _receipt, _caller: None
        loop.send_agent = self._to_agent
        loop.send_gateways = self._to_gateways

    async def load_keys(self) -> None:
        """Reads the API keys and tells gateways of them."""
        records = await self._loop.state.list_keys(None)
        self._keys = tuple(
            KeyGrant(key_sha256=r.key_sha256, tenant=r.tenant, priority_max=r.priority_max) for r in records
        )
        if self._settled.is_set():
            self._to_gateways(self._table())

    def tenant_of(self, key_sha256: str | None, *, required: bool) -> TenantId:
        """Whose key it is, as gateways find it. Raises UnauthorisedError."""
        return authenticate(key_sha256, {k.key_sha256: k.tenant for k in self._keys}, required=required)

    async def serve(self, listener: anyio.abc.SocketListener) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._settle)
            await listener.serve(self._serve_peer)

    async def _settle(self) -> None:
        """Gateways get no table before the agents of living replicas have spoken, or had time to.

        A table without the replicas of an agent that is only a moment late would take them out of service.
        """
        waiting = {entry.node for entry in self._loop.world.replicas.values()}
        with anyio.move_on_after(self._settle_s_max):
            while waiting - set(self._agents):  # noqa: ASYNC110 -- a few hundred looks, once in a life
                await anyio.sleep(0.01)
        for node in waiting - set(self._agents):
            log.warning("node %s has not come back; its replicas count as lost", node)
            self._loop.node_gone(node)
        self._settled.set()

    async def _serve_peer(self, stream: anyio.abc.ByteStream) -> None:
        messages: MessageStream[FromPeer] = MessageStream(stream, FROM_PEER)
        try:
            with anyio.fail_after(HELLO_S_MAX):
                hello = await messages.receive()
            if isinstance(hello, AgentHello):
                check_version(hello.version, peer=f"agent {hello.node.id}")
                await self._serve_agent(hello, messages)
            elif isinstance(hello, GatewayHello):
                check_version(hello.version, peer=f"gateway {hello.gateway}")
                await self._serve_gateway(hello, messages)
            else:
                raise ProtocolError("a peer must say hello first", where="hello")
        except ProtocolError as error:
            log.warning("refused a peer: %s", error)
            await _refuse(messages, error)
        except (TimeoutError, anyio.EndOfStream):
            log.warning("a peer connected and did not say hello")
        finally:
            await messages.aclose()

    # --- agents -------------------------------------------------------------------------------------------

    async def _serve_agent(self, hello: AgentHello, messages: MessageStream[FromPeer]) -> None:
        node, loop = NodeId(hello.node.id), self._loop
        send, outbox = anyio.create_memory_object_stream[Message](OUTBOX_MAX)
        _replace(self._agents.get(node))
        self._agents[node] = send
        loop.world.nodes[node] = NodeEntry(hello.node, hello.incarnation, hello.api_socket)
        log.info("node %s is here with %d replicas", node, len(hello.replicas))
        for report in hello.replicas:
            loop.heard_replica(report)
        told = {report.key.replica for report in hello.replicas}
        # An order that was on its way when the connection broke is sent again; its id makes it one start.
        for name, entry in list(loop.world.replicas.items()):
            if entry.node != node or name in told:
                continue
            if entry.report is None and entry.order is not None:
                told.add(name)
                order = await loop.completed(entry.order)
                if order is not None:
                    send.send_nowait(order)
            entry.drain_sent = False
        loop.node_gone(node, told)
        for key in loop.world.deployments:
            loop.poke(key)
        try:
            await self._exchange(messages, outbox, self._hear_agent)
        finally:
            send.close()
            outbox.close()
            if self._agents.get(node) is send:
                del self._agents[node]
                with anyio.move_on_after(self._settle_s_max):
                    while node not in self._agents:  # noqa: ASYNC110 -- bounded wait for its return
                        await anyio.sleep(0.05)
                if node not in self._agents:
                    log.warning("node %s is lost", node)
                    loop.world.nodes.pop(node, None)
                    loop.node_gone(node)

    def _hear_agent(self, message: FromPeer) -> None:
        if isinstance(message, ReplicaChanged):
            self._loop.heard_replica(message.report)
        elif isinstance(message, UsageBatch) and message.records:
            self._store_usage(message)

    def _store_usage(self, batch: UsageBatch) -> None:
        state, last = self._loop.state, batch.records[-1]

        async def write() -> None:
            await state.append_usage(batch.records)
            stored = UsageStored(node=last.node, source=last.source, sequence=last.sequence)
            self._to_agent(last.node, stored)

        self._loop.recorder.add(f"usage up to {last.sequence} of {last.node}", write)

    # --- gateways -----------------------------------------------------------------------------------------

    async def _serve_gateway(self, hello: GatewayHello, messages: MessageStream[FromPeer]) -> None:
        gateway = hello.gateway
        await self._settled.wait()
        send, outbox = anyio.create_memory_object_stream[Message](OUTBOX_MAX)
        _replace(self._gateways.get(gateway))
        self._gateways[gateway] = send
        self._loop.world.gateways[gateway] = {}
        self._loop.world.told.discard(gateway)
        send.send_nowait(self._table())
        log.info("gateway %s is here", gateway)
        try:
            await self._exchange(messages, outbox, lambda message: self._hear_gateway(gateway, message))
        finally:
            send.close()
            outbox.close()
            if self._gateways.get(gateway) is send:
                del self._gateways[gateway]
                self._loop.gateway_gone(gateway)
                log.warning("gateway %s is gone", gateway)

    def _hear_gateway(self, gateway: str, message: FromPeer) -> None:
        if isinstance(message, LoadReport):
            self._loop.heard_load(message)
        elif isinstance(message, ReplicaIdle):
            self._loop.heard_idle(gateway, message.replica)
        elif isinstance(message, ReplicaUnreachable):
            log.warning("gateway %s cannot reach %s: %s", gateway, message.replica, message.message)
        elif isinstance(message, WaitsTold):
            self.questions.heard(gateway, message)
        elif isinstance(message, CallerServed):
            self.caller_served(message.receipt, message.caller)
            self._store_caller(message.receipt, message.caller)

    def _store_caller(self, receipt: ReceiptId, caller: CallerTimes) -> None:
        state = self._loop.state

        async def write() -> None:
            if await state.set_caller(receipt, caller):
                self._to_gateways(CallerStored(receipt=receipt))

        self._loop.recorder.add(f"caller of {receipt}", write)

    def _table(self) -> Routes:
        world = self._loop.world
        routes = (deployment_route(world, key) for key in world.deployments)
        return Routes(
            generation=self._loop.generation,
            deployments=tuple(route for route in routes if route is not None),
            keys=self._keys,
        )

    # --- both ---------------------------------------------------------------------------------------------

    async def _exchange(
        self,
        messages: MessageStream[FromPeer],
        outbox: MemoryObjectReceiveStream[Message],
        hear: Callable[[FromPeer], None],
    ) -> None:
        broken: ProtocolError | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_write, messages, outbox)
            try:
                async for message in messages:
                    hear(message)
            except ProtocolError as error:
                broken = error  # raised outside of the group, which would wrap it past those who handle it
            tasks.cancel_scope.cancel()
        if broken is not None:
            raise broken

    def _to_agent(self, node: NodeId, message: Message) -> None:
        send = self._agents.get(node)
        if send is not None:
            _put(send, message)

    def _to_gateways(self, message: Message) -> None:
        for send in self._gateways.values():
            _put(send, message)


def _replace(old: MemoryObjectSendStream[Message] | None) -> None:
    """Ends an older connection of the same peer: its writer runs dry and closes it."""
    if old is not None:
        old.close()


def _put(send: MemoryObjectSendStream[Message], message: Message) -> None:
    try:
        send.send_nowait(message)
    except anyio.WouldBlock:
        # A peer that takes nothing: cutting it off makes it say hello again and hear everything afresh.
        log.warning("a peer does not read; its connection is closed")
        send.close()
    except (anyio.BrokenResourceError, anyio.ClosedResourceError):
        return


async def _write(messages: MessageStream[FromPeer], outbox: MemoryObjectReceiveStream[Message]) -> None:
    try:
        async for message in outbox:
            await messages.send(message)
    except anyio.BrokenResourceError:
        return
    await messages.aclose()


async def _refuse(messages: MessageStream[FromPeer], error: ProtocolError) -> None:
    try:
        await messages.send(LinkRefused(error=error.body()))
    except anyio.BrokenResourceError:
        return

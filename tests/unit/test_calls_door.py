"""The way of calls between services: the agent's introduction, the gateway's door, the replica's client."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import anyio
import anyio.to_thread
import msgspec
import pytest
from multidict import CIMultiDict

from e2e_platform import short_folder
from platform_helpers import replica_key, revision
from snowdrop.agent.calls import CallDoor as AgentDoor
from snowdrop.domain.calling import LEASE_HEADER, OutgoingCall, Transport
from snowdrop.domain.errors import (
    ErrorBody,
    InvalidInputError,
    NotFoundError,
    PlatformDownError,
    ReplicaDiedError,
    SnowdropError,
    TimedOutError,
)
from snowdrop.gateway.call import Call, Sink
from snowdrop.gateway.calls.door import CONNECTIONS_MAX, serving_calls
from snowdrop.gateway.carrier import Carrier
from snowdrop.replica import callclient
from snowdrop.replica.callclient import address_transport, gateway_transport
from snowdrop.wire.control import StartReplica
from snowdrop.wire.replica import CallOpened

pytestmark = pytest.mark.anyio
ORDER = StartReplica(
    key=replica_key("rep-1", name="rag"),
    revision=revision(name="rag", calls=("embed",)),
    ordered_unix_ns=1,
)


class FakeCarrier:
    """Answers every call with its own words; `hold` keeps them waiting."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.hold: anyio.Event | None = None
        self.cancelled = anyio.Event()

    async def carry(self, call: Call, sink: Sink) -> None:
        self.calls.append(call)
        if self.hold is not None:
            try:
                await self.hold.wait()
            except anyio.get_cancelled_exc_class():
                self.cancelled.set()
                raise
        assert call.body.whole is not None
        await sink.whole(200, CIMultiDict({"content-type": "text/plain"}), call.body.whole)


@pytest.fixture(name="carrier")
def _carrier() -> FakeCarrier:
    return FakeCarrier()


@asynccontextmanager
async def door(carrier: FakeCarrier, path: Path) -> AsyncIterator[None]:
    async with serving_calls(cast("Carrier", carrier), path, request_bytes_max=1 << 20, shutdown_s_max=1.0):
        yield


@asynccontextmanager
async def calling(folder: Path) -> AsyncIterator[Transport]:
    agent = AgentDoor(folder, ORDER)

    async def connection() -> int:
        return (await agent.open()).detach()

    async with gateway_transport(connection) as transport:
        yield transport


def outgoing(target: str = "embed", **more: object) -> OutgoingCall:
    call = OutgoingCall(
        deployment=target, path="/x?y=1", method="POST", headers={LEASE_HEADER: "7"}, body=b"hello"
    )
    return msgspec.structs.replace(call, **more)


async def text(transport: Transport, call: OutgoingCall) -> tuple[int, bytes]:
    async with transport.send(call) as reply:
        return reply.status, await reply.read(1 << 20)


async def test_a_call_is_carried_as_its_replica_whatever_it_says(carrier: FakeCarrier) -> None:
    with short_folder() as folder:
        async with door(carrier, folder / "w.sock"), calling(folder) as transport:
            claimed = {
                LEASE_HEADER: "7",
                "x-snowdrop-tenant": "other",
                "authorization": "Bearer x",
                "x-request-id": "r",
            }
            assert await text(transport, outgoing(headers=claimed)) == (200, b"hello")
    (call,) = carrier.calls
    assert (call.caller.tenant, call.caller.replica, call.caller.label) == ("default", "rep-1", "call:rag")
    assert (call.caller.key_sha256, call.caller.parent_lease) == (None, 7)
    assert (call.deployment, call.target, call.request_id, call.kind) == ("embed", "/x?y=1", "r", "call")
    assert "authorization" not in call.headers


async def test_only_what_is_declared_may_be_called(carrier: FakeCarrier) -> None:
    with short_folder() as folder:
        async with door(carrier, folder / "w.sock"), calling(folder) as transport:
            status, body = await text(transport, outgoing("secret"))
    assert status == 403
    assert msgspec.json.decode(body)["error"]["kind"] == "forbidden"
    assert not carrier.calls


async def test_a_connection_has_one_caller_for_good(carrier: FakeCarrier) -> None:
    """Neither a stranger on the socket nor a replica on its connection can say who it is."""
    with short_folder() as folder:
        async with door(carrier, folder / "w.sock"):
            other = msgspec.structs.replace(ORDER, key=replica_key("rep-2", name="other"))
            stolen = await AgentDoor(folder, ORDER).open()
            body = msgspec.json.encode(AgentDoor(folder, other)._introduction)
            again = b"POST /-/caller HTTP/1.1\r\nHost: g\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            assert b" 409 " in await raw(stolen, again)
            nobody = socket.socket(socket.AF_UNIX)
            nobody.connect(str(folder / "w.sock"))
            assert b" 403 " in await raw(nobody, b"POST /embed/x HTTP/1.1\r\nHost: g\r\nContent-Length: 0\r\n\r\n")
    assert not carrier.calls


async def raw(sock: socket.socket, request: bytes) -> bytes:
    with sock:
        sock.setblocking(True)
        await anyio.to_thread.run_sync(sock.sendall, request)
        return await anyio.to_thread.run_sync(sock.recv, 4096)


async def test_the_socket_is_the_platforms_own(carrier: FakeCarrier) -> None:
    with short_folder() as folder:
        async with door(carrier, folder / "w.sock"):
            assert (folder / "w.sock").stat().st_mode & 0o777 == 0o600
        assert not (folder / "w.sock").exists()


async def test_a_call_waits_for_a_gateway_that_is_being_started(carrier: FakeCarrier) -> None:
    with short_folder() as folder:
        stale = socket.socket(socket.AF_UNIX)
        stale.bind(str(folder / "killed.sock"))  # what a killed worker leaves
        stale.close()
        got: list[tuple[int, bytes]] = []
        async with calling(folder) as transport, anyio.create_task_group() as tasks:

            async def call() -> None:
                got.append(await text(transport, outgoing()))

            tasks.start_soon(call)
            await anyio.wait_all_tasks_blocked()
            async with door(carrier, folder / "w.sock"):
                with anyio.fail_after(10):
                    while not got:
                        await anyio.sleep(0.01)
    assert got == [(200, b"hello")]


async def test_without_a_gateway_it_ends_within_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callclient, "RECONNECT_S_MAX", 0.1)
    with short_folder() as folder:
        async with calling(folder) as transport:
            with pytest.raises(PlatformDownError, match="no gateway takes calls"):
                await text(transport, outgoing())
            with pytest.raises(PlatformDownError):
                await text(transport, outgoing(timeout_s=0.01))


async def test_a_call_under_way_is_not_made_again_when_its_connection_breaks(carrier: FakeCarrier) -> None:
    carrier.hold = anyio.Event()
    with short_folder() as folder:
        async with calling(folder) as transport, anyio.create_task_group() as tasks:
            failed: list[SnowdropError] = []

            async def call() -> None:
                with pytest.raises(ReplicaDiedError) as raised:
                    await text(transport, outgoing())
                failed.append(raised.value)

            async with door(carrier, folder / "w.sock"):
                tasks.start_soon(call)
                await anyio.wait_all_tasks_blocked()
                while not carrier.calls:
                    await anyio.sleep(0.01)
    assert len(carrier.calls) == 1
    assert "not made again" in str(failed[0])


async def test_who_stops_waiting_cancels_the_call(carrier: FakeCarrier) -> None:
    carrier.hold = anyio.Event()
    with short_folder() as folder:
        async with door(carrier, folder / "w.sock"), calling(folder) as transport:
            with pytest.raises(TimedOutError):
                await text(transport, outgoing(timeout_s=0.2))
            with anyio.fail_after(5):
                await carrier.cancelled.wait()


async def test_connections_are_used_again_and_bounded(
    carrier: FakeCarrier, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = 0
    with short_folder() as folder:
        agent = AgentDoor(folder, ORDER)

        async def connection() -> int:
            nonlocal opened
            opened += 1
            return (await agent.open()).detach()

        async with door(carrier, folder / "w.sock"):
            async with gateway_transport(connection) as transport:
                for _ in range(3):
                    await text(transport, outgoing())
            assert opened == 1
            monkeypatch.setattr("snowdrop.gateway.calls.door.CONNECTIONS_MAX", 2)
            assert CONNECTIONS_MAX > 2
            with await agent.open(), await agent.open(), pytest.raises(PlatformDownError):
                await agent.open()


async def test_the_agent_tells_the_replica_why_there_is_none() -> None:
    told: list[tuple[CallOpened, tuple[int, ...]]] = []

    async def tell(message: CallOpened, fds: tuple[int, ...]) -> None:
        told.append((message, fds))

    with short_folder() as folder:
        await AgentDoor(folder, ORDER).answer(3, tell)
    ((message, fds),) = told
    assert (message.number, fds) == (3, ())
    assert isinstance(message.error, ErrorBody)
    assert message.error.kind == "platform_down"


async def test_addresses_stand_in_for_the_platform() -> None:
    async with address_transport({"embed": "http://127.0.0.1:1/embed"}, "sd_key") as transport:
        with pytest.raises(NotFoundError, match="--ref other="):
            await text(transport, outgoing("other"))
    from snowdrop.cli.dev import read_refs  # noqa: PLC0415

    assert read_refs(["embed=http://h:1/embed"]) == {"embed": "http://h:1/embed"}
    with pytest.raises(InvalidInputError, match="NAME=URL"):
        read_refs(["embed"])

"""Codec, frames and packets: what is sent arrives, and nothing broken gets through."""

import os
import socket
import struct

import anyio
import anyio.abc
import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as st

from descriptors import open_descriptors
from platform_helpers import report, revision, route, usage
from snowdrop.domain.errors import ErrorBody, ProtocolError
from snowdrop.domain.ids import DeploymentName
from snowdrop.wire import packet
from snowdrop.wire.codec import FRAME_BYTES_MAX, PROTOCOL_VERSION, Message, check_version
from snowdrop.wire.control import (
    FROM_PEER,
    TO_AGENT,
    TO_GATEWAY,
    LinkRefused,
    ReplicaChanged,
    Routes,
    StartReplica,
    UsageBatch,
)
from snowdrop.wire.packet import PACKET_BYTES_MAX, PACKET_FDS_MAX, PacketChannel, packet_pair
from snowdrop.wire.replica import TO_REPLICA, DirectoryReady, Drain
from snowdrop.wire.slots import FROM_WORKER, TO_WORKER, Acquire, Denied, ReleaseLease, WorkerHello
from snowdrop.wire.stream import MessageStream

pytestmark = pytest.mark.anyio
text = st.text(max_size=50)
numbers = st.integers(-(2**63), 2**63 - 1)
errors = st.builds(ErrorBody, kind=text, message=text, where=text, retry_after_s=st.none() | st.floats(0, 1e6))


@given(
    st.one_of(
        st.builds(
            Acquire,
            ticket=numbers,
            key_sha256=st.none() | text,
            deployment=text.map(DeploymentName),
            arrived_unix_ns=numbers,
        ),
        st.builds(ReleaseLease, lease=numbers),
        st.builds(WorkerHello, version=numbers, worker=text),
    )
)
def test_a_worker_s_messages_come_back_as_they_were(message: Message) -> None:
    assert FROM_WORKER.decode(FROM_WORKER.encode(message)) == message


@given(numbers, errors)
def test_errors_come_back_as_they_were(ticket: int, error: ErrorBody) -> None:
    assert TO_WORKER.decode(TO_WORKER.encode(Denied(ticket=ticket, error=error))) == Denied(
        ticket=ticket, error=error
    )


def test_rich_messages_come_back_as_they_were() -> None:
    start = StartReplica(key=report().key, revision=revision(env={"A": "ü"}), ordered_unix_ns=1)
    assert TO_AGENT.decode(TO_AGENT.encode(start)) == start
    changed = ReplicaChanged(report=report())
    assert FROM_PEER.decode(FROM_PEER.encode(changed)) == changed
    batch = UsageBatch(records=(usage(1), usage(2)))
    assert FROM_PEER.decode(FROM_PEER.encode(batch)) == batch
    routes = Routes(generation=1, deployments=(route(),))
    assert TO_GATEWAY.decode(TO_GATEWAY.encode(routes)) == routes


@given(st.binary(max_size=100))
def test_noise_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        FROM_WORKER.decode(data)


def test_a_message_of_another_conversation_is_refused() -> None:
    with pytest.raises(ProtocolError):
        TO_WORKER.decode(FROM_WORKER.encode(ReleaseLease(lease=1)))


def test_another_version_is_refused_with_both_numbers() -> None:
    check_version(PROTOCOL_VERSION, peer="x")
    with pytest.raises(ProtocolError, match=f"agent n speaks protocol 99, this process {PROTOCOL_VERSION}"):
        check_version(99, peer="agent n")


def test_a_message_above_the_bound_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="LinkRefused"):
        TO_AGENT.encode(LinkRefused(error=ErrorBody(kind="x", message="a" * FRAME_BYTES_MAX)))


# --- frames ---------------------------------------------------------------------------------------------------


async def streams() -> tuple[anyio.abc.SocketStream, MessageStream[object]]:
    left, right = socket.socketpair()
    raw = await anyio.abc.UNIXSocketStream.from_socket(left)
    return raw, MessageStream(await anyio.abc.UNIXSocketStream.from_socket(right), FROM_WORKER)


@pytest.mark.parametrize("cut", [1, 3, 4, 6])
async def test_a_cut_frame_ends_the_stream(cut: int) -> None:
    raw, messages = await streams()
    data = FROM_WORKER.encode(ReleaseLease(lease=1))
    await raw.send((struct.pack("<I", len(data)) + data)[:cut])
    await raw.aclose()
    with pytest.raises(anyio.EndOfStream):
        await messages.receive()
    await messages.aclose()


async def test_frames_arrive_in_order_however_they_are_cut() -> None:
    raw, messages = await streams()
    frames = b""
    for lease in range(5):
        data = FROM_WORKER.encode(ReleaseLease(lease=lease))
        frames += struct.pack("<I", len(data)) + data
    async with anyio.create_task_group() as tasks:

        async def drip() -> None:
            for byte in frames:
                await raw.send(bytes([byte]))
            await raw.aclose()

        tasks.start_soon(drip)
        assert [m async for m in messages] == [ReleaseLease(lease=n) for n in range(5)]
    await messages.aclose()


async def test_a_frame_above_the_bound_is_refused_before_it_is_read() -> None:
    raw, messages = await streams()
    await raw.send(struct.pack("<I", FRAME_BYTES_MAX + 1))
    with pytest.raises(ProtocolError, match=str(FRAME_BYTES_MAX + 1)):
        await messages.receive()
    await raw.aclose()
    await messages.aclose()


async def test_a_peer_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snowdrop.wire.stream.SEND_S_MAX", 0.05)
    raw, messages = await streams()
    big = Acquire(ticket=1, key_sha256="x" * (8 << 20), deployment=DeploymentName("d"), arrived_unix_ns=1)
    with pytest.raises(anyio.BrokenResourceError):
        await messages.send(big)
    with pytest.raises((anyio.BrokenResourceError, anyio.ClosedResourceError)):
        await messages.send(ReleaseLease(lease=1))
    await raw.aclose()


# --- packets --------------------------------------------------------------------------------------------------


def open_fds() -> int:
    return len(open_descriptors())


@pytest.mark.parametrize("count", [0, 1, PACKET_FDS_MAX])
def test_descriptors_travel_and_none_is_left(count: int) -> None:
    before = open_fds()
    left, right = packet_pair()
    sender, receiver = PacketChannel(left, TO_REPLICA), PacketChannel(right, TO_REPLICA)
    given_fds = tuple(os.memfd_create(f"area-{n}") for n in range(count))
    for number, fd in enumerate(given_fds):
        os.write(fd, bytes([number]))
    sender.send_blocking(Drain(drain_s_max=1.0), given_fds)
    message, fds = receiver.receive_blocking()
    assert message == Drain(drain_s_max=1.0)
    assert [os.pread(fd, 1, 0) for fd in fds] == [bytes([n]) for n in range(count)]
    for fd in (*given_fds, *fds):
        os.close(fd)
    sender.close()
    with pytest.raises(EOFError):
        receiver.receive_blocking()
    receiver.close()
    assert open_fds() <= before


def test_packets_above_a_bound_are_not_sent() -> None:
    left, right = packet_pair()
    channel = PacketChannel(left, TO_REPLICA)
    with pytest.raises(ProtocolError, match="descriptors"):
        channel.send_blocking(Drain(drain_s_max=1.0), (0,) * (PACKET_FDS_MAX + 1))
    with pytest.raises(ProtocolError, match="bytes"):
        channel.send_blocking(DirectoryReady(model="m" * PACKET_BYTES_MAX))
    channel.close()
    right.close()


async def test_a_packet_that_was_cut_short_leaks_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_fds()
    left, right = packet_pair()
    sender, receiver = PacketChannel(left, TO_REPLICA), PacketChannel(right, TO_REPLICA)
    monkeypatch.setattr(packet, "PACKET_FDS_MAX", 64)
    fd = os.memfd_create("area")
    sender.send_blocking(DirectoryReady(model="m" * 500), (fd, fd, fd))
    monkeypatch.setattr(packet, "PACKET_BYTES_MAX", 100)
    with pytest.raises(ProtocolError, match="cut short"):
        await receiver.receive()
    os.close(fd)
    sender.close()
    receiver.close()
    await anyio.lowlevel.checkpoint()
    assert open_fds() <= before


def test_an_undecodable_packet_leaks_no_descriptor() -> None:
    before = open_fds()
    left, right = packet_pair()
    fd = os.memfd_create("area")
    socket.send_fds(left, [b"noise"], [fd])
    receiver = PacketChannel(right, TO_REPLICA)
    with pytest.raises(ProtocolError):
        receiver.receive_blocking()
    os.close(fd)
    left.close()
    receiver.close()
    assert open_fds() <= before

"""Bytes that HTTP lets through and that are no text: they must not end or confuse anything behind the edge."""

import time
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest
from aiohttp import web
from test_gateway_edge import raw_client, read_until
from test_gateway_relay import Bench, bench

from platform_helpers import call, replica_route, route
from snowdrop.domain.errors import ProtocolError
from snowdrop.domain.ids import DeploymentName, ReceiptId, ReplicaId
from snowdrop.domain.receipt import CallerTimes
from snowdrop.domain.trace import TraceContext, begin_trace
from snowdrop.gateway.broker import RemoteBroker
from snowdrop.gateway.call import WaitOptions
from snowdrop.gateway.link import ControlLink
from snowdrop.gateway.owner import Owner
from snowdrop.gateway.queue import QueueCore
from snowdrop.telemetry.logs import request_lines
from snowdrop.telemetry.observing import RequestDone
from snowdrop.wire.codec import Codec
from snowdrop.wire.control import CallerServed, GatewayHello, LoadReport, ReplicaIdle, Routes
from snowdrop.wire.stream import MessageStream

pytestmark = pytest.mark.anyio
__all__ = ["bench"]
WAIT_S_MAX = 10.0
NO_TEXT = "\udcff"
"""What a byte becomes that is no UTF-8, as aiohttp reads headers."""
FROM_GATEWAY: Codec[GatewayHello | LoadReport | CallerServed | ReplicaIdle] = Codec(
    GatewayHello | LoadReport | CallerServed | ReplicaIdle
)


async def status_of(bench: Bench, *lines: bytes) -> int:
    """The status of a request with these header lines."""
    async with await raw_client(bench) as stream:
        head = b"POST /embed/x HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\nconnection: close\r\n"
        await stream.send(head + b"".join(line + b"\r\n" for line in lines) + b"\r\n")
        return int((await read_until(stream, b"\r\n")).split()[1])


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"x-request-id: \xff\xfe", 200),
        (b"x-request-id: a\tb", 200),
        (b"tracestate: \xff", 200),
        (b"snowdrop-caller: J\xc3\xbcrgen", 200),
        (b"snowdrop-caller: \xff", 422),
        (b"snowdrop-revision: \xff", 422),
        (b"snowdrop-priority: 99999999999999999999", 422),
        (b"snowdrop-priority: -99999999999999999999", 422),
        (b"snowdrop-priority: 1_0", 422),
        (b"snowdrop-priority: -2", 200),
        (b"authorization: Bearer \xff", 401),
    ],
)
async def test_what_is_no_text_is_refused_or_left_out_at_the_edge(bench: Bench, line: bytes, status: int) -> None:
    async def ok(_request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async with bench.replica(ok):
        assert await status_of(bench, b"traceparent: 00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-01", line) == status
        for request in bench.seen:
            request.headers["x-request-id"].encode("ascii")
            assert request.headers["x-request-id"].isprintable()


def test_a_tracestate_that_is_no_ascii_is_not_passed_on() -> None:
    class Bits:
        def getrandbits(self, k: int, /) -> int:
            return 1

        def random(self) -> float:
            return 0.5

    parent = "00-" + "1" * 32 + "-" + "2" * 16 + "-01"
    assert begin_trace(parent, NO_TEXT, sample_ratio=0.0, rng=Bits()).state == ""
    assert begin_trace(parent, "a=b", sample_ratio=0.0, rng=Bits()).state == "a=b"


@pytest.fixture
async def control(tmp_path: Path) -> AsyncIterator[tuple[ControlLink, MessageStream[object]]]:
    """A gateway's link, and control's end of it."""
    core = QueueCore(keys_required=False)
    owner = Owner(core, "gw")
    path = str(tmp_path / "link.sock")
    heard: list[anyio.abc.SocketStream] = []
    met = anyio.Event()

    async def serve(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            heard.append(stream)
            met.set()
            await anyio.sleep_forever()

    link = ControlLink(path, "gw", owner)
    async with await anyio.create_unix_listener(path) as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        tasks.start_soon(link.run)
        with anyio.fail_after(WAIT_S_MAX):
            await met.wait()
        yield link, MessageStream(heard[0], FROM_GATEWAY)  # type: ignore[arg-type]
        tasks.cancel_scope.cancel()


async def test_a_message_that_has_no_encoding_does_not_end_the_gateway(
    control: tuple[ControlLink, MessageStream[object]],
) -> None:
    """The link is a task of the gateway: an error that leaves it would cut every request in flight."""
    link, theirs = control
    with anyio.fail_after(WAIT_S_MAX):
        assert isinstance(await theirs.receive(), GatewayHello)
        times = CallerTimes(
            request_id=NO_TEXT, arrived_unix_ns=1, admitted_unix_ns=1, first_byte_unix_ns=time.time_ns()
        )
        link.send_soon(CallerServed(receipt=ReceiptId("rcp-1"), caller=times))
        link.send_soon(ReplicaIdle(gateway="gw", replica=ReplicaId("rep-1")))
        while not isinstance(message := await theirs.receive(), ReplicaIdle):
            pass
    assert message.replica == "rep-1"


async def test_a_call_that_has_no_encoding_leaves_nothing_behind(tmp_path: Path) -> None:
    core = QueueCore(keys_required=False)
    owner = Owner(core, "gw")
    owner.from_control(Routes(generation=1, deployments=(route(replica_route(concurrency=1)),)))
    path = str(tmp_path / "owner.sock")
    broker = RemoteBroker("w")
    async with await anyio.create_unix_listener(path) as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(owner.serve_workers, listener)
        stream = await anyio.connect_unix(path)
        await tasks.start(lambda *, task_status: broker.run(stream, task_status=task_status))
        for odd in (call(request_id=NO_TEXT), call(wait=WaitOptions(priority=1 << 70))):
            with pytest.raises(ProtocolError):
                await broker.acquire(odd)
        assert not broker._tickets._waiting
        with anyio.fail_after(WAIT_S_MAX):
            broker.release(await broker.acquire(call()))
        tasks.cancel_scope.cancel()


def test_a_name_with_line_breaks_makes_no_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    done = RequestDone(
        request_id="req-1",
        trace=TraceContext(trace_id="1" * 32, span_id="2" * 16),
        deployment=DeploymentName("a\n2026-01-01 FAKE \x1b[31m"),
        status=404,
        arrived_unix_ns=1,
        ended_unix_ns=2,
        error_kind="not_found",
    )
    request_lines("errors")(done)
    (record,) = caplog.records
    assert record.getMessage().isprintable()
    assert "FAKE" in record.getMessage()

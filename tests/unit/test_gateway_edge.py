"""The edge as a proxy must be: bodies held back, heads right, servers replaced, certificates that change."""

from __future__ import annotations

import asyncio
import gzip
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from unittest import mock

import anyio
import anyio.abc
import pytest
import trustme
from aiohttp import StreamReader, web
from aiohttp.test_utils import make_mocked_request
from cryptography.hazmat.primitives import serialization
from test_gateway_relay import Bench, bench, read_head

from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.settings import GatewaySettings
from snowdrop.gateway.app import build_app
from snowdrop.gateway.bodies import IncomingBody
from snowdrop.gateway.carrier import Carrier
from snowdrop.gateway.edge.server import EdgeServer, Listening
from snowdrop.gateway.edge.tls import Certificate, open_certificate
from snowdrop.gateway.relay import Relay
from snowdrop.gateway.upstream.pool import Upstreams

pytestmark = pytest.mark.anyio
__all__ = ["bench"]
WAIT_S_MAX = 10.0
KERNEL_BYTES_MAX = 4 << 20


async def raw_client(bench: Bench) -> anyio.abc.SocketStream:
    return await anyio.connect_unix(bench.folder / "gw.sock")


async def read_until(stream: anyio.abc.SocketStream, end: bytes) -> bytes:
    data = b""
    with anyio.fail_after(WAIT_S_MAX):
        while end not in data:
            data += await stream.receive()
    return data


async def test_a_client_that_reads_slowly_holds_the_replica_back(bench: Bench) -> None:
    total, sent = 64 << 20, 0

    async def serve(stream: anyio.abc.SocketStream) -> None:
        nonlocal sent
        await read_head(stream)
        await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        while sent < total:
            await stream.send(bytes(1 << 16))
            sent += 1 << 16

    async with bench.raw_replica(serve), await raw_client(bench) as client:
        await client.send(b"GET /e/x HTTP/1.1\r\nHost: gw\r\n\r\n")
        await client.receive(10)
        before = -1
        with anyio.fail_after(WAIT_S_MAX):
            while sent != before or not sent:
                before = sent
                await anyio.sleep(0.02)
        assert sent < KERNEL_BYTES_MAX


async def test_who_expects_100_is_told_to_go_on(bench: Bench) -> None:
    async def echo(request: web.Request) -> web.Response:
        assert "expect" not in request.headers
        return web.Response(body=await request.read())

    async with bench.replica(echo), await raw_client(bench) as client:
        head = b"POST /e/x HTTP/1.1\r\nHost: gw\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n"
        await client.send(head)
        assert (await read_until(client, b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        await client.send(b"abc")
        assert (await read_until(client, b"abc")).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_compressed_body_goes_up_as_it_is(bench: Bench, is_chunked: bool) -> None:
    """Unpacked on the way it would be cut at the length of what was packed, and not be what its headers say."""
    packed = gzip.compress(b"a" * 100_000)
    got: list[tuple[str, bytes]] = []

    async def take(request: web.Request) -> web.Response:
        # The replica of this test is aiohttp's server, which unpacks by itself.
        got.append((request.headers.get("content-encoding", ""), await request.read()))
        return web.Response()

    async def pieces() -> AsyncIterator[bytes]:
        yield packed[:30]
        yield packed[30:]

    async with bench.replica(take):
        data = pieces() if is_chunked else packed
        answer = await bench.client.post("/e/x", data=data, headers={"content-encoding": "gzip"})
        assert answer.status == 200
    assert got == [("gzip", b"a" * 100_000)]


async def test_a_body_that_says_it_is_compressed_is_the_replicas_to_judge(bench: Bench) -> None:
    raw: list[bytes] = []

    async def serve(stream: anyio.abc.SocketStream) -> None:
        raw.append(await read_until(stream, b"no gzip"))
        await stream.send(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    async with bench.raw_replica(serve):
        answer = await bench.client.post("/e/x", data=b"no gzip", headers={"content-encoding": "gzip"})
        assert answer.status == 200
    assert b"content-length: 7\r\n" in raw[0].lower()


@pytest.mark.parametrize("is_late", [False, True])
async def test_a_body_that_breaks_off_is_its_senders_fault(is_late: bool) -> None:
    """As the replica's it would count against a revision, and send a rollout back."""
    content = StreamReader(mock.Mock(), 1 << 16, loop=asyncio.get_running_loop())
    request = make_mocked_request("POST", "/e/x", {"transfer-encoding": "chunked"}, payload=content)
    if is_late:
        content.feed_data(b"a")
        body = await IncomingBody.begin(request, 1 << 20)
        stream = body.stream()
        assert await anext(stream) == b"a"
    content.set_exception(web.RequestPayloadError("400, bad chunk"))
    with pytest.raises(InvalidInputError, match="bad chunk"):
        await (anext(stream) if is_late else IncomingBody.begin(request, 1 << 20))
    if is_late:
        assert isinstance(body.refused, InvalidInputError)


async def test_less_than_was_announced_is_no_whole_body() -> None:
    content = StreamReader(mock.Mock(), 1 << 16, loop=asyncio.get_running_loop())
    request = make_mocked_request("POST", "/e/x", {"content-length": "100000"}, payload=content)
    content.feed_data(b"a")
    content.feed_eof()
    with pytest.raises(InvalidInputError):
        await IncomingBody.begin(request, 1 << 20)


async def test_trailers_are_dropped_and_heads_keep_their_length(bench: Bench) -> None:
    seen: list[bytes] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(await request.read())
        return web.Response(body=b"four")

    async with bench.replica(answer), await raw_client(bench) as client:
        chunked = b"POST /e/x HTTP/1.1\r\nHost: gw\r\nTransfer-Encoding: chunked\r\nTrailer: x-sum\r\n\r\n"
        await client.send(chunked + b"3\r\nabc\r\n0\r\nx-sum: 1\r\n\r\n")
        assert (await read_until(client, b"four")).startswith(b"HTTP/1.1 200 ")
        # The same connection, still in step.
        await client.send(b"HEAD /e/x HTTP/1.1\r\nHost: gw\r\n\r\n")
        head = await read_until(client, b"\r\n\r\n")
        assert b"content-length: 4" in head.lower()
        await client.send(b"GET /e/x HTTP/1.1\r\nHost: gw\r\n\r\n")
        assert (await read_until(client, b"four")).startswith(b"HTTP/1.1 200 ")
    assert seen == [b"abc", b"", b""]


async def test_two_lengths_are_no_request(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """What two parsers may read in two ways is how a request is smuggled past a proxy."""
    heads = (
        b"Content-Length: 3\r\nContent-Length: 4\r\n",
        b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
    )
    for head in heads:
        async with await raw_client(bench) as client:
            await client.send(b"POST /e/x HTTP/1.1\r\nHost: gw\r\n" + head + b"\r\n0\r\n\r\n")
            assert b" 400 " in (await read_until(client, b"\r\n")).partition(b"\r\n")[0], head
    assert not bench.broker.asked
    assert not caplog.records, "strangers can't fill the log"


async def test_what_stands_between_is_said(bench: Bench) -> None:
    async def hello(_request: web.Request) -> web.Response:
        return web.Response(text="hello")

    headers = {"x-forwarded-for": "10.0.0.7", "tracestate": "a=1"}
    async with bench.replica(hello), bench.client.get("/e/x", headers=headers):
        pass
    (request,) = bench.seen
    assert request.headers["x-forwarded-for"] == "10.0.0.7", "over a unix socket there is no address to add"
    assert request.headers["x-forwarded-proto"] == "http"
    assert request.headers["traceparent"].startswith("00-")
    assert "tracestate" not in request.headers, "without a parent it means nothing"


async def test_an_upload_goes_on_while_its_server_is_replaced(tmp_path: Path) -> None:
    """aiohttp's own shutdown drops what clients send from then on."""
    bench = Bench(tmp_path)
    upstreams = Upstreams()
    relay = Relay(Carrier(bench.broker, upstreams), request_bytes_max=1 << 30)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "gw.sock"))
    servers = [
        EdgeServer(build_app(relay, ready=lambda: True), [Listening(socket=listener)], shutdown_s_max=5.0)
        for _ in range(2)
    ]

    async def count(request: web.Request) -> web.Response:
        return web.Response(text=str(len(await request.read())))

    with listener, anyio.fail_after(WAIT_S_MAX):
        async with bench.replica(count), anyio.create_task_group() as tasks:
            await servers[0].start()
            async with await raw_client(bench) as client:
                await client.send(b"POST /e/x HTTP/1.1\r\nHost: gw\r\nContent-Length: 1000000\r\n\r\n")
                await client.send(bytes(400_000))
                while not bench.broker.out:
                    await anyio.sleep(0.001)
                await servers[1].start()
                tasks.start_soon(lambda: servers[0].drain(drain_s_max=5.0))
                await anyio.sleep(0.1)
                async with await raw_client(bench) as other:
                    await other.send(b"GET /healthz HTTP/1.1\r\nHost: gw\r\n\r\n")
                    await read_until(other, b"true")
                await client.send(bytes(600_000))
                await read_until(client, b"1000000")
            await servers[1].stop()
    upstreams.close()
    await anyio.sleep(0)


async def test_a_client_that_keeps_its_connection_does_not_hold_up_a_stop(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    upstreams = Upstreams()
    relay = Relay(Carrier(bench.broker, upstreams), request_bytes_max=1 << 20)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "gw.sock"))
    still_open: list[int] = []
    server = EdgeServer(
        build_app(relay, ready=lambda: True),
        [Listening(socket=listener)],
        shutdown_s_max=5.0,
        cut=lambda: still_open.append(len(server._runner.server.connections)),
    )
    with listener, anyio.fail_after(WAIT_S_MAX):
        await server.start()
        async with await raw_client(bench) as client:
            await client.send(b"GET /healthz HTTP/1.1\r\nHost: gw\r\n\r\n")
            await read_until(client, b"true")
            await server.stop()
            with pytest.raises(anyio.EndOfStream):
                await client.receive()
    assert still_open == [0], "when the time for requests in flight is over"
    upstreams.close()
    await anyio.sleep(0)


@pytest.fixture
def files(tmp_path: Path) -> GatewaySettings:
    write(tmp_path, trustme.CA().issue_cert("localhost"))
    return GatewaySettings(
        tls_certificate_file=str(tmp_path / "tls.pem"),
        tls_key_file=str(tmp_path / "tls.key"),
        tls_version_min="1.3",
    )


def write(folder: Path, issued: trustme.LeafCert) -> None:
    for name, content in (
        ("tls.key", issued.private_key_pem.bytes()),
        ("tls.pem", b"".join(part.bytes() for part in issued.cert_chain_pems)),
    ):
        (folder / "new").write_bytes(content)
        (folder / "new").replace(folder / name)


async def served(context: ssl.SSLContext, client: ssl.SSLContext) -> bytes:
    """The certificate that a handshake gets, in memory."""
    ends = [ssl.MemoryBIO() for _ in range(4)]
    server_side = context.wrap_bio(ends[0], ends[1], server_side=True)
    client_side = client.wrap_bio(ends[2], ends[3])
    for _ in range(10):
        for side, out, into in ((client_side, ends[3], ends[0]), (server_side, ends[1], ends[2])):
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
            into.write(out.read())
    found = client_side.getpeercert(binary_form=True)
    assert found
    return found


def trusting_all(maximum: ssl.TLSVersion = ssl.TLSVersion.MAXIMUM_SUPPORTED) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = maximum
    return context


async def test_a_renewed_certificate_is_used_for_new_handshakes(files: GatewaySettings, tmp_path: Path) -> None:
    certificate = Certificate(files)
    context = certificate.context
    before = await served(context, trusting_all())
    certificate.look()
    assert await served(context, trusting_all()) == before
    write(tmp_path, trustme.CA().issue_cert("localhost"))
    certificate.look()
    after = await served(context, trusting_all())
    assert after != before
    # A half-done renewal, or none: the last good one stays in use, and a later good one is taken.
    (tmp_path / "tls.key").write_text("junk")
    certificate.look()
    assert await served(context, trusting_all()) == after
    (tmp_path / "tls.key").unlink()
    certificate.look()
    assert await served(context, trusting_all()) == after
    write(tmp_path, trustme.CA().issue_cert("localhost"))
    certificate.look()
    assert await served(context, trusting_all()) not in {before, after}


async def test_older_versions_of_tls_are_refused(files: GatewaySettings) -> None:
    with pytest.raises(ssl.SSLError):
        await served(Certificate(files).context, trusting_all(ssl.TLSVersion.TLSv1_2))


@pytest.mark.parametrize("harm", ["missing", "junk", "other", "password"])
def test_unusable_files_are_refused_with_their_reason(files: GatewaySettings, tmp_path: Path, harm: str) -> None:
    key = tmp_path / "tls.key"
    if harm == "missing":
        key.unlink()
    elif harm == "junk":
        key.write_text("junk")
    elif harm == "other":
        key.write_bytes(trustme.CA().issue_cert("localhost").private_key_pem.bytes())
    else:
        private = serialization.load_pem_private_key(key.read_bytes(), None)
        key.write_bytes(
            private.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(b"secret"),
            )
        )
    with pytest.raises(InvalidInputError) as refused:
        open_certificate(files)
    assert refused.value.where is not None
    assert "gateway.tls_key_file" in refused.value.where


def test_half_of_a_pair_is_refused_and_none_is_no_tls(files: GatewaySettings) -> None:
    assert open_certificate(GatewaySettings()) is None
    with pytest.raises(InvalidInputError, match="both"):
        open_certificate(GatewaySettings(tls_certificate_file=files.tls_certificate_file))

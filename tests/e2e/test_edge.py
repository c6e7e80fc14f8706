"""The gateway's edge on the real platform: reload under load, metrics of all processes and workers, traces."""

from __future__ import annotations

import os
import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import anyio
import anyio.to_thread
import pytest
import trustme
import websockets.asyncio.client
from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import ConnectionClosed

from e2e_platform import CommandError, Platform, session, short_folder, wait_until

pytestmark = pytest.mark.anyio
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture(params=["1", "2"], scope="module")
def edge(request: pytest.FixtureRequest) -> Iterator[Platform]:
    with short_folder() as state, Platform(state, "--workers", request.param) as platform:
        yield platform


async def metrics(platform: Platform) -> dict[str, float]:
    """Sums over all labels but the deployment's, by `name{deployment}`."""
    connector = aiohttp.UnixConnector(path=str(platform.run_folder / "metrics.sock"))
    async with aiohttp.ClientSession(connector=connector) as http, http.get("http://snowdrop/metrics") as answer:
        assert answer.status == 200
        text = await answer.text()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = f"{sample.name}{{{sample.labels.get('deployment', sample.labels.get('process', ''))}}}"
            found[name] = found.get(name, 0.0) + sample.value
    return found


def relaying(platform: Platform) -> list[int]:
    gateway = platform.pids()["gateway"]
    return [int(pid) for pid in Path(f"/proc/{gateway}/task/{gateway}/children").read_text().split()]


async def test_a_reload_refuses_no_connection_and_cuts_no_stream(edge: Platform) -> None:
    edge.deploy("basic.py:Echo", "edge")
    edge.run("scale", "edge", "--max", "1", "--idle-s", "60")
    before = relaying(edge)
    stop = anyio.Event()
    statuses: list[int] = []
    counted: list[bytes] = []

    async def hammer(*, kept_alive: bool) -> None:
        headers = {} if kept_alive else {"Connection": "close"}
        async with session() as http:
            while not stop.is_set():
                # A POST is not sent again by the client: a connection that is closed under it is an error here.
                async with http.post(f"{edge.url}/edge/echo", json={"text": "x"}, headers=headers) as answer:
                    statuses.append(answer.status)
                    await answer.read()

    async def stream() -> None:
        async with (
            session() as http,
            http.post(f"{edge.url}/edge/count", json={"to": 40, "every_s": 0.1}) as answer,
        ):
            counted.append(await answer.read())

    async with session() as http, http.post(f"{edge.url}/edge/echo", json={"text": "x"}) as answer:
        assert answer.status == 200
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream)
        for number in range(4):
            tasks.start_soon(lambda kept=number % 2 == 0: hammer(kept_alive=kept))
        await anyio.sleep(0.3)
        for _ in range(2):
            await anyio.to_thread.run_sync(lambda: edge.run("gateway", "reload"))
            await anyio.sleep(0.7)
        stop.set()
    assert set(statuses) == {200}
    assert len(statuses) > 50
    assert counted[0].count(b"data: ") == 40
    await anyio.to_thread.run_sync(
        lambda: wait_until(lambda: len(relaying(edge)) == len(before), "the old workers have gone")
    )
    assert not set(before) & set(relaying(edge))


async def test_every_workers_requests_are_counted_once(edge: Platform) -> None:
    edge.deploy("basic.py:Echo", "counted")
    for _ in range(20):
        async with session() as http, http.post(f"{edge.url}/counted/echo", json={"text": "x"}) as answer:
            assert answer.status == 200
    async with session() as http, http.post(f"{edge.url}/nobody/echo", json={}) as answer:
        assert answer.status == 404
    found: dict[str, float] = {}
    with anyio.fail_after(30):
        while found.get("snowdrop_requests_total{counted}", 0) < 20:
            await anyio.sleep(0.1)
            found = await metrics(edge)
    assert found["snowdrop_requests_total{counted}"] == 20
    assert found["snowdrop_cold_requests_total{counted}"] == 1
    assert found["snowdrop_request_duration_seconds_count{counted}"] == 20
    assert "snowdrop_requests_total{nobody}" not in found
    assert found["snowdrop_scrape_ok{control}"] == found["snowdrop_scrape_ok{agent}"] == 1
    async with session() as http, http.get(f"{edge.url}/metrics") as answer:
        assert answer.status == 404, "strangers are not told who uses what"
    os.kill(edge.pids()["control"], signal.SIGSTOP)
    try:
        assert (await metrics(edge))["snowdrop_scrape_ok{control}"] == 0
    finally:
        os.kill(edge.pids()["control"], signal.SIGCONT)


async def test_a_websocket_and_an_eventsource_from_zero_and_no_scale_down_under_them(edge: Platform) -> None:
    """A websocket client and a browser's EventSource work unchanged; an open websocket keeps its replica."""
    edge.deploy("socketed.py:service", "sock")
    address = edge.url.replace("http://", "ws://") + "/sock/ws"
    async with websockets.asyncio.client.connect(address, open_timeout=60, proxy=None) as client:
        await client.send("abc")
        assert await client.recv() == "cba"
        wait_until(lambda: edge.view("sock")["in_flight"] == 1, "control has heard of it")
        # What a browser's EventSource sends when it reconnects.
        headers = {
            "accept": "text/event-stream",
            "last-event-id": "7",
            "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01",
        }
        async with session() as http, http.get(f"{edge.url}/sock/events", headers=headers) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            text = await answer.text()
        events = [block for block in text.split("\n\n") if block.startswith("id:")]
        assert [event.split()[1] for event in events] == ["0", "1", "2"]
        assert all("data: 7 " in event for event in events)
        assert all(f"00-{TRACE}-" in event and "00f067aa0ba902b7" not in event for event in events)
        (before,) = [replica["key"]["replica"] for replica in edge.replicas("sock")]
        await anyio.sleep(3.0)  # thrice its idle time
        assert [replica["key"]["replica"] for replica in edge.replicas("sock")] == [before]
        await client.send("again")
        assert await client.recv() == "niaga"
        await anyio.to_thread.run_sync(lambda: edge.run("scale", "sock", "--max", "1", "--idle-s", "1"))
        await client.send("bye")
        with pytest.raises(ConnectionClosed) as closed:
            await client.recv()
    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4001, "bye")
    await anyio.to_thread.run_sync(
        lambda: wait_until(lambda: edge.view("sock")["ready"] == 0, "it goes when nobody is there")
    )


async def test_tls_http2_and_a_certificate_that_is_renewed() -> None:
    authority = trustme.CA()
    with short_folder() as state:
        _write_certificate(state, authority.issue_cert("127.0.0.1", "localhost"))
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        (state / "config.toml").write_text(
            f'[gateway]\nhttp2 = true\nhttp2_port = {port}\ntls_version_min = "1.3"\n'
            f'tls_certificate_file = "{state}/tls.pem"\ntls_key_file = "{state}/tls.key"\n'
        )
        authority.cert_pem.write_to_path(str(state / "ca.pem"))
        trusted = ssl.create_default_context(cafile=str(state / "ca.pem"))
        with Platform(state) as platform:
            platform.deploy("basic.py:Echo", "secure")
            assert platform.url.startswith("https://127.0.0.1:")
            curl = ["curl", "-sS", "--cacert", str(state / "ca.pem"), "-w", " %{http_version}", "--max-time", "60"]
            post = ["-H", "content-type: application/json", "-d", '{"text": "x"}']
            for address, version in ((platform.url, b"1.1"), (f"https://127.0.0.1:{port}", b"2")):
                done = await anyio.run_process([*curl, *post, f"{address}/secure/echo"], check=False)
                assert done.returncode == 0, done.stderr
                assert b'"text":"x"' in done.stdout
                assert done.stdout.endswith(b" " + version)
            done = await anyio.run_process([*curl, platform.url.replace("https", "http")], check=False)
            assert done.returncode, "nothing but TLS is spoken"
            before = await anyio.to_thread.run_sync(_serial, platform.url, trusted)
            async with (
                session() as http,
                http.post(f"{platform.url}/secure/count", json={"to": 30, "every_s": 0.1}, ssl=trusted) as answer,
            ):
                assert answer.status == 200
                _write_certificate(state, authority.issue_cert("127.0.0.1"))
                await anyio.to_thread.run_sync(lambda: platform.run("gateway", "reload"))
                for address in (platform.url, f"https://127.0.0.1:{port}"):
                    await anyio.to_thread.run_sync(
                        lambda at=address: wait_until(
                            lambda: _serial(at, trusted) != before, "the new one is in use"
                        )
                    )
                assert (await answer.read()).count(b"data: ") == 30, "the stream goes on over the old one"
            (state / "tls.key").write_text("junk")
            with pytest.raises(CommandError) as refused:
                platform.run("gateway", "reload")
            assert refused.value.error["kind"] == "invalid_input"
            assert "tls_key_file" in refused.value.error["where"]
            assert await anyio.to_thread.run_sync(_serial, platform.url, trusted), "the last good one stays"


def _write_certificate(state: Path, issued: trustme.LeafCert) -> None:
    issued.private_key_pem.write_to_path(str(state / "tls.key"))
    (state / "tls.pem").write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))


def _serial(url: str, trusted: ssl.SSLContext) -> str:
    address = urlsplit(url)
    with (
        socket.create_connection((address.hostname, address.port), timeout=10) as raw,
        trusted.wrap_socket(raw, server_hostname="127.0.0.1") as secure,
    ):
        found = secure.getpeercert()
        assert found is not None
        return str(found["serialNumber"])

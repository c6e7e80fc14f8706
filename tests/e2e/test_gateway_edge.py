"""The gateway's edge on the real platform: reload under load, metrics of all processes and workers, traces."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import anyio
import anyio.to_thread
import pytest
from prometheus_client.parser import text_string_to_metric_families

from e2e_platform import Platform, session, short_folder, wait_until

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

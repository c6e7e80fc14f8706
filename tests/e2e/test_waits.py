"""The wait contract with the real processes: two gateway workers, a service that takes seconds to start."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import aiohttp
import anyio
import pytest

from e2e_platform import WAIT_S_MAX, Platform, session, short_folder, wait_until

pytestmark = pytest.mark.anyio
READ_S_MAX = 1.2
"""Far below the start: whoever hears nothing for so long gives up."""
LONG_READ_S_MAX, LONG_S_MAX = 10.0, 90.0


@pytest.fixture(scope="module")
def sleepy() -> Iterator[Platform]:
    with short_folder() as state, Platform(state, "--workers", "2") as platform:
        platform.deploy("sleepy.py", "sleepy")
        yield platform


async def read_slow_start(platform: Platform, read_s_max: float, accept: str) -> tuple[int, str]:
    timeout = aiohttp.ClientTimeout(total=LONG_S_MAX, sock_read=read_s_max)
    async with (
        aiohttp.ClientSession(timeout=timeout, headers={"accept": accept}) as http,
        http.get(f"{platform.url}/slowstart/count?to=3") as answer,
    ):
        return answer.status, await answer.text()


async def call_slow_start(platform: Platform) -> list[tuple[int, str] | BaseException]:
    """A stream and a plain request that give up after 10 s of silence, and a plain one that is patient."""
    return await asyncio.gather(
        read_slow_start(platform, LONG_READ_S_MAX, "text/event-stream"),
        read_slow_start(platform, LONG_READ_S_MAX, "*/*"),
        read_slow_start(platform, LONG_S_MAX, "*/*"),
        return_exceptions=True,
    )


@pytest.fixture(scope="module", autouse=True)
def slow_start(sleepy: Platform) -> Iterator[Future[list[tuple[int, str] | BaseException]]]:
    """What its callers got; it starts for half a minute beside the other tests here, which share the wait."""
    sleepy.deploy("slow_start.py", "slowstart")
    with ThreadPoolExecutor(1) as threads:
        yield threads.submit(lambda: asyncio.run(call_slow_start(sleepy)))


def at_zero(platform: Platform) -> bool:
    view = platform.view("sleepy")
    return bool(view["ready"] + view["starting"] + view["draining"] == 0)


async def wake_and_look(sleepy: Platform) -> None:
    """Without a request for an answer."""
    wait_until(lambda: at_zero(sleepy), "nothing runs")
    async with session() as http:
        async with http.head(f"{sleepy.url}/sleepy/readyz") as answer:
            assert (answer.status, "retry-after" in answer.headers) == (503, False)
        assert at_zero(sleepy), "a look woke it"
        async with http.get(f"{sleepy.url}/sleepy/readyz?activate=true") as answer:
            assert answer.status == 503
            assert int(answer.headers["retry-after"]) >= 1
        async with http.get(f"{sleepy.url}/sleepy/readyz", headers={"prefer": "wait=20"}) as answer:
            assert answer.status == 200
            assert (await answer.json())["replicas"]["ready"] == 1
        async with http.get(f"{sleepy.url}/sleepy/count?to=1") as answer:
            assert answer.status == 200
            assert "snowdrop-receipt" not in answer.headers, "it was ready before this request came"


async def test_a_streaming_client_with_a_short_timeout_survives_a_long_start(sleepy: Platform) -> None:
    """Woken once before, so that it is known how long a start takes: the time to wait is told, and counts down."""
    await wake_and_look(sleepy)
    wait_until(lambda: at_zero(sleepy), "nothing runs")
    timeout = aiohttp.ClientTimeout(total=WAIT_S_MAX, sock_read=READ_S_MAX)
    async with (
        aiohttp.ClientSession(timeout=timeout, headers={"accept": "text/event-stream"}) as http,
        http.get(f"{sleepy.url}/sleepy/count?to=3") as answer,
    ):
        assert (answer.status, answer.content_type) == (200, "text/event-stream")
        parts = (await answer.text()).strip().split("\n\n")
    comments = [dict(f.split("=") for f in p[len(": snowdrop ") :].split()) for p in parts if p[0] == ":"]
    assert [json.loads(part[len("data: ") :]) for part in parts if part[0] != ":"] == [0, 1, 2]
    phases = [comment["phase"] for comment in comments]
    assert phases[-1] == "answer"
    assert "startup" in phases
    assert set(phases) <= {"activate", "mount", "start", "import", "startup", "route", "queue", "answer"}
    assert comments[-1]["receipt"].startswith("rcp-")
    told = [float(c["expected_s"]) for c in comments[:-1] if "expected_s" in c]
    assert told, "the first start has taught how long it takes"
    assert min(told) < max(told)
    assert [int(c["percent"]) for c in comments if "percent" in c][-2] > 0


async def test_whoever_comes_back_when_told_gets_in(sleepy: Platform) -> None:
    """A burst at zero over a queue of two, over both workers: each is answered, by doing as it is told."""
    wait_until(lambda: at_zero(sleepy), "nothing runs")
    statuses: list[list[int]] = []

    async def obey(http: aiohttp.ClientSession, number: int) -> None:
        got: list[int] = []
        statuses.append(got)
        body, headers = {"seconds": 0.1}, {"snowdrop-caller": f"c{number}", "connection": "close"}
        while True:
            async with http.post(f"{sleepy.url}/sleepy/work", json=body, headers=headers) as answer:
                got.append(answer.status)
                if answer.status == 200:
                    return
                assert answer.status == 429, await answer.text()
                later_s = int(answer.headers["retry-after"])
            await anyio.sleep(later_s)

    with anyio.fail_after(WAIT_S_MAX):
        async with session() as http, anyio.create_task_group() as tasks:
            for number in range(8):
                tasks.start_soon(obey, http, number)
    assert all(got[-1] == 200 for got in statuses)
    assert sum(got[0] == 200 for got in statuses) == 2, "the queue's bound holds over all workers"
    assert sum(len(got) for got in statuses) <= 8 * 2 + 4, "nearly all get in the first time they come back"


def test_a_stream_with_a_read_timeout_of_10_s_survives_a_start_of_30_s(
    sleepy: Platform, slow_start: Future[list[tuple[int, str] | BaseException]]
) -> None:
    """True figures, and the platform's own settings. Who gives up beside it takes nobody along."""
    stream, impatient, patient = slow_start.result(LONG_S_MAX)
    assert isinstance(impatient, TimeoutError), "the start was not longer than the timeout"
    assert not isinstance(stream, BaseException), stream
    assert not isinstance(patient, BaseException), patient
    parts = stream[1].strip().split("\n\n")
    assert (stream[0], patient[0]) == (200, 200)
    assert [json.loads(part[len("data: ") :]) for part in parts if part[0] != ":"] == [0, 1, 2]
    assert sum("phase=startup" in part for part in parts) > 1
    wait_until(lambda: sleepy.receipts("slowstart"), "its receipt is stored")
    (receipt,) = sleepy.receipts("slowstart")
    (startup,) = [span for span in receipt["spans"] if span["name"] == "startup"]
    assert startup["end_unix_ns"] - startup["start_unix_ns"] >= 30 * 10**9

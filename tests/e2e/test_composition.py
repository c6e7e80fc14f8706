"""Services that call each other through real sandboxes, agent and gateway; each has a single slot."""

from __future__ import annotations

import time
from typing import Any

import aiohttp
import anyio
import pytest

from e2e_platform import Platform, session, wait_until

pytestmark = pytest.mark.anyio
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


async def post(http: aiohttp.ClientSession, url: str, body: object, **headers: str) -> tuple[int, Any]:
    async with http.post(url, json=body, headers=headers) as answer:
        return answer.status, await answer.json()


async def test_services_call_each_other_from_zero_without_starving_one_another(platform: Platform) -> None:
    for target, name in (("Child", "child"), ("Parent", "parent")):
        platform.deploy(f"composed.py:{target}", name)
    url = f"{platform.url}/parent"
    async with session() as http:
        # Both start for the first one. Parents hold their only slot while the child's only one is fought for.
        sums: list[tuple[int, Any]] = []

        async def add(count: int) -> None:
            sums.append(await post(http, f"{url}/add", {"numbers": list(range(count))}))

        async with anyio.create_task_group() as tasks:
            for count in range(6):
                tasks.start_soon(add, count)
        assert sorted(sums) == [(200, total) for total in (0, 0, 2, 6, 12, 20)]

        status, context = await post(
            http,
            f"{url}/context",
            {},
            **{
                "x-request-id": "req-outer",
                "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01",
                "snowdrop-timeout": "20",
            },
        )
        assert (status, context["request_id"], context["trace"]) == (200, "req-outer", TRACE)
        assert context["deadline"] <= time.time() + 20
        async with http.post(f"{url}/letters", json={"text": "ab"}) as stream:
            assert await stream.text() == 'data: "A"\n\ndata: "B"\n\n'
        assert await post(http, f"{url}/thread", {"number": 4}) == (200, 8)

        status, refused = await post(http, f"{url}/undeclared", {})
        assert (status, refused["error"]["kind"]) == (502, "call_failed")
        assert "'parent' does not declare that it calls 'circle-one'" in refused["error"]["message"]


async def test_a_caller_that_goes_away_cancels_the_call_in_the_other_service(platform: Platform) -> None:
    for target, name in (("Child", "child"), ("Parent", "parent")):
        platform.deploy(f"composed.py:{target}", name)
    async with session() as http:
        assert (await post(http, f"{platform.url}/parent/add", {"numbers": [1]}))[0] == 200
        with anyio.move_on_after(1.0):
            await post(http, f"{platform.url}/parent/for-ever", {})
        # The child's only slot is free again, and the parent's as well.
        assert await post(http, f"{platform.url}/child/cancelled", {}) == (200, 1)
        assert await post(http, f"{platform.url}/parent/add", {"numbers": [1]}) == (200, 2)
        # The time that a caller gives holds for all that is done for it.
        began_s = time.monotonic()
        status, late = await post(http, f"{platform.url}/parent/for-ever", {}, **{"snowdrop-timeout": "1"})
        assert status == 504, late
        assert time.monotonic() - began_s < 30
        assert await post(http, f"{platform.url}/child/cancelled", {}) == (200, 2)


async def test_a_circle_of_full_services_is_refused_at_once_with_its_way(platform: Platform) -> None:
    for target, name in (("CircleOne", "circle-one"), ("CircleTwo", "circle-two")):
        platform.deploy(f"composed.py:{target}", name)
    async with session() as http:
        status, refused = await post(http, f"{platform.url}/circle-one/start", {})
    assert (status, refused["error"]["kind"]) == (502, "call_failed")
    assert "call_deadlock" in refused["error"]["message"]
    assert "circle-one -> circle-two -> circle-one" in refused["error"]["message"]
    assert refused["error"]["where"].startswith("circle-two/back > circle-one/start")


async def test_calls_go_on_when_the_gateway_was_killed(platform: Platform) -> None:
    for target, name in (("Child", "child"), ("Parent", "parent")):
        platform.deploy(f"composed.py:{target}", name)
    async with session() as http:
        assert await post(http, f"{platform.url}/parent/add", {"numbers": [1]}) == (200, 2)
    before = platform.kill("gateway")
    wait_until(lambda: platform.pids().get("gateway") not in {None, before}, "the gateway is started again")

    async def answered() -> tuple[int, Any]:
        async with session() as http:
            return await post(http, f"{platform.url}/parent/add", {"numbers": [1, 2]})

    for _ in range(50):
        try:
            status, body = await answered()
        except aiohttp.ClientError:
            await anyio.sleep(0.1)
            continue
        if status == 200:
            assert body == 6
            return
        await anyio.sleep(0.1)
    raise AssertionError(f"no call after the restart: {status} {body}")

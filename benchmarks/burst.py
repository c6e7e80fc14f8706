"""Bursts on a service that is at zero: nobody is lost, the last answer comes soon, and no replica too many starts.

The service sleeps 2 s to start and 0.2 s for a request, has 4 slots a replica and at most 8 replicas. The *ideal
schedule* knows the whole burst in advance: it starts all 8 replicas with the first request, each is ready after
exactly 2 s, and a slot that is free takes the oldest request at once.

In `known` rounds the platform has seen a start and a few requests before: such a burst *needs* n replicas if n are
the fewest with which even an ideal schedule ends within 1.3 times the one of all 8. `fresh` rounds are the first
requests that their deployment ever gets; nothing is known of them, so one needs as many as give everyone a slot.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import time
from functools import partial
from pathlib import Path

import aiohttp
import msgspec

from benchmarks import harness
from benchmarks.harness import Bar, Contestant, Metric, Results, Round
from benchmarks.running import Platform, running_platform
from benchmarks.services.burst.service import SERVICE_S, START_S
from snowdrop.cli.client import Client
from snowdrop.wire.api import Description

SERVICE = Path(__file__).parent / "services" / "burst" / "service.py"
SLOTS = 4
REPLICAS_MAX = 8
SPREAD_S = 1.0
RATIO_MAX = 1.3
SPARE = 1
"""A burst may start so many replicas more than it needs."""
ZERO_S_MAX = 60.0
ANSWER_S_MAX = 120.0
LARGE, SMALL, AT_ONCE = 500, 60, 12
METRICS = (
    Metric(name="lost", better="lower", digits=0),
    Metric(name="server_errors", better="lower", digits=0),
    Metric(name="last_answer_s", better="lower"),
    Metric(name="ratio_to_ideal", better="lower"),
    Metric(name="started", better="lower", digits=0),
    Metric(name="needed", better="lower", digits=0),
)


class Scene(msgspec.Struct, frozen=True, kw_only=True):
    """`requests` that arrive evenly over `spread_s`; `fresh` on a deployment that was never called."""

    name: str
    requests: int
    spread_s: float
    fresh: bool

    def arrivals_s(self) -> list[float]:
        return [self.spread_s * number / self.requests for number in range(self.requests)]

    def needed(self) -> int:
        """Replicas that the burst needs."""
        if self.fresh:
            return min(REPLICAS_MAX, math.ceil(self.requests / SLOTS))
        return needed(self.arrivals_s())


SCENES = (
    Scene(name="known-500", requests=LARGE, spread_s=SPREAD_S, fresh=False),
    Scene(name="fresh-500", requests=LARGE, spread_s=SPREAD_S, fresh=True),
    Scene(name="known-60", requests=SMALL, spread_s=SPREAD_S, fresh=False),
    Scene(name="fresh-12", requests=AT_ONCE, spread_s=0.0, fresh=True),
)


def ideal_s(arrivals_s: list[float], replicas: int) -> float:
    """When the last of the requests ends if that many replicas start with the first of them."""
    free_s = [START_S] * (replicas * SLOTS)
    heapq.heapify(free_s)
    last_s = 0.0
    for arrival_s in arrivals_s:
        last_s = max(heapq.heappop(free_s), arrival_s) + SERVICE_S
        heapq.heappush(free_s, last_s)
    return max(free_s) if arrivals_s else last_s


def needed(arrivals_s: list[float]) -> int:
    """The fewest replicas with which the ideal schedule is not longer than RATIO_MAX times that of all."""
    bar_s = RATIO_MAX * ideal_s(arrivals_s, REPLICAS_MAX)
    return next(count for count in range(1, REPLICAS_MAX + 1) if ideal_s(arrivals_s, count) <= bar_s)


class Answers(msgspec.Struct):
    statuses: list[int]
    last_s: float


async def burst(gateway: str, name: str, arrivals_s: list[float]) -> Answers:
    """Sends each request at its time, from as many connections as it takes."""
    statuses: list[int] = []
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=ANSWER_S_MAX)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        started_s = time.monotonic()

        async def one(number: int, arrival_s: float) -> float:
            await asyncio.sleep(started_s + arrival_s - time.monotonic())
            try:
                async with session.post(f"http://{gateway}/{name}/work", json={"number": number}) as response:
                    body = await response.json()
                    right = response.status != 200 or body == {"number": number}
                    statuses.append(response.status if right else 0)
            except (aiohttp.ClientError, TimeoutError):
                statuses.append(0)
            return time.monotonic() - started_s

        ends_s = await asyncio.gather(*(one(number, at_s) for number, at_s in enumerate(arrivals_s)))
    return Answers(statuses, max(ends_s))


class Bursts:
    """Rounds of the scenes against one platform; a fresh scene gets a new deployment for each round."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._client = Client(platform.layout, "default")
        self._deployed = 0
        self._is_known = False

    def round(self, scene: Scene) -> Round:
        name = self._name(scene)
        self._until_zero(name)
        arrivals_s = scene.arrivals_s()
        since_unix_ns = time.time_ns()
        answers = asyncio.run(burst(self._platform.gateway, name, arrivals_s))
        found = self._client.get(Description, "deployments", name)
        reports = {report.key.replica: report for report in (*found.replicas, *found.recent)}
        started = sum(1 for report in reports.values() if report.started_unix_ns >= since_unix_ns)
        if scene.fresh:
            self._client.delete("deployments", name)
        return {
            "lost": float(sum(1 for status in answers.statuses if status != 200)),
            "server_errors": float(sum(1 for status in answers.statuses if status >= 500)),
            "last_answer_s": answers.last_s,
            "ratio_to_ideal": answers.last_s / ideal_s(arrivals_s, REPLICAS_MAX),
            "started": float(started),
            "needed": float(scene.needed()),
        }

    def _name(self, scene: Scene) -> str:
        if scene.fresh:
            self._deployed += 1
            name = f"burst-{self._deployed}"
            self._platform.command("deploy", str(SERVICE), "--name", name)
            return name
        if not self._is_known:
            self._is_known = True
            self._platform.command("deploy", str(SERVICE), "--name", "burst")
            asyncio.run(burst(self._platform.gateway, "burst", [0.0, 0.1, 0.2, 0.3]))
        return "burst"

    def _until_zero(self, name: str) -> None:
        limit_s = time.monotonic() + ZERO_S_MAX
        while (
            (view := self._client.get(Description, "deployments", name).view).ready + view.starting + view.draining
        ):
            if time.monotonic() > limit_s:
                raise TimeoutError(f"{name} did not go to zero")
            time.sleep(0.2)


def ideal_round(scene: Scene) -> Round:
    arrivals_s = scene.arrivals_s()
    return {"last_answer_s": ideal_s(arrivals_s, REPLICAS_MAX), "needed": float(scene.needed())}


def bars(results: Results) -> list[Bar]:
    """Over all rounds, not medians: one that is lost is lost."""
    made: list[Bar] = []
    for scene in SCENES:
        for metric in ("lost", "server_errors"):
            worst = max(results.values(scene.name, metric), default=None)
            made.append(Bar(name=f"burst.{scene.name}.{metric}", value=worst, limit=1, better="lower"))
    for name in ("known-500", "fresh-500"):
        ratio = results.median(name, "ratio_to_ideal")
        made.append(Bar(name=f"burst.{name}.ratio_to_ideal", value=ratio, limit=RATIO_MAX, better="lower"))
    for name in ("known-60", "fresh-12"):
        started = max(results.values(name, "started"), default=None)
        need = next(scene for scene in SCENES if scene.name == name).needed()
        limit = need + SPARE + 1  # a bar is below its limit
        made.append(Bar(name=f"burst.{name}.started", value=started, limit=limit, better="lower"))
    return made


def main() -> None:
    made = harness.parser(__doc__, rounds=1, warmups=0)
    chosen = harness.options(made)
    with running_platform() as platform:
        bursts = Bursts(platform)
        contestants = [
            Contestant(
                name=f"ideal-{scene.name}",
                run=partial(ideal_round, scene),
                note="computed: all 8 replicas with the first request",
            )
            for scene in SCENES
        ]
        contestants += [
            Contestant(
                name=scene.name,
                run=partial(bursts.round, scene),
                note=f"{scene.requests} requests in {scene.spread_s:g} s from zero",
            )
            for scene in SCENES
        ]
        results = harness.measure(contestants, METRICS, chosen)
    harness.publish("burst", results, bars(results), chosen, baseline="ideal-known-500")


if __name__ == "__main__":
    main()

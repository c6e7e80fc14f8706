"""Rollouts against the real processes: a bad revision harms nobody, a good one takes over step by step."""

from pathlib import Path

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from e2e_platform import CommandError, Platform, session, wait_until

pytestmark = [pytest.mark.anyio, pytest.mark.e2e]

SERVICE = """
import snowdrop as sd

@sd.service(scale=sd.Scale(min=1, max=2), concurrency=4, park_s_max=0.0,
            rollout=sd.Rollout(prove_s=3600.0, samples_min=10),
            resources=sd.ResourceSpec(memory_bytes_max=256 << 20))
class Versioned:
    @sd.startup
    def start(self) -> None:
        {startup}

    @sd.endpoint("/say")
    async def say(self) -> str:
        {body}
"""


def write(folder: Path, name: str, *, startup: str = "pass", body: str = "") -> str:
    target = folder / name / "service.py"
    target.parent.mkdir()
    target.write_text(SERVICE.format(startup=startup, body=body or f"return {name!r}"))
    return str(target)


async def ask(http: aiohttp.ClientSession, platform: Platform, revision: str = "") -> tuple[int, str]:
    headers = {"Snowdrop-Revision": revision} if revision else {}
    async with http.post(f"{platform.url}/rolled/say", json={}, headers=headers) as answer:
        return answer.status, await answer.text()


async def test_bad_revisions_go_back_and_a_good_one_takes_over(own_platform: Platform, tmp_path: Path) -> None:
    platform = own_platform

    def deploy(target: str, *options: str) -> None:
        platform.run("deploy", target, "--name", "rolled", *options)

    def ended() -> list[dict[str, str]]:
        found: list[dict[str, str]] = platform.run("rollout", "status", "rolled")["ended"]
        return found

    def phase() -> str:
        active = platform.run("rollout", "status", "rolled")["active"]
        return str(active["phase"]) if active else "none"

    async with session() as http:
        deploy(write(tmp_path, "one"))
        assert await ask(http, platform) == (200, '"one"')

        # One that does not start: the old one answers all the time, and its end says why.
        deploy(write(tmp_path, "broken", startup="raise RuntimeError('no such file')"))
        while not ended():
            assert await ask(http, platform) == (200, '"one"')
        assert (ended()[0]["phase"], phase()) == ("rolled-back", "none")
        assert "no such file" in ended()[0]["reason"]

        # One that starts and then fails: a tester finds it by name, then a canary finds it by itself.
        deploy(write(tmp_path, "failing", body="raise ValueError('wrong')"), "--canary", "50%:hold")
        assert (await ask(http, platform, "candidate"))[0] == 500
        assert await ask(http, platform, "stable") == (200, '"one"')
        seen = set()
        while len(ended()) < 2:
            seen |= {(await ask(http, platform))[0] for _ in range(10)}
        assert seen == {200, 500}
        assert "answers of the new revision failed" in ended()[0]["reason"]
        assert [await ask(http, platform) for _ in range(10)] == [(200, '"one"')] * 10

        # A good one, held as a preview over the death of control, then promoted.
        deploy(write(tmp_path, "two"), "--preview")
        assert await ask(http, platform, "candidate") == (200, '"two"')
        before = platform.pids()["control"]
        platform.kill("control")
        wait_until(lambda: platform.pids()["control"] != before, "control is back")
        assert [await ask(http, platform) for _ in range(5)] == [(200, '"one"')] * 5
        wait_until(lambda: phase() == "shifting", "the rollout went on")
        platform.run("rollout", "promote", "rolled")
        wait_until(lambda: phase() == "proving", "all traffic was shifted")
        assert [await ask(http, platform) for _ in range(5)] == [(200, '"two"')] * 5

        # And back by hand.
        platform.run("rollback", "rolled")
        wait_until(lambda: platform.run("rollout", "status", "rolled")["active"] is None, "it was aborted")

        async def _one() -> bool:
            return await ask(http, platform) == (200, '"one"')

        while not await _one():
            pass
        listed = platform.run("revisions", "rolled")
        assert [bool(each["note"]) for each in listed] == [True, True, True, False]
        assert listed[-1]["weight"] == 1.0


STREAMING = """
import pathlib
from collections.abc import AsyncIterator
import anyio
import snowdrop as sd

@sd.service(scale=sd.Scale(min=1, max=1), concurrency=4, rollout=sd.Rollout(prove_s=0.0),
            volumes=[sd.Volume(target="/data", name="shared")],
            resources=sd.ResourceSpec(memory_bytes_max=256 << 20))
class Streaming:
    @sd.endpoint("/stream")
    async def stream(self) -> AsyncIterator[str]:
        while not pathlib.Path("/data/stop").exists():
            yield {name!r}
            await anyio.sleep(0.05)
        yield "end of " + {name!r}

    @sd.endpoint("/stop")
    async def stop(self) -> str:
        pathlib.Path("/data/stop").touch()
        return {name!r}
"""


async def test_a_stream_of_the_old_revision_outlives_the_rollout(own_platform: Platform, tmp_path: Path) -> None:
    platform = own_platform
    platform.run("volume", "create", "shared")

    def deploy(name: str) -> None:
        (tmp_path / "service.py").write_text(STREAMING.format(name=name))
        platform.run("deploy", str(tmp_path / "service.py"), "--name", "rolled")

    def rollouts() -> tuple[bool, int]:
        status = platform.run("rollout", "status", "rolled")
        return status["active"] is None, len(status["ended"])

    deploy("one")
    async with session() as http:
        async with http.post(f"{platform.url}/rolled/stream", json={}) as streamed:
            assert b"one" in await streamed.content.readany()
            deploy("two")
            wait_until(lambda: rollouts() == (True, 1), "the rollout is done")
            found = await metrics(platform)
            assert found['snowdrop_rollouts_total{deployment="rolled",outcome="done"}'] == 1
            assert found['snowdrop_requests_in_flight{deployment="rolled"}'] == 1, "the stream of the old one"
            with pytest.raises(CommandError) as used:
                platform.run("volume", "rm", "shared")
            assert "used by rolled" in used.value.error["message"]
            async with http.post(f"{platform.url}/rolled/stop", json={}) as stopped:
                assert await stopped.text() == '"two"'
            rest = await streamed.content.read()
        assert b"end of one" in rest
        wait_until(lambda: len(platform.replicas("rolled")) == 1, "the old replica has ended")
    assert (await metrics(platform))['snowdrop_requests_in_flight{deployment="rolled"}'] == 0


async def metrics(platform: Platform) -> dict[str, float]:
    connector = aiohttp.UnixConnector(path=str(platform.run_folder / "metrics.sock"))
    async with aiohttp.ClientSession(connector=connector) as http, http.get("http://snowdrop/metrics") as answer:
        text = await answer.text()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            kept = ",".join(
                f'{k}="{v}"' for k, v in sorted(sample.labels.items()) if k in {"deployment", "outcome"}
            )
            found[f"{sample.name}{{{kept}}}"] = sample.value
    return found

"""Every command as a person and as a program would use it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from e2e_platform import SNOWDROP, CommandError, Platform, session, short_folder, wait_until

pytestmark = pytest.mark.anyio


def text(platform: Platform, *words: str) -> str:
    command = [SNOWDROP, "--state", str(platform.state), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


async def test_a_deployment_through_every_command(platform: Platform, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": 1}')
    platform.run("model", "push", "tiny", str(tmp_path))
    assert platform.run("model", "show", "tiny")["files"][0]["path"] == "config.json"
    assert "tiny" in text(platform, "model", "ls")
    platform.deploy("basic.py:Echo", "tour")
    answer = text(platform, "call", "tour/echo", '{"text": "hello"}')
    assert json.loads(answer)["text"] == "hello"
    streamed = text(platform, "call", "tour/count", '{"to": 3, "every_s": 0.01}')
    assert [line for line in streamed.splitlines() if line] == ["data: 0", "data: 1", "data: 2"]
    assert "tour" in text(platform, "ps")
    described = text(platform, "describe", "tour")
    assert "read-only" in described, "it says what the root is until images land"
    assert "ready" in described
    wait_until(lambda: platform.receipts("tour"), "its receipt is stored")
    waterfall = text(platform, "receipts", "show", "tour")
    assert "import" in waterfall
    assert "unaccounted" in waterfall
    assert platform.run("scale", "tour", "--max", "2", "--idle-s", "60")["max"] == 2
    bounded = platform.run("scale", "tour", "--schedule", "0 8 * * mon-fri for 10h min=1 tz=Europe/Berlin")
    assert bounded["schedules"][0]["timezone"] == "Europe/Berlin"
    assert platform.run("scale", "tour", "--schedule", "")["schedules"] == []
    wait_until(lambda: platform.run("why", "tour", "--since", "1h")["history"], "its decisions are stored")
    why = platform.run("why", "tour")
    assert why["now"]["signals"]["start_s"] > 0, "the start-up time is learned"
    assert why["now"]["decision"]["reason"]
    assert any(other["desired"] != why["now"]["decision"]["desired"] for other in why["alternatives"])
    wait_until(lambda: platform.run("why", "tour")["waits"], "the request that waited is kept")
    waited = platform.run("why", "tour")["waits"][0]["request_id"]
    assert "no replica was ready" in text(platform, "why", "tour", "--request", waited)
    assert "what would change it" in text(platform, "why", "tour")
    wait_until(lambda: text(platform, "usage").count("tour"), "usage is shown")
    assert platform.run("delete", "tour")["gone"] is True
    assert platform.run("model", "rm", "tiny") == {"removed": "tiny"}
    with pytest.raises(CommandError) as gone:
        platform.run("model", "show", "tiny")
    assert gone.value.error["kind"] == "not_found"


async def test_logs_can_be_followed(platform: Platform) -> None:
    platform.deploy("basic.py:Echo", "chatty")
    command = [str(SNOWDROP), "--state", str(platform.state), "--json", "logs", "chatty", "-f"]
    following = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = f"{platform.url}/chatty/fail"
        async with session() as http, http.post(url, json={"message": "look here"}) as answer:
            assert answer.status == 500
        assert following.stdout is not None
        for line in following.stdout:
            if "look here" in json.loads(line)["text"]:
                break
    finally:
        following.kill()
        following.wait()
        assert following.stdout is not None
        following.stdout.close()


async def test_keys_are_checked_where_they_are_given(platform: Platform) -> None:
    platform.deploy("basic.py:Echo", "locked")
    secret = platform.run("key", "create", "laptop")["secret"]
    url, body = f"{platform.url}/locked/echo", {"text": "x"}
    async with session() as http:
        async with http.post(url, json=body, headers={"authorization": f"Bearer {secret}"}) as answer:
            assert answer.status == 200
        async with http.post(url, json=body, headers={"authorization": "Bearer wrong"}) as answer:
            assert answer.status == 401
        async with http.post(url, json=body) as answer:
            assert answer.status == 200, "on loopback a key is optional"
        platform.run("key", "rm", "laptop")
        async with http.post(url, json=body, headers={"authorization": f"Bearer {secret}"}) as answer:
            assert answer.status == 401
    assert platform.run("key", "ls") == []


async def test_another_tenant_sees_nothing(platform: Platform) -> None:
    platform.deploy("basic.py:Echo", "mine")
    assert platform.run("--tenant", "other", "ps") == []
    with pytest.raises(CommandError) as hidden:
        platform.run("--tenant", "other", "describe", "mine")
    assert hidden.value.error["kind"] == "not_found"
    secret = platform.run("--tenant", "other", "key", "create", "theirs")["secret"]
    async with session() as http:
        headers = {"authorization": f"Bearer {secret}"}
        async with http.post(f"{platform.url}/mine/echo", json={"text": "x"}, headers=headers) as answer:
            assert answer.status == 404
    platform.run("--tenant", "other", "key", "rm", "theirs")


def test_up_twice_is_once(platform: Platform) -> None:
    before = platform.pids()
    assert platform.run("up")["gateway_url"] == platform.url
    assert platform.pids() == before


def test_without_a_platform_the_next_step_is_named() -> None:
    with short_folder() as state:
        idle = Platform(state)
        with pytest.raises(CommandError) as failed:
            idle.run("ps")
        assert failed.value.error["kind"] == "platform_down"
        assert "snowdrop up" in failed.value.error["next_step"]
        assert idle.run("down") == {"stopped": False}


def test_config_and_doctor_speak_json(platform: Platform) -> None:
    rows = {row["name"]: row for row in platform.run("config")}
    assert rows["gateway.port"]["source"] == "default"
    assert rows["state"]["value"] == str(platform.state)
    probes = {probe["name"]: probe for probe in platform.run("doctor")}
    assert probes["sandbox"]["ok"] is True
    assert all(probe["turn_on"] for probe in probes.values() if not probe["ok"])


def test_completion_is_offered() -> None:
    """Asked for as a shell's start-up file asks, so that no shell has to be guessed here."""
    env = {**os.environ, "_SNOWDROP_COMPLETE": "source_bash"}
    done = subprocess.run([SNOWDROP], check=False, capture_output=True, text=True, env=env)
    assert "complete -o default -F" in done.stdout


def test_the_state_survives_down_and_up() -> None:
    with short_folder() as state:
        with Platform(state) as first:
            first.deploy("basic.py:Echo", "kept")
        with Platform(state) as second:
            assert [view["name"] for view in second.run("ps")] == ["kept"]
            assert json.loads(text(second, "call", "kept/echo", '{"text": "again"}'))["text"] == "again"

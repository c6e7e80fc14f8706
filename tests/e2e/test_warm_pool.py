"""Replicas that are forks of a warm parent, with the real processes: they answer, drain, and receipts say so."""

from __future__ import annotations

import os
from typing import Any

import pytest

from e2e_platform import Platform, session, wait_until

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(os.geteuid() != 0, reason="only a root agent forks replicas"),
]
STARTS_MAX = 10


def at_zero(platform: Platform) -> bool:
    view = platform.view("warmed")
    return bool(view["ready"] + view["starting"] + view["draining"] == 0)


def start_note(receipt: dict[str, Any]) -> str:
    """How the replica of a receipt was started; empty: the ordinary way."""
    found = [str(span.get("note", "")) for span in receipt["spans"] if span["name"] == "start"]
    return found[0] if found else ""


async def call(platform: Platform) -> dict[str, str]:
    async with session() as http, http.post(f"{platform.url}/warmed/found", json={}) as answer:
        assert answer.status == 200, await answer.text()
        found: dict[str, str] = await answer.json()
        return found


async def test_after_the_first_start_replicas_are_forks_and_live_as_others_do(platform: Platform) -> None:
    platform.deploy("warmed.py", "warmed")
    first = await call(platform)
    assert first["found"] == "", "the first starts the ordinary way"
    for _ in range(STARTS_MAX):
        wait_until(lambda: at_zero(platform), "warmed is at zero")
        answer = await call(platform)
        if answer["found"]:
            break
    # Its first process, and itself: neither the parent nor its keeper.
    assert answer == {"found": "numpy", "sum": "6", "processes": "1,2"}
    receipts = platform.receipts("warmed", at_least=2)
    assert (start_note(receipts[0]), start_note(receipts[-1])) == ("forked", "")
    wait_until(lambda: at_zero(platform), "the fork has drained")
    ended = [replica for replica in platform.replicas("warmed") if replica["state"] == "failed"]
    assert ended == []

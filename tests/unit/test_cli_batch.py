"""Batches: their files survive any kill, each line ends once, and the bound follows what is offered."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

from snowdrop.cli import batch_run
from snowdrop.cli.batch_files import Journal, Line, header_of, open_journal, parse_line, read_lines
from snowdrop.cli.batch_run import Batch, BatchTarget
from snowdrop.domain.errors import ConflictError, NotFoundError
from snowdrop.policy.batch import at_once

pytestmark = pytest.mark.anyio


class TestLines:
    def test_openais_form_and_plain_bodies(self) -> None:
        asked = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m"}}
        line = parse_line(3, json.dumps(asked).encode())
        assert (line.custom_id, line.path, json.loads(line.body)) == ("a", "/v1/chat/completions", {"model": "m"})
        assert parse_line(4, b'{"text": "x"}') == Line(number=4, body=b'{"text": "x"}')

    @pytest.mark.parametrize(
        "text", [b"[1]", b"{", b'"x"', b'{"custom_id": 3, "url": "/x"}', b'{"custom_id": "a", "url": "x"}']
    )
    def test_what_is_neither_has_a_problem(self, text: bytes) -> None:
        assert parse_line(1, text).problem

    def test_empty_lines_are_passed_over_and_keep_their_numbers(self, tmp_path: Path) -> None:
        (tmp_path / "in").write_bytes(b'{"a":1}\n\n  \n{"a":2}')
        assert [line.number for line in read_lines(tmp_path / "in")] == [1, 4]


def opened(tmp_path: Path, **more: bool) -> Journal:
    source = tmp_path / "in.jsonl"
    if not source.exists():
        source.write_text("".join(json.dumps({"number": n}) + "\n" for n in range(1, 21)))
    header = header_of(source, deployment="d", endpoint="/x")
    return open_journal(tmp_path / "out.jsonl", header, **{"again": False, "overwrite": False, **more})


class TestJournal:
    @pytest.mark.parametrize("cut", range(1, 40, 3))
    def test_cut_off_anywhere_it_goes_on_with_the_whole_lines(self, tmp_path: Path, cut: int) -> None:
        journal = opened(tmp_path)
        for line in (3, 1, 2):
            journal.add(line, {"line": line}, ok=True)
        journal.close()
        part = Journal.part(tmp_path / "out.jsonl")
        part.write_bytes(part.read_bytes()[:-cut])
        journal = opened(tmp_path)
        kept = list(journal.done)
        assert kept == [3, 1, 2][: len(kept)]
        assert len(kept) < 3
        for line in sorted({1, 2, 3} - set(kept)):
            journal.add(line, {"line": line}, ok=True)
        journal.finish("input")
        journal.close()
        assert (tmp_path / "out.jsonl").read_text() == '{"line":1}\n{"line":2}\n{"line":3}\n'
        assert not part.exists()

    def test_as_completed_keeps_the_order_of_their_ends(self, tmp_path: Path) -> None:
        journal = opened(tmp_path)
        for line in (3, 1, 2):
            journal.add(line, {"line": line}, ok=True)
        journal.finish("completed")
        journal.close()
        assert [json.loads(text)["line"] for text in (tmp_path / "out.jsonl").read_text().splitlines()] == [
            3,
            1,
            2,
        ]

    def test_another_input_or_a_second_writer_is_refused(self, tmp_path: Path) -> None:
        journal = opened(tmp_path)
        with pytest.raises(ConflictError, match="another batch writes"):
            opened(tmp_path)
        journal.add(1, {}, ok=True)
        journal.close()
        (tmp_path / "in.jsonl").write_text("{}\n")
        with pytest.raises(ConflictError, match="another input"):
            opened(tmp_path)
        opened(tmp_path, overwrite=True).close()

    def test_one_with_nothing_done_leaves_nothing(self, tmp_path: Path) -> None:
        opened(tmp_path).close()
        assert not Journal.part(tmp_path / "out.jsonl").exists()
        journal = opened(tmp_path)
        journal.add(1, {}, ok=True)
        journal.close()
        journal = opened(tmp_path)
        assert journal.done == {1: True}
        journal.close()
        assert Journal.part(tmp_path / "out.jsonl").exists()

    def test_a_result_is_not_overwritten_but_what_failed_can_run_again(self, tmp_path: Path) -> None:
        journal = opened(tmp_path)
        journal.add(1, {"line": 1, "status_code": 200, "output": 1}, ok=True)
        journal.add(2, {"id": "batch_req_2", "response": {"status_code": 500}}, ok=False)
        journal.finish("input")
        journal.close()
        with pytest.raises(ConflictError, match="already"):
            opened(tmp_path)
        journal = opened(tmp_path, again=True)
        assert journal.done == {1: True}
        journal.add(2, {"line": 2, "status_code": 200, "output": 2}, ok=True)
        journal.finish("input")
        journal.close()
        assert [json.loads(text)["output"] for text in (tmp_path / "out.jsonl").read_text().splitlines()] == [1, 2]


class Service:
    """A gateway with one deployment that fails as it is told."""

    def __init__(self) -> None:
        self.asked: Counter[int] = Counter()
        self.running = self.peak = 0
        self.fails: dict[int, list[int]] = {}

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/d/x", self.work)
        app.router.add_get("/d/readyz", self.readyz)
        return app

    async def readyz(self, _request: web.Request) -> web.Response:
        return web.json_response({"slots": 8})

    async def work(self, request: web.Request) -> web.Response:
        number = (await request.json())["number"]
        self.asked[number] += 1
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            fails = self.fails.get(number, [])
            if fails:
                status = fails.pop(0)
                body = {
                    "error": {"kind": "not_found" if status == 404 else "x", "message": "there is no deployment"}
                }
                return web.json_response(body, status=status)
            return web.json_response(number * 10)
        finally:
            self.running -= 1


@pytest.fixture
async def service() -> AsyncIterator[tuple[Service, str]]:
    made = Service()
    server = TestServer(made.app())
    await server.start_server()
    yield made, str(server.make_url("")).rstrip("/")
    await server.close()


async def run(tmp_path: Path, url: str, **more: Any) -> tuple[list[dict[str, Any]], list[bool]]:
    journal = opened(tmp_path)
    told: list[bool] = []
    target = BatchTarget(
        gateway_url=url, deployment="d", endpoint="/x", key=None, most=more.get("most", 4), timeout_s=10, retries=2
    )
    try:
        await Batch(target, journal, told.append).run(read_lines(tmp_path / "in.jsonl"))
        journal.finish("input")
    finally:
        journal.close()
    return [json.loads(text) for text in (tmp_path / "out.jsonl").read_text().splitlines()], told


async def test_each_line_once_in_order_with_retries_and_errors_of_its_own(
    tmp_path: Path, service: tuple[Service, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_run, "pause_s", lambda *_args, **_more: 0.0)
    made, url = service
    made.fails = {3: [503], 5: [500, 500, 500], 7: [422]}
    lines, told = await run(tmp_path, url)
    assert [line["line"] for line in lines] == list(range(1, 21))
    assert {line["line"]: line["status_code"] for line in lines if line["error"]} == {5: 500, 7: 422}
    assert {line["output"] for line in lines if not line["error"]} == {
        n * 10 for n in range(1, 21) if n not in {5, 7}
    }
    assert made.asked == Counter({**dict.fromkeys(range(1, 21), 1), 3: 2, 5: 3})
    assert made.peak <= 4
    assert told.count(False) == 2


async def test_what_is_done_is_not_asked_again(tmp_path: Path, service: tuple[Service, str]) -> None:
    made, url = service
    journal = opened(tmp_path)
    for line in range(1, 15):
        journal.add(line, {"line": line, "output": "before"}, ok=True)
    journal.close()
    lines, _told = await run(tmp_path, url)
    assert sorted(made.asked) == list(range(15, 21))
    assert [line["output"] for line in lines] == ["before"] * 14 + [n * 10 for n in range(15, 21)]


async def test_a_deployment_that_is_not_there_ends_the_batch_at_once(
    tmp_path: Path, service: tuple[Service, str]
) -> None:
    made, url = service
    made.fails = {number: [404] for number in range(1, 21)}
    with pytest.raises(NotFoundError):
        await run(tmp_path, url, most=1)
    assert made.asked.total() <= 2
    assert not (tmp_path / "out.jsonl").exists()


async def test_nobody_answers_and_each_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_run, "pause_s", lambda *_args, **_more: 0.0)
    lines, told = await run(tmp_path, "http://127.0.0.1:9")
    assert {line["error"]["code"] for line in lines} == {"no_answer"}
    assert told == [False] * 20


@given(st.integers(1, 10_000), st.none() | st.integers(0, 20_000), st.booleans(), st.integers(1, 10_000))
def test_the_bound_follows_the_slots_within_its_limits(
    before: int, slots: int | None, refused: bool, most: int
) -> None:
    after = at_once(before, slots=slots, refused=refused, most=most)
    assert 1 <= after <= most
    assert after <= 2 * before
    if refused:
        assert after <= max(1, before // 2)
    elif slots and most >= slots and 2 * before >= slots:
        assert after >= slots, "slots would stay empty"

"""Dispatch, validation and failures of a service's HTTP face."""

import asyncio

import anyio
import anyio.lowlevel
import pytest

import snowdrop as sd
from replica_helpers import Caller, post, started
from snowdrop.replica import exchange

pytestmark = pytest.mark.anyio


@sd.service(concurrency=2)
class Sums:
    def __init__(self) -> None:
        self.closed = False

    @sd.endpoint("/add")
    def add(self, left: int, right: int = 1) -> int:
        return left + right

    @sd.endpoint("/join")
    async def join(self, words: list[str]) -> str:
        return " ".join(words)

    @sd.endpoint("/raw")
    def raw(self, size: int) -> bytes:
        return b"x" * size

    @sd.endpoint("/fail")
    def fail(self, how: str) -> str:
        raise {"value": ValueError, "exit": SystemExit, "stop": StopIteration}[how]("secret place")

    @sd.endpoint("/fail-async")
    async def fail_async(self, how: str) -> str:
        raise {"value": ValueError, "exit": SystemExit}[how]("async place")

    @sd.endpoint("/odd")
    def odd(self) -> list[str]:
        return [object()]  # type: ignore[list-item]

    @sd.endpoint("/self-cancelled")
    async def self_cancelled(self) -> str:
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        future.cancel()
        return await future


async def test_a_json_object_becomes_arguments_and_the_result_json() -> None:
    async with started(Sums) as app:
        answer = await post(app, "/add", {"left": 2, "right": 3}, headers={"x-request-id": "req-1"})
        assert (answer.status, answer.json()) == (200, 5)
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-request-id"] == "req-1"
        assert (await post(app, "/join", {"words": ["a", "b"]})).json() == "a b"


async def test_get_takes_the_query_string() -> None:
    async with started(Sums) as app:
        assert (await post(app, "/add", method="GET", query="left=2")).json() == 3


async def test_bytes_are_answered_as_they_are() -> None:
    async with started(Sums) as app:
        answer = await post(app, "/raw", {"size": 3})
        assert (answer.body, answer.headers["content-type"]) == (b"xxx", "application/octet-stream")


@pytest.mark.parametrize(
    ("body", "field"),
    [({"left": "two"}, "left"), ({"right": 1}, "right_missing"), ({"left": 1, "middle": 2}, "middle")],
)
async def test_a_request_that_does_not_fit_gets_422_naming_the_field(body: object, field: str) -> None:
    async with started(Sums) as app:
        answer = await post(app, "/add", body)
        error = answer.json()["error"]
        assert (answer.status, error["kind"]) == (422, "invalid_input")
        wanted = "left" if field == "right_missing" else field
        assert wanted in [problem["field"] for problem in error["fields"]]


async def test_what_is_not_json_gets_422() -> None:
    async with started(Sums) as app:
        assert (await post(app, "/add", parts=[b"{"])).status == 422


async def test_an_unknown_path_gets_404_listing_the_paths() -> None:
    async with started(Sums) as app:
        answer = await post(app, "/nothing")
        assert answer.status == 404
        assert "/add" in answer.json()["error"]["next_step"]


async def test_another_method_gets_405_with_allow() -> None:
    async with started(Sums) as app:
        answer = await post(app, "/add", method="DELETE")
        assert (answer.status, answer.headers["allow"]) == (405, "GET, POST")


async def test_a_compressed_body_is_refused_for_what_it_is() -> None:
    async with started(Sums) as app:
        answer = await post(app, "/add", parts=[b"\x1f\x8b"], headers={"content-encoding": "gzip"})
        assert (answer.status, answer.json()["error"]["where"]) == (422, "header content-encoding")


@pytest.mark.parametrize("is_declared", [True, False])
async def test_a_body_above_the_bound_gets_413(is_declared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "REQUEST_BYTES_MAX", 10)
    headers = {"content-length": "12"} if is_declared else {}
    async with started(Sums) as app:
        answer = await post(app, "/add", parts=[b"x" * 6, b"x" * 6], headers=headers)
        assert (answer.status, answer.json()["error"]["kind"]) == (413, "too_large")


@pytest.mark.parametrize(
    ("path", "how", "message"),
    [
        ("/fail", "value", "ValueError: secret place"),
        ("/fail", "exit", "SystemExit: secret place"),
        ("/fail", "stop", "StopIteration: secret place"),
        ("/fail-async", "value", "ValueError: async place"),
        ("/fail-async", "exit", "SystemExit: async place"),
    ],
)
async def test_a_raising_handler_gives_500_with_type_and_message_only(
    path: str, how: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with started(Sums) as app:
        answer = await post(app, path, {"how": how}, headers={"x-request-id": "req-7"})
        error = answer.json()["error"]
        assert (answer.status, error["kind"], error["message"]) == (500, "user_code", message)
        assert error["request_id"] == "req-7"
        assert "test_replica_app" not in answer.body.decode()
        log = capsys.readouterr().err
        assert "req-7" in log
        assert "test_replica_app.py" in log
        assert (await post(app, "/add", {"left": 1})).json() == 2


async def test_a_result_without_json_form_is_the_services_fault() -> None:
    async with started(Sums) as app:
        answer = await post(app, "/odd")
        assert (answer.status, answer.json()["error"]["kind"]) == (500, "user_code")


async def test_a_handler_that_awaits_something_cancelled_still_answers() -> None:
    async with started(Sums) as app:
        answer = await post(app, "/self-cancelled")
        assert (answer.status, answer.json()["error"]["kind"]) == (500, "user_code")


async def test_openapi_names_every_endpoint() -> None:
    async with started(Sums) as app:
        document = (await post(app, "/-/openapi.json", method="GET")).json()
        assert {"/add", "/join", "/raw"} <= set(document["paths"])


async def test_a_client_that_leaves_before_its_body_is_whole_gets_nothing() -> None:
    async with started(Sums) as app:
        caller = Caller(app)
        caller.leave()
        answer = await caller.send("/add", parts=[])
        assert answer.status == 0
        assert (await post(app, "/-/stats", method="GET")).json()["served"] == 0


async def test_a_body_that_does_not_arrive_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "BODY_S_MAX", 0.0)
    async with started(Sums) as app:
        answer = await post(app, "/add", parts=[])
        assert answer.status == 504
        assert answer.json()["error"]["where"] == "body_s_max=0"
        assert (await post(app, "/-/stats", method="GET")).json()["waiting"] == 0


async def test_in_flight_never_exceeds_the_concurrency() -> None:
    release = anyio.Event()

    @sd.service(concurrency=3)
    class Slow:
        @sd.endpoint("/hold")
        async def hold(self) -> int:
            await release.wait()
            return 1

    async with started(Slow) as app:
        statuses: list[int] = []

        async def call() -> None:
            statuses.append((await post(app, "/hold")).status)

        async with anyio.create_task_group() as group:
            for _ in range(50):
                group.start_soon(call)
            with anyio.fail_after(10):
                while len(statuses) < 44:
                    await anyio.lowlevel.checkpoint()
            release.set()
        stats = (await post(app, "/-/stats", method="GET")).json()
    assert sorted(statuses) == [200] * 6 + [503] * 44
    assert (stats["in_flight_peak"], stats["in_flight"], stats["served"]) == (3, 0, 6)

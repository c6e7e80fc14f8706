"""Batches in the replica: who goes together, whose error is whose, who is dropped."""

import time
from collections.abc import AsyncIterator
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
import pytest

import snowdrop as sd
from replica_helpers import Answer, Caller, post, spec_of, started
from snowdrop.domain.calling import CALL_CONTEXT, DEADLINE_HEADER, CallContext
from snowdrop.domain.errors import InvalidInputError
from snowdrop.policy.batching import Costs
from snowdrop.replica.app import ServiceApp
from snowdrop.replica.batching import Batcher

pytestmark = pytest.mark.anyio


class Gated:
    """Calls that the test sees begin and lets end."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.free = anyio.Event()


GATED: dict[str, Gated] = {}


@sd.service()
class Doubles:
    @sd.endpoint("/double", batch=sd.Batch(size_max=4))
    async def double(self, number: list[int]) -> list[int | Exception]:
        gated = GATED["now"]
        gated.sizes.append(len(number))
        await gated.free.wait()
        return [ValueError("unlucky") if each == 13 else 2 * each for each in number]

    @sd.endpoint("/strict", batch=sd.Batch(size_max=8))
    async def strict(self, number: list[int]) -> list[int]:
        await GATED["now"].free.wait()
        if 13 in number:
            raise ValueError(f"one of {number} is unlucky")
        return [2 * each for each in number]

    @sd.endpoint("/split", batch=sd.Batch(size_max=8, on_error="split"))
    async def split(self, number: list[int]) -> list[int]:
        GATED["now"].sizes.append(len(number))
        return await self.strict(number)

    @sd.endpoint("/short", batch=sd.Batch())
    def short(self, number: list[int]) -> list[int]:
        return number[:-1]

    @sd.endpoint("/thread", batch=sd.Batch())
    def thread(self, left: list[int], right: list[str]) -> list[str]:
        return [str(a) + b for a, b in zip(left, right, strict=True)]

    @sd.endpoint("/bytes", batch=sd.Batch())
    def raw(self, size: list[int]) -> list[bytes]:
        return [b"x" * each for each in size]


@pytest.fixture(autouse=True)
def gated() -> Gated:
    GATED["now"] = Gated()
    return GATED["now"]


async def send_all(app: ServiceApp, path: str, numbers: list[int], gated: Gated) -> list[Answer]:
    """All of them, the first one alone in its batch and the rest while it runs; answers in the order sent."""
    answers: dict[int, Answer] = {}

    async def send(place: int, number: int) -> None:
        answers[place] = await post(app, path, {"number": number})

    async with anyio.create_task_group() as tasks:
        for place, number in enumerate(numbers):
            tasks.start_soon(send, place, number)
        await anyio.wait_all_tasks_blocked()
        gated.free.set()
    return [answers[place] for place in range(len(numbers))]


async def stats(app: ServiceApp, path: str) -> dict[str, Any]:
    found: dict[str, Any] = (await post(app, "/-/stats", method="GET")).json()["batches"][path]
    return found


async def test_what_comes_while_a_batch_runs_goes_together_in_order(gated: Gated) -> None:
    async with started(Doubles) as app:
        answers = await send_all(app, "/double", [1, 2, 3, 4, 5, 6], gated)
        assert [answer.json() for answer in answers] == [2, 4, 6, 8, 10, 12]
        assert gated.sizes == [1, 4, 1]  # alone it did not wait; then as many as may; then the rest
        seen = await stats(app, "/double")
        assert (seen["batches"], seen["items"], seen["failed"], seen["sizes"]) == (3, 6, 0, {"1": 2, "4": 1})


async def test_clients_see_single_values(gated: Gated) -> None:
    spec = spec_of(Doubles)
    endpoint = next(each for each in spec.endpoints if each.path == "/double")
    assert endpoint.input_schema["properties"] == {"number": {"type": "integer"}}
    assert endpoint.output_schema == {"type": "integer"}
    gated.free.set()
    async with started(Doubles) as app:
        assert (await post(app, "/double", {"number": [1, 2]})).status == 422
        assert (await post(app, "/thread", {"left": 1, "right": "a"})).json() == "1a"
        answer = await post(app, "/bytes", {"size": 3})
        assert (answer.body, answer.headers["content-type"]) == (b"xxx", "application/octet-stream")


async def test_an_exception_in_the_list_is_the_error_of_its_request_alone(gated: Gated) -> None:
    async with started(Doubles) as app:
        answers = await send_all(app, "/double", [1, 2, 13, 3], gated)
        assert [answer.status for answer in answers] == [200, 200, 500, 200]
        assert answers[2].json()["error"]["message"] == "ValueError: unlucky"
        assert (await stats(app, "/double"))["failed"] == 1


async def test_a_call_that_raises_fails_each_request_of_it(gated: Gated) -> None:
    async with started(Doubles) as app:
        answers = await send_all(app, "/strict", [1, 2, 13, 3], gated)
        assert [answer.status for answer in answers] == [200, 500, 500, 500]  # the first one went before


async def test_a_failing_batch_is_halved_until_the_culprit_stands_alone(gated: Gated) -> None:
    async with started(Doubles) as app:
        answers = await send_all(app, "/split", [1, 2, 13, 3, 4], gated)
        assert [answer.status for answer in answers] == [200, 200, 500, 200, 200]
        assert answers[4].json() == 8
        assert gated.sizes == [1, 4, 2, 1, 1, 2]


async def test_a_list_of_another_length_is_told_to_each() -> None:
    async with started(Doubles) as app:
        answer = await post(app, "/short", {"number": 1})
        assert answer.status == 500
        assert "returned 0 results for a batch of 1 requests" in answer.json()["error"]["message"]


async def test_a_caller_that_goes_before_the_batch_starts_is_not_in_it(gated: Gated) -> None:
    async with started(Doubles) as app, anyio.create_task_group() as tasks:
        tasks.start_soon(post, app, "/double", {"number": 1})
        await anyio.wait_all_tasks_blocked()
        head, other = Caller(app), Caller(app)
        tasks.start_soon(head.send, "/double", {"number": 2})
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(other.send, "/double", {"number": 3})
        await anyio.wait_all_tasks_blocked()
        head.leave()  # the next in the queue leads now
        await anyio.wait_all_tasks_blocked()
        gated.free.set()
        await anyio.wait_all_tasks_blocked()
        assert gated.sizes == [1, 1]
        assert other.answer.json() == 6


async def test_a_leader_that_goes_away_leaves_its_batch_running(gated: Gated) -> None:
    async with started(Doubles) as app, anyio.create_task_group() as tasks:
        tasks.start_soon(post, app, "/double", {"number": 1})
        await anyio.wait_all_tasks_blocked()
        first = gated.free
        leader, other = Caller(app), Caller(app)
        for caller in (leader, other):
            tasks.start_soon(caller.send, "/double", {"number": 3})
            await anyio.wait_all_tasks_blocked()
        gated.free = anyio.Event()
        first.set()
        await anyio.wait_all_tasks_blocked()
        assert gated.sizes == [1, 2]
        leader.leave()
        await anyio.wait_all_tasks_blocked()
        gated.free.set()
        await anyio.wait_all_tasks_blocked()
        assert (other.answer.status, other.answer.json()) == (200, 6)
        assert leader.answer.status == 0


async def test_a_batch_that_nobody_waits_for_is_cancelled() -> None:
    ended = anyio.Event()

    @sd.service()
    class Slow:
        @sd.endpoint("/slow", batch=sd.Batch(size_max=2))
        async def slow(self, number: list[int]) -> list[int]:
            try:
                await anyio.sleep_forever()
            finally:
                ended.set()
            return number

    async with started(Slow) as app, anyio.create_task_group() as tasks:
        caller = Caller(app)
        tasks.start_soon(caller.send, "/slow", {"number": 1})
        await anyio.wait_all_tasks_blocked()
        caller.leave()
        with anyio.fail_after(5):
            await ended.wait()


async def test_a_request_whose_deadline_has_passed_is_dropped_with_an_error(gated: Gated) -> None:
    async with started(Doubles) as app, anyio.create_task_group() as tasks:
        tasks.start_soon(post, app, "/double", {"number": 1})
        await anyio.wait_all_tasks_blocked()
        late = Caller(app)

        async def send_late() -> None:
            await late.send("/double", {"number": 2}, headers={DEADLINE_HEADER: str(time.time() - 1)})

        tasks.start_soon(send_late)
        await anyio.wait_all_tasks_blocked()
        gated.free.set()
        await anyio.wait_all_tasks_blocked()
        assert gated.sizes == [1]
        assert (late.answer.status, late.answer.json()["error"]["kind"]) == (504, "timed_out")


async def test_one_is_held_back_for_the_next_where_that_pays() -> None:
    """A call costs a second, requests come every millisecond: the first waits, and goes as soon as it is full."""
    sizes: list[int] = []

    async def call(arguments: dict[str, Any]) -> list[int]:
        sizes.append(len(arguments["number"]))
        return list(arguments["number"])

    batcher = Batcher(sd.Batch(size_max=2, wait_ms_max=10_000), call, "here", clock=lambda: 0.0)
    batcher._costs = Costs().learned(1, 1.0)
    batcher._gap_s = 0.001
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(batcher.submit, {"number": 1})
        await anyio.wait_all_tasks_blocked()
        assert sizes == []
        assert await batcher.submit({"number": 2}) == 2
    assert sizes == [2]


async def test_the_next_leads_when_the_one_that_held_the_batch_back_leaves() -> None:
    sizes: list[int] = []
    now_s = 0.0

    async def call(arguments: dict[str, Any]) -> list[int]:
        sizes.append(len(arguments["number"]))
        return list(arguments["number"])

    batcher = Batcher(sd.Batch(size_max=3, wait_ms_max=10_000), call, "here", clock=lambda: now_s)
    batcher._costs = Costs().learned(1, 1.0)
    batcher._gap_s = 0.001
    first = anyio.CancelScope()

    async def leave() -> None:
        with first:
            await batcher.submit({"number": 1})

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(leave)
            await anyio.wait_all_tasks_blocked()
            tasks.start_soon(batcher.submit, {"number": 2})
            await anyio.wait_all_tasks_blocked()
            assert sizes == []
            now_s = 100.0
            first.cancel()
    assert sizes == [1]


async def test_a_lull_ends_the_hold() -> None:
    async def call(arguments: dict[str, Any]) -> list[int]:
        return list(arguments["number"])

    batcher = Batcher(sd.Batch(size_max=2, wait_ms_max=1), call, "here")
    batcher._costs = Costs().learned(1, 1.0)
    batcher._gap_s = 1e-6
    with anyio.fail_after(10):
        assert await batcher.submit({"number": 1}) == 1


async def test_several_batches_run_at_a_time_where_they_may(gated: Gated) -> None:
    @sd.service()
    class Two:
        @sd.endpoint("/two", batch=sd.Batch(size_max=1, in_flight_max=2))
        async def two(self, number: list[int]) -> list[int]:
            gated.sizes.append(len(number))
            await gated.free.wait()
            return number

    async with started(Two) as app, anyio.create_task_group() as tasks:
        for number in range(3):
            tasks.start_soon(post, app, "/two", {"number": number})
        await anyio.wait_all_tasks_blocked()
        assert gated.sizes == [1, 1]
        gated.free.set()


@pytest.mark.parametrize(("after", "most"), [((70, 80), 80), ((90, 80, None), None)])
async def test_calls_of_a_batch_have_the_time_of_the_most_patient_caller(
    after: tuple[int | None, ...], most: int | None
) -> None:
    now = time.time()
    seen: list[CallContext | None] = []

    async def call(arguments: dict[str, Any]) -> list[int]:
        seen.append(CALL_CONTEXT.get())
        await anyio.lowlevel.checkpoint()
        return list(arguments["number"])

    batcher = Batcher(sd.Batch(size_max=3, in_flight_max=1), call, "here")

    async def submit(deadline_unix_s: float | None) -> None:
        CALL_CONTEXT.set(CallContext(request_id=f"req-{deadline_unix_s}", deadline_unix_s=deadline_unix_s))
        await batcher.submit({"number": 1})

    async with anyio.create_task_group() as tasks:
        for after_s in (60, *after):
            tasks.start_soon(submit, None if after_s is None else now + after_s)
    # The first one went alone; the others came while it ran.
    assert [context.deadline_unix_s for context in seen if context is not None] == [
        now + 60,
        None if most is None else now + most,
    ]


async def test_nothing_is_lost_or_doubled_whatever_comes_and_goes() -> None:
    """Many callers, some of which leave at any moment: each that stays gets its own answer."""
    served: list[int] = []

    @sd.service(concurrency=64)
    class Echo:
        @sd.endpoint("/echo", batch=sd.Batch(size_max=8, in_flight_max=2))
        async def echo(self, number: list[int]) -> list[int]:
            for _ in range(number[0] % 5):
                await anyio.lowlevel.checkpoint()
            served.extend(number)
            return number

    callers: dict[int, Caller] = {}
    async with started(Echo) as app:
        async with anyio.create_task_group() as tasks:
            for number in range(60):
                caller = callers[number] = Caller(app)
                tasks.start_soon(caller.send, "/echo", {"number": number})
                if number % 3 == 0:
                    await anyio.lowlevel.checkpoint()
                if number % 7 == 0:
                    callers[number // 2].leave()
        stayed = [number for number in callers if callers[number].answer.status]
        assert [callers[number].answer.json() for number in stayed] == stayed
        assert set(stayed) >= set(range(31, 60))
        assert len(served) == len(set(served))


def test_what_cannot_be_batched_is_refused_with_the_place() -> None:
    async def stream(self: object, text: list[str]) -> AsyncIterator[str]:
        yield text[0]

    def scalar(self: object, text: str) -> list[str]:
        return [text]

    def default(self: object, text: list[str] = []) -> list[str]:  # noqa: B006
        return text

    def nothing(self: object) -> list[str]:
        return []

    def one(self: object, text: list[str]) -> str:
        return text[0]

    def only_errors(self: object, text: list[str]) -> list[Exception]:
        return []

    wanted = {
        stream: "streams",
        scalar: "`text` of the batched Odd.scalar is no list",
        default: "has a default",
        nothing: "takes nothing",
        one: "does not return a list",
        only_errors: "nothing but exceptions",
    }
    for function, text in wanted.items():
        function.__qualname__ = f"Odd.{function.__name__}"
        method = sd.endpoint("/odd", batch=sd.Batch())(function)
        with pytest.raises(InvalidInputError, match=text.replace("|", r"\|")):
            sd.service()(type("Odd", (), {function.__name__: method}))


def test_concurrency_must_let_a_batch_fill_and_follows_from_it() -> None:
    def double(self: object, number: list[int]) -> list[int]:
        return number

    batched = sd.endpoint("/double", batch=sd.Batch(size_max=16, in_flight_max=2))(double)
    assert spec_of(sd.service()(type("Free", (), {"double": batched}))).concurrency == 48
    with pytest.raises(InvalidInputError, match="lets in 8 requests at a time, `size_max` is 16"):
        sd.service(concurrency=8)(type("Tight", (), {"double": batched}))


@pytest.mark.parametrize(
    "wrong", [{"size_max": 0}, {"size_max": "8"}, {"wait_ms_max": -1}, {"in_flight_max": 0}, {"on_error": "x"}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=f"batch.{next(iter(wrong))}"):
        sd.Batch(**wrong)


def test_a_spec_without_batches_from_before_still_decodes() -> None:
    spec = spec_of(Doubles)
    assert msgspec.json.decode(msgspec.json.encode(spec), type=type(spec)) == spec

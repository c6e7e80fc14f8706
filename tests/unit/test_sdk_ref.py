"""References to other services: what a call sends, what its answers and errors become."""

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, Protocol

import anyio
import anyio.to_thread
import msgspec
import pytest

import snowdrop as sd
from replica_helpers import post, spec_of, started
from snowdrop.domain.calling import CALL_CONTEXT, DEADLINE_HEADER, LEASE_HEADER, CallContext, get_transport
from snowdrop.domain.errors import InvalidInputError, QueueFullError
from snowdrop.sdk.ref import make_call

pytestmark = pytest.mark.anyio


class Vector(msgspec.Struct):
    values: list[float]
    text: str = ""


@sd.service(concurrency=8)
class Embed:
    @sd.endpoint("/embed")
    async def embed(self, texts: list[str], scale: float = 1.0) -> list[Vector]:
        return [Vector(values=[scale * len(text)], text=text) for text in texts]

    @sd.endpoint("/count")
    def count(self, text: str) -> int:
        return len(text)

    @sd.endpoint("/letters")
    async def letters(self, text: str) -> AsyncIterator[str]:
        for letter in text:
            if letter == "!":
                raise ValueError("no shouting")
            yield letter

    @sd.endpoint("/slowly")
    def slowly(self, text: str) -> Iterator[str]:
        yield from text

    @sd.endpoint("/raw")
    async def raw(self, size: int) -> bytes:
        return b"x" * size

    @sd.endpoint("/full")
    async def full(self) -> str:
        raise QueueFullError("too many wait", retry_after_s=7.0)

    @sd.endpoint("/length", batch=sd.Batch(size_max=4))
    async def length(self, text: list[str]) -> list[int | Exception]:
        return [ValueError("empty") if not each else len(each) for each in text]


class Speller(Protocol):
    async def embed(self, texts: list[str]) -> list[Vector]: ...

    @sd.endpoint("/letters")
    def spell(self, text: str) -> AsyncIterator[str]: ...


plain = sd.ref("embed")
typed = sd.ref("embed", Embed)
spelling = sd.ref("embed", Speller)


@pytest.fixture(name="stubbed")
def _stubbed() -> Iterator[None]:
    with sd.stub(embed=Embed):
        yield


@pytest.mark.usefixtures("stubbed")
class TestCalls:
    async def test_a_plain_call_gives_decoded_json_or_bytes(self) -> None:
        assert await plain("/embed", {"texts": ["ab"]}) == [{"values": [2.0], "text": "ab"}]
        assert await plain("/raw", {"size": 2}) == b"xx"
        assert await plain("/count?text=abc", method="GET") == 3

    async def test_a_typed_call_takes_and_gives_the_types_of_the_method(self) -> None:
        assert await typed.embed(["ab"], scale=2.0) == [Vector(values=[4.0], text="ab")]
        assert await spelling.embed(texts=["a"]) == [Vector(values=[1.0], text="a")]
        assert await typed.raw(2) == b"xx"

    async def test_streams_come_item_by_item(self) -> None:
        assert [item async for item in plain.stream("/letters", {"text": "abc"})] == ["a", "b", "c"]
        assert [item async for item in typed.letters("abc")] == ["a", "b", "c"]
        assert [item async for item in spelling.spell("abc")] == ["a", "b", "c"]

    async def test_threads_call_and_iterate(self) -> None:
        def work() -> tuple[Any, int, list[str], list[Any]]:
            called = plain.call("/count", {"text": "abc"})
            return (
                called,
                typed.count("ab"),
                list(typed.slowly("xy")),
                list(plain.iterate("/letters", {"text": "z"})),
            )

        assert await anyio.to_thread.run_sync(work) == (3, 2, ["x", "y"], ["z"])

    async def test_a_blocking_call_on_the_loop_is_refused(self) -> None:
        with pytest.raises(InvalidInputError, match="would hold up the event loop"):
            plain.call("/count", {"text": "abc"})
        with pytest.raises(InvalidInputError, match=r"sd\.acall"):
            typed.count("abc")
        assert await sd.acall(typed.count, "abc") == 3

    async def test_a_batched_method_is_called_with_lists_and_errors_stay_in_them(self) -> None:
        lengths = await typed.length(["a", "", "abc"])
        assert lengths[0] == 1
        assert lengths[2] == 3
        assert isinstance(lengths[1], sd.CallFailedError)
        with pytest.raises(InvalidInputError, match="has no endpoint to call"):
            sd.ref("embed", Vector)

    async def test_an_error_names_the_way_and_is_not_the_callers_fault(self) -> None:
        with pytest.raises(sd.CallFailedError) as failed:
            await plain("/embed", {"text": []})
        assert (failed.value.http_status, failed.value.kind) == (502, "call_failed")
        assert failed.value.where.startswith("embed/embed > ")
        assert failed.value.error is not None
        assert failed.value.error.kind == "invalid_input"
        with pytest.raises(sd.CallUnavailableError) as full:
            await plain("/full")
        assert (full.value.http_status, full.value.retry_after_s) == (503, 7.0)

    async def test_a_stream_that_fails_raises_where_it_stands(self) -> None:
        got = []

        async def read() -> None:
            async for letter in plain.stream("/letters", {"text": "ab!c"}):
                got.append(letter)  # noqa: PERF401 -- what came before the failure is the point

        with pytest.raises(sd.CallFailedError, match="no shouting"):
            await read()
        assert got == ["a", "b"]

    async def test_a_failure_two_calls_away_tells_the_whole_way(self) -> None:
        @sd.service()
        class Middle:
            @sd.endpoint("/middle")
            async def middle(self) -> str:
                return str(await sd.ref("embed")("/letter", {}))

        with sd.stub(embed=Embed(), middle=Middle()), pytest.raises(sd.CallFailedError) as failed:
            await sd.ref("middle")("/middle")
        assert failed.value.where == "middle/middle > embed/letter > /letter"
        assert "not_found" in failed.value.message


class TestWhatACallCarries:
    def test_time_trace_id_and_slot_of_the_request_go_on(self) -> None:
        deadline = time.time() + 60
        mark = CALL_CONTEXT.set(
            CallContext(
                request_id="req-1", traceparent="00-a-b-01", tracestate="x=y", deadline_unix_s=deadline, lease="7"
            )
        )
        try:
            call = make_call("embed", "/x", {"a": 1}, headers={"Accept": "z"})
            short = make_call("embed", "/x", {}, timeout_s=5.0)
        finally:
            CALL_CONTEXT.reset(mark)
        assert call.headers["x-request-id"] == "req-1"
        assert call.headers["traceparent"] == "00-a-b-01"
        assert call.headers["tracestate"] == "x=y"
        assert call.headers[LEASE_HEADER] == "7"
        assert call.headers["accept"] == "z"
        assert float(call.headers[DEADLINE_HEADER]) == pytest.approx(deadline, abs=0.1)
        assert (call.body, call.headers["content-type"]) == (b'{"a":1}', "application/json")
        assert short.timeout_s == 5.0

    def test_a_call_whose_time_is_over_is_not_made(self) -> None:
        mark = CALL_CONTEXT.set(CallContext(deadline_unix_s=time.time() - 1))
        try:
            with pytest.raises(sd.CallTimedOutError):
                make_call("embed", "/x", {})
        finally:
            CALL_CONTEXT.reset(mark)

    async def test_the_replica_sets_it_from_the_headers_of_the_request(self) -> None:
        seen: list[CallContext | None] = []

        @sd.service(concurrency=2)
        class Service:
            @sd.endpoint("/thread")
            def thread(self) -> None:
                seen.append(CALL_CONTEXT.get())

            @sd.endpoint("/loop")
            async def loop(self) -> None:
                seen.append(CALL_CONTEXT.get())

        headers = {"x-request-id": "req-9", DEADLINE_HEADER: "123.5", LEASE_HEADER: "4", "tracestate": "a=b"}
        async with started(Service) as app:
            await post(app, "/thread", headers=headers)
            await post(app, "/loop", headers={**headers, DEADLINE_HEADER: "soon"})
        wanted = CallContext(request_id="req-9", tracestate="a=b", deadline_unix_s=123.5, lease="4")
        assert seen == [wanted, msgspec.structs.replace(wanted, deadline_unix_s=None)]

    async def test_a_call_that_takes_too_long_times_out(self) -> None:
        async def never(path: str, body: object) -> None:
            await anyio.sleep_forever()

        with sd.stub(embed=never), pytest.raises(sd.CallTimedOutError):
            await plain("/x", timeout_s=0.01)


class TestStandIns:
    async def test_an_attribute_is_replaced_like_any_other(self) -> None:
        class Fake:
            async def __call__(self, path: str, body: object) -> str:
                return f"{path} {body}"

        @sd.service()
        class Uses:
            other = sd.ref("other")

            @sd.endpoint("/use")
            async def use(self) -> str:
                return str(await self.other("/x", {"a": 1}))

        service = Uses()
        service.other = Fake()  # type: ignore[assignment]
        assert await service.use() == "/x {'a': 1}"

    async def test_functions_stand_in(self) -> None:
        with sd.stub({"a-b": lambda path, body: {"path": path, "body": body}}):
            assert await sd.ref("a-b")("/x", [1]) == {"path": "/x", "body": [1]}
        assert get_transport() is None

    async def test_without_any_the_error_says_what_to_do(self) -> None:
        with pytest.raises(InvalidInputError, match=r"sd\.stub"):
            await plain("/embed", {"texts": []})
        with sd.stub(other=Embed), pytest.raises(sd.CallFailedError, match="no stand-in for 'embed'"):
            await plain("/embed", {"texts": []})
        with pytest.raises(InvalidInputError, match="can't stand in"), sd.stub(embed=3):
            pass

    async def test_a_call_is_cancelled_with_its_caller(self) -> None:
        began, ended = anyio.Event(), anyio.Event()

        async def never(path: str, body: object) -> None:
            began.set()
            try:
                await anyio.sleep_forever()
            finally:
                ended.set()

        with sd.stub(embed=never):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(plain, "/x")
                await began.wait()
                tasks.cancel_scope.cancel()
        assert ended.is_set()


class TestFanOut:
    async def test_results_keep_the_order_and_the_bound_holds(self) -> None:
        running = peak = 0

        async def work(number: int) -> int:
            nonlocal running, peak
            running += 1
            peak = max(peak, running)
            for _ in range(5 - number):
                await asyncio.sleep(0)
            running -= 1
            return number

        assert await sd.gather(*(work(number) for number in range(5)), at_once_max=2) == [0, 1, 2, 3, 4]
        assert peak == 2

    async def test_the_first_failure_ends_the_others_and_is_raised_bare(self) -> None:
        ended = anyio.Event()

        async def fail() -> int:
            raise ValueError("no")

        async def wait() -> int:
            try:
                await anyio.sleep_forever()
            finally:
                ended.set()
            return 1

        with pytest.raises(ValueError, match="no"):
            await sd.gather(wait(), fail())
        assert ended.is_set()
        results = await sd.gather(fail(), asyncio.sleep(0, 5), return_errors=True)
        assert (str(results[0]), results[1]) == ("no", 5)


class TestWhatIsDeclared:
    def test_references_of_class_and_module_are_what_a_service_may_call(self) -> None:
        @sd.service(calls=["by-hand"])
        class Uses:
            other = sd.ref("other")
            again = sd.ref("typed-one", Embed)

            @sd.endpoint("/use")
            async def use(self) -> str:
                return ""

        assert spec_of(Uses).calls == ("by-hand", "embed", "other", "typed-one")  # `embed` is this module's

    def test_wrong_names_are_refused(self) -> None:
        with pytest.raises(InvalidInputError, match="deployment name"):
            sd.ref("No/Name")
        with pytest.raises(InvalidInputError, match="deployment name"):
            sd.service(calls="No Name")(type("Uses", (), {"use": Embed.embed}))

    def test_a_service_that_calls_nobody_has_no_calls(self) -> None:
        cls = type("Alone", (), {"embed": Embed.embed, "__module__": "elsewhere"})
        assert spec_of(sd.service()(cls)).calls == ()


def test_the_sdk_with_references_loads_no_server_and_no_event_loop() -> None:
    code = (
        "import sys, snowdrop as sd; sd.ref('x'); sd.service; print([m for m in "
        "('asyncio', 'anyio', 'aiohttp', 'uvicorn', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"

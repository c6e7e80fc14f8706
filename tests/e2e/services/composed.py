"""Services that call each other, all with one slot."""

from collections.abc import AsyncIterator

import anyio

import snowdrop as sd
from snowdrop.domain.calling import CALL_CONTEXT

ONE = sd.Scale(min=0, max=1, idle_s=60)


@sd.service(scale=ONE)
class Child:
    def __init__(self) -> None:
        self.cancelled = 0

    @sd.endpoint("/double")
    async def double(self, number: int) -> int:
        return 2 * number

    @sd.endpoint("/context")
    async def context(self) -> dict[str, str | float | None]:
        context = CALL_CONTEXT.get()
        assert context is not None
        return {
            "request_id": context.request_id,
            "trace": context.traceparent.split("-")[1] if context.traceparent else "",
            "deadline": context.deadline_unix_s,
        }

    @sd.endpoint("/letters")
    async def letters(self, text: str) -> AsyncIterator[str]:
        for letter in text:
            yield letter

    @sd.endpoint("/for-ever")
    async def for_ever(self) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            self.cancelled += 1

    @sd.endpoint("/cancelled")
    async def count(self) -> int:
        return self.cancelled


@sd.service(scale=ONE)
class Parent:
    child = sd.ref("child", Child)
    plain = sd.ref("child")

    @sd.endpoint("/add")
    async def add(self, numbers: list[int]) -> int:
        return sum(await sd.gather(*(self.child.double(number) for number in numbers)))

    @sd.endpoint("/context")
    async def context(self) -> dict[str, str | float | None]:
        return await self.child.context()

    @sd.endpoint("/letters")
    async def letters(self, text: str) -> AsyncIterator[str]:
        async for letter in self.child.letters(text):
            yield letter.upper()

    @sd.endpoint("/thread")
    def thread(self, number: int) -> int:
        answer = self.plain.call("/double", {"number": number})
        assert isinstance(answer, int)
        return answer

    @sd.endpoint("/for-ever")
    async def for_ever(self) -> None:
        await self.child.for_ever()

    @sd.endpoint("/undeclared")
    async def undeclared(self) -> str:
        return str(await sd.Ref("circle-one")("/start", {}))


@sd.service(scale=ONE, calls=["circle-two"])
class CircleOne:
    @sd.endpoint("/start")
    async def start(self) -> str:
        return str(await sd.Ref("circle-two")("/back", {}))


@sd.service(scale=ONE, calls=["circle-one"])
class CircleTwo:
    @sd.endpoint("/back")
    async def back(self) -> str:
        return str(await sd.Ref("circle-one")("/start", {}))

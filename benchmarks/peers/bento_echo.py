"""The echo service on BentoML, as its documentation would write it: `bentoml serve bento_echo:Echo`."""

import json
from collections.abc import AsyncGenerator

import bentoml


@bentoml.service(workers=1, traffic={"max_concurrency": 512}, metrics={"enabled": True})
class Echo:
    @bentoml.api(route="/echo")
    async def echo(self, text: str) -> dict:
        return {"text": text}

    @bentoml.api(route="/events")
    async def events(self, count: int) -> AsyncGenerator[str, None]:
        for number in range(count):
            yield "data: " + json.dumps({"number": number}) + "\n\n"

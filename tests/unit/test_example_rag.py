"""The example of composition, with stand-ins for the deployments that it calls."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import snowdrop as sd
from replica_helpers import Caller
from snowdrop.replica.app import build_service
from snowdrop.sdk.load import load_service

pytestmark = pytest.mark.anyio
EXAMPLE = Path(__file__).parents[2] / "examples" / "rag" / "service.py"
WORDS = ("snowdrop", "flowers", "saffron", "crocus", "yellow", "night")


@sd.service(concurrency=4)
class Embed:
    """Counts a few words: close to what an embedder does, and known beforehand."""

    calls: list[int] = []  # noqa: RUF012 -- of the one stand-in

    @sd.endpoint("/v1/embeddings")
    def embed(self, request: sd.EmbeddingRequest) -> sd.Embeddings:
        Embed.calls.append(len(request.texts))
        return sd.Embeddings(vectors=[[float(text.lower().count(w)) for w in WORDS] for text in request.texts])


@sd.service(concurrency=4)
class Chat:
    asked: list[sd.ChatRequest] = []  # noqa: RUF012

    @sd.endpoint("/v1/chat/completions")
    async def chat(self, request: sd.ChatRequest) -> AsyncIterator[str]:
        Chat.asked.append(request)
        for piece in ("From ", "January ", "on."):
            yield piece


@pytest.fixture
def rag(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "service", raising=False)
    Embed.calls.clear()
    Chat.asked.clear()
    yield load_service(EXAMPLE, None)
    sys.modules.pop("service", None)


async def test_a_question_is_answered_from_the_passages_that_fit(rag: Any) -> None:
    cls, spec = rag
    assert spec.calls == ("chat", "embed")
    app = build_service(cls, spec)
    await app.start({})
    with sd.stub(embed=Embed, chat=Chat):
        found = await Caller(app).send("/search", {"question": "Where does saffron of the crocus come from?"})
        streamed = await Caller(app).send("/ask", {"question": "When does the snowdrop flower?"})
        question = [{"role": "user", "content": "Which flowers are yellow at night?"}]
        answered = await Caller(app).send("/v1/chat/completions", {"model": "rag", "messages": question})
    await app.shutdown()
    assert found.json()[0].startswith("The crocus opens in February.")
    assert streamed.body.decode() == 'data: "From "\n\ndata: "January "\n\ndata: "on."\n\n'
    assert answered.json()["choices"][0]["message"]["content"] == "From January on."
    facts = Chat.asked[-1].messages[0].text
    assert "winter aconite" in facts
    assert facts.count("\n- ") == 3
    assert sorted(Embed.calls) == [1, 1, 1, 6], "the documents are embedded once"

"""Answers questions about a few documents: one deployment finds the passages that fit, another writes answers."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio

import snowdrop as sd

DOCUMENTS = Path(__file__).with_name("documents.txt")
PASSAGES = 3
TOKENS_MAX = 120

Vector = list[float]


@sd.service(concurrency=8, scale=sd.Scale(min=0, max=2, idle_s=60))
class Rag:
    embed = sd.ref("embed")
    chat = sd.ref("chat")

    @sd.startup
    def load(self) -> None:
        self.passages = [each.strip() for each in DOCUMENTS.read_text().split("\n\n") if each.strip()]
        self.vectors: list[Vector] = []
        self.indexing = anyio.Lock()

    @sd.endpoint("/search")
    async def search(self, question: str, count: int = PASSAGES) -> list[str]:
        """The passages that come closest to the question, the best first."""
        (asked,), vectors = await sd.gather(self.vectors_of([question]), self.index())
        ranked = sorted(range(len(vectors)), key=lambda at: -dot(asked, vectors[at]))
        return [self.passages[at] for at in ranked[:count]]

    @sd.endpoint("/ask")
    async def ask(self, question: str) -> AsyncIterator[str]:
        """The answer, piece by piece."""
        async for text in self.answer(question):
            yield text

    @sd.endpoint("/v1/chat/completions")
    async def complete(self, request: sd.ChatRequest) -> AsyncIterator[str]:
        """The same for OpenAI's clients, who name it as `model`."""
        async for text in self.answer(request.messages[-1].text):
            yield text

    async def answer(self, question: str) -> AsyncIterator[str]:
        found = "\n".join(f"- {passage}" for passage in await self.search(question))
        messages = [
            {"role": "system", "content": f"Answer in one sentence, from these facts alone:\n{found}"},
            {"role": "user", "content": question},
        ]
        body: dict[str, Any] = {"model": "chat", "messages": messages, "max_tokens": TOKENS_MAX, "temperature": 0}
        async for chunk in self.chat.stream("/v1/chat/completions", {**body, "stream": True}):
            for choice in chunk["choices"]:
                text = choice["delta"].get("content")
                if text:
                    yield text

    async def vectors_of(self, texts: list[str]) -> list[Vector]:
        answer = await self.embed("/v1/embeddings", {"model": "embed", "input": texts})
        return [each["embedding"] for each in answer["data"]]

    async def index(self) -> list[Vector]:
        """The passages' vectors, asked for once: the first question wakes the embedder anyway."""
        async with self.indexing:
            if not self.vectors:
                self.vectors = await self.vectors_of(self.passages)
        return self.vectors


def dot(one: Vector, other: Vector) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))

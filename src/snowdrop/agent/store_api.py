"""What control asks an agent for about stored content, over HTTP: figures, verification, pins, eviction.

Long work answers in lines of JSON: how far it is, and a last one that says that it is done, or the error.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import TypeVar

import anyio
import msgspec
from aiohttp import web

from snowdrop.agent.dataplane.client import DataPlane
from snowdrop.domain.errors import InvalidInputError, SnowdropError
from snowdrop.domain.ids import Digest, fresh_id, parse_digest
from snowdrop.wire.api import ApiError
from snowdrop.wire.dataplane import Completed
from snowdrop.wire.upkeep import (
    AskContent,
    AskStats,
    ContentEvicted,
    ContentTold,
    ContentVerified,
    EvictContent,
    EvictRequest,
    NodeContent,
    PinContent,
    PinRequest,
    StatsTold,
    UnpinContent,
    VerifyContent,
    VerifyRequest,
    WorkLine,
)

VERIFY_STEP_BYTES = 256 << 20
"""Read for one line of progress."""
KEEP_ALIVE_S = 1.0
EVICTED_PER_MESSAGE = 400
BODY_BYTES_MAX = 16 << 20

T = TypeVar("T")
Plane = Callable[[], Awaitable[DataPlane]]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def add_store_routes(app: web.Application, plane: Plane) -> None:
    """`GET /store/stats|content`, `POST /store/verify|pins|evict`, `DELETE /store/pins/{manifest}`."""
    routes = _StoreRoutes(plane)
    app.add_routes(
        [
            web.get("/store/stats", _typed_errors(routes.stats)),
            web.get("/store/content", _typed_errors(routes.content)),
            web.post("/store/verify", _typed_errors(routes.verify)),
            web.post("/store/pins", _typed_errors(routes.pin)),
            web.delete("/store/pins/{manifest}", _typed_errors(routes.unpin)),
            web.post("/store/evict", _typed_errors(routes.evict)),
        ]
    )


class _StoreRoutes:
    def __init__(self, plane: Plane) -> None:
        self._plane = plane

    async def stats(self, _request: web.Request) -> web.StreamResponse:
        plane = await self._plane()
        told = await plane.ask(AskStats, StatsTold)
        return _json(told.stats)

    async def content(self, _request: web.Request) -> web.StreamResponse:
        plane = await self._plane()
        found: list[NodeContent] = []
        while True:
            after = found[-1].manifest if found else ""
            told = await plane.ask(partial(AskContent, after=after), ContentTold)
            found += told.content
            if told.is_last or not told.content:
                return _json(found)

    async def verify(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request, VerifyRequest)
        parse_digest(body.manifest)
        return await _lines(request, self._verified(body))

    async def _verified(self, body: VerifyRequest) -> AsyncIterator[WorkLine]:
        done = 0
        while True:
            plane = await self._plane()
            told = await plane.ask(
                partial(
                    VerifyContent,
                    manifest=body.manifest,
                    key_domain=body.key_domain,
                    first=done,
                    bytes_max=VERIFY_STEP_BYTES,
                ),
                ContentVerified,
            )
            is_done = told.next_chunk >= told.chunk_count
            yield WorkLine(
                done=told.next_chunk,
                total=told.chunk_count,
                read_bytes=told.read_bytes,
                bad=told.bad,
                is_done=is_done,
            )
            if is_done:
                return
            done = told.next_chunk

    async def pin(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request, PinRequest)
        parse_digest(body.manifest)
        plane = await self._plane()
        await plane.ask(
            partial(
                PinContent,
                tenant=body.tenant,
                manifest=body.manifest,
                key_domain=body.key_domain,
                name=body.name,
            ),
            Completed,
        )
        answer = web.StreamResponse(headers={"content-type": "application/x-ndjson"})
        await answer.prepare(request)
        await answer.write(await self._prefetch(plane, body, answer))
        await answer.write_eof()
        return answer

    async def _prefetch(self, plane: DataPlane, body: PinRequest, answer: web.StreamResponse) -> bytes:
        """Brings what was pinned, with an empty line now and then; the last line. The pin stays if it fails."""
        holder = fresh_id("prefetch")

        async def keep_alive() -> None:
            while True:
                await anyio.sleep(KEEP_ALIVE_S)
                await answer.write(msgspec.json.encode(WorkLine()) + b"\n")

        last: WorkLine | ApiError = WorkLine(is_done=True)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(keep_alive)
            try:
                got = await plane.ensure(
                    body.tenant, body.manifest, holder, map_tensors=False, key_domain=body.key_domain
                )
                got.close()
                await plane.wait_directory(body.manifest)
            except SnowdropError as error:
                step = f"{error.next_step}; it stays pinned: `snowdrop store unpin` takes that back".lstrip("; ")
                last = ApiError(error=msgspec.structs.replace(error.body(), next_step=step))
            finally:
                with anyio.CancelScope(shield=True):
                    await plane.release(holder)
            tasks.cancel_scope.cancel()
        return msgspec.json.encode(last) + b"\n"

    async def unpin(self, request: web.Request) -> web.StreamResponse:
        manifest = parse_digest(request.match_info["manifest"])
        plane = await self._plane()
        await plane.ask(partial(UnpinContent, manifest=manifest), Completed)
        return web.Response(status=204)

    async def evict(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request, EvictRequest)
        plane = await self._plane()
        evicted, disk_bytes, ram_bytes = list[Digest](), 0, 0
        for first in range(0, len(body.manifests), EVICTED_PER_MESSAGE):
            some = tuple(parse_digest(text) for text in body.manifests[first : first + EVICTED_PER_MESSAGE])
            told = await plane.ask(
                partial(EvictContent, manifests=some, unused_since_unix_ns=body.unused_since_unix_ns),
                ContentEvicted,
            )
            evicted += told.evicted
            disk_bytes += told.disk_bytes
            ram_bytes += told.ram_bytes
        return _json(ContentEvicted(request=0, evicted=tuple(evicted), disk_bytes=disk_bytes, ram_bytes=ram_bytes))


async def _lines(request: web.Request, lines: AsyncIterator[WorkLine]) -> web.StreamResponse:
    """Each as it comes. An error before the first is the answer's status; a later one is its last line."""
    try:
        first = await anext(lines)
    except StopAsyncIteration:
        return web.Response(status=204)
    answer = web.StreamResponse(headers={"content-type": "application/x-ndjson"})
    await answer.prepare(request)
    await answer.write(msgspec.json.encode(first) + b"\n")
    try:
        async for line in lines:
            await answer.write(msgspec.json.encode(line) + b"\n")
    except SnowdropError as error:
        await answer.write(msgspec.json.encode(ApiError(error=error.body())) + b"\n")
    await answer.write_eof()
    return answer


def _typed_errors(handler: Handler) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except SnowdropError as error:
            return _json(ApiError(error=error.body()), status=error.http_status)

    return handle


async def _body(request: web.Request, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(await request.read(), type=kind)
    except msgspec.DecodeError as error:
        raise InvalidInputError(f"bad request body: {error}", where=request.path) from error


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")

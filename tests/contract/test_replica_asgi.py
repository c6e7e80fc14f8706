"""A replica whose service is an ASGI app, as its agent and the gateway see it, without a sandbox."""

from __future__ import annotations

from pathlib import Path

import anyio.to_thread
import pytest

from replica_helpers import replica_process
from snowdrop.domain.servers import AsgiSpec
from snowdrop.domain.service import Model, ServiceSpec
from snowdrop.wire.replica import Drain, Drained, ModelHandle, Ready, StageFailed

pytestmark = pytest.mark.anyio

STARLETTE = """
import contextlib, os, pathlib
import snowdrop as sd
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute

@contextlib.asynccontextmanager
async def lifespan(app):
    if os.environ.get("FAIL"):
        raise ValueError("no luck")
    yield {"opened": True}
    pathlib.Path("closed").touch()

async def root(request):
    return JSONResponse({"models": sorted(request.state.models), "opened": request.state.opened,
                         "path": request.url.path, "query": request.url.query})

async def count(request):
    async def numbers():
        for number in range(3):
            yield f"{number}\\n"
    return StreamingResponse(numbers(), media_type="text/plain")

async def fail(request):
    raise ValueError("not today")

async def talk(socket):
    await socket.accept()
    async for text in socket.iter_text():
        await socket.send_text(text[::-1])

routes = [Route("/", root), Route("/deep/{rest:path}", root), Route("/count", count), Route("/fail", fail),
          WebSocketRoute("/talk", talk)]
site = sd.asgi(Starlette(routes=routes, lifespan=lifespan), model=sd.Model("m"))
"""
BARE = """
import snowdrop as sd

def make(model):
    async def app(scope, receive, send):
        if scope["type"] != "http":
            raise NotImplementedError(scope["type"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": model.name.encode()})
    return app

site = sd.asgi(make, factory=True, model=sd.Model("m"))
"""
SPEC = ServiceSpec(
    class_name="site", entry="service:site", asgi=AsgiSpec(), models=(Model("m"),), concurrency=4, drain_s_max=5
)
MODEL = ModelHandle(name="m", param="model", directory="/nowhere")


async def test_an_app_lives_through_its_lifespan(tmp_path: Path) -> None:
    with replica_process(tmp_path, STARLETTE, SPEC, models=(MODEL,)) as replica:
        replica.until(Ready)
        async with replica.session() as session:
            async with session.get("/deep/er?x=1") as response:
                said = await response.json()
            assert said == {"models": ["model"], "opened": True, "path": "/deep/er", "query": "x=1"}
            async with session.get("/count") as response:
                assert await response.text() == "0\n1\n2\n"
            async with session.get("/fail") as response:
                assert response.status == 500
            async with session.ws_connect("/talk") as socket:
                await socket.send_str("abc")
                assert await socket.receive_str(timeout=10) == "cba"
        assert not (tmp_path / "closed").exists()
        replica.channel.send_blocking(Drain(drain_s_max=5))
        assert isinstance(await anyio.to_thread.run_sync(replica.receive), Drained)
        code, _ = await anyio.to_thread.run_sync(replica.wait)
    assert code == 0
    assert (tmp_path / "closed").exists()


async def test_a_lifespan_that_fails_fails_the_start(tmp_path: Path) -> None:
    with replica_process(tmp_path, STARLETTE, SPEC, models=(MODEL,), env={"FAIL": "1"}) as replica:
        failed: StageFailed = await anyio.to_thread.run_sync(replica.until, StageFailed)
    assert (failed.stage, failed.error.kind) == ("startup", "user_code")
    assert "ValueError: no luck" in failed.error.message


@pytest.mark.parametrize("lifespan", ["auto", "off", "on"])
async def test_a_factory_gets_the_models_and_an_app_may_know_no_lifespan(tmp_path: Path, lifespan: str) -> None:
    kind = AsgiSpec(is_factory=True, lifespan=lifespan)  # type: ignore[arg-type]
    spec = ServiceSpec(class_name="site", entry="service:site", asgi=kind, models=(Model("m"),))
    with replica_process(tmp_path, BARE, spec, models=(MODEL,)) as replica:
        if lifespan == "on":
            failed: StageFailed = await anyio.to_thread.run_sync(replica.until, StageFailed)
            assert failed.error.message == "NotImplementedError: lifespan"
            return
        replica.until(Ready)
        async with replica.session() as session, session.get("/") as response:
            assert await response.text() == "m"

"""The replica's process as its agent sees it, without a sandbox."""

from pathlib import Path

import aiohttp
import anyio
import anyio.to_thread
import pytest

from replica_helpers import replica_process
from snowdrop.domain.errors import StorageFullError
from snowdrop.domain.service import EndpointSpec, ServiceSpec
from snowdrop.wire.replica import (
    Booted,
    DirectoryReady,
    Drain,
    Drained,
    Imported,
    ModelHandle,
    Ready,
    StageFailed,
    WaitForDirectory,
)

pytestmark = pytest.mark.anyio

CODE = """
import asyncio, os, pathlib

class Service:
    def load(self, **models):
        self.marker = pathlib.Path("released")
        if os.environ.get("READ_PATH"):
            models["model"].path
        exec(os.environ.get("STARTUP", ""))

    async def hello(self, name: str) -> str:
        return os.environ["GREETING"] + name

    async def hold(self) -> str:
        pathlib.Path("held").touch()
        while not self.marker.exists():
            await asyncio.sleep(0.01)
        return "held"

    def fail(self) -> str:
        raise ValueError("not today")

    def close(self):
        pathlib.Path("closed").touch()
"""
SPEC = ServiceSpec(
    class_name="Service",
    entry="service:Service",
    concurrency=4,
    startup_name="load",
    shutdown_name="close",
    endpoints=tuple(EndpointSpec(path=f"/{name}", method_name=name) for name in ("hello", "hold", "fail")),
)
ENV = {"GREETING": "hello "}
MODEL = ModelHandle(name="m", param="model", directory="/nowhere")


async def test_a_life_from_boot_to_drained(tmp_path: Path) -> None:
    with replica_process(tmp_path, CODE, SPEC, env=ENV) as replica:
        booted, imported, ready = replica.receive(), replica.receive(), replica.receive()
        assert isinstance(booted, Booted)
        assert isinstance(imported, Imported)
        assert isinstance(ready, Ready)
        main = [span for span in (*imported.spans, *ready.spans) if not span.parent]
        assert [span.name for span in main] == ["import", "startup"]
        assert main[0].start_unix_ns == booted.unix_ns
        assert main[1].start_unix_ns == main[0].end_unix_ns
        async with replica.session() as session, anyio.create_task_group() as group:
            async with session.post("/hello", json={"name": "you"}) as response:
                assert await response.json() == "hello you"
            async with session.post("/fail") as response:
                assert response.status == 500
            held: list[str] = []

            async def hold() -> None:
                async with session.post("/hold") as response:
                    held.append(await response.json())

            group.start_soon(hold)
            await _appears(tmp_path / "held")
            replica.channel.send_blocking(Drain(drain_s_max=20))
            await _refuses_connections(replica.socket_path)
            assert not (tmp_path / "closed").exists()
            (tmp_path / "released").touch()
        assert held == ["held"]
        assert isinstance(await anyio.to_thread.run_sync(replica.receive), Drained)
        code, stderr = await anyio.to_thread.run_sync(replica.wait)
        assert code == 0
        assert (tmp_path / "closed").exists()
        assert "ValueError: not today" in stderr


async def _appears(path: Path) -> None:
    with anyio.fail_after(10):
        while not path.exists():
            await anyio.sleep(0.005)


async def _refuses_connections(path: Path) -> None:
    with anyio.fail_after(10):
        while True:
            try:
                await (await anyio.connect_unix(path)).aclose()
            except OSError:
                return
            await anyio.sleep(0.01)


@pytest.mark.parametrize(
    ("code", "message", "place"),
    [
        ("x = 1\nraise ValueError('at import')\n", "ValueError: at import", "service.py:2 in <module>"),
        ("import sys\nsys.exit('bye')\n", "SystemExit: bye", "service.py:2 in <module>"),
        ("def broken(:\n", "SyntaxError", "service.py:1"),
    ],
)
async def test_a_module_that_raises_fails_the_import(tmp_path: Path, code: str, message: str, place: str) -> None:
    with replica_process(tmp_path, code, SPEC) as replica:
        failed: StageFailed = replica.until(StageFailed)
        exit_code, stderr = replica.wait()
    assert (failed.stage, failed.error.kind, failed.error.where) == ("import", "user_code", place)
    assert failed.error.message.startswith(message)
    assert "snowdrop logs" in failed.error.next_step
    assert exit_code == 1
    assert message.split(":", maxsplit=1)[0] in stderr


@pytest.mark.parametrize(
    ("startup", "message"),
    [
        ("raise ValueError('no weights')", "ValueError: no weights"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("next(iter(()))", "RuntimeError: StopIteration was raised"),
    ],
)
async def test_a_startup_that_raises_fails_the_stage(tmp_path: Path, startup: str, message: str) -> None:
    with replica_process(tmp_path, CODE, SPEC, env={"STARTUP": startup}) as replica:
        failed: StageFailed = replica.until(StageFailed)
        code, stderr = replica.wait()
    assert (failed.stage, failed.error.message, code) == ("startup", message, 1)
    assert failed.error.where.startswith("service.py:9 in load")
    assert "Traceback" in stderr


@pytest.mark.parametrize("startup", ["", "import time; time.sleep(100)"])
async def test_it_exits_when_the_agent_closes_the_channel(tmp_path: Path, startup: str) -> None:
    with replica_process(tmp_path, CODE, SPEC, env={"STARTUP": startup}) as replica:
        replica.until(Imported if startup else Ready)
        replica.channel.close()
        code, _ = replica.wait()
    assert code != 0


async def test_a_drain_during_startup_ends_it(tmp_path: Path) -> None:
    with replica_process(tmp_path, CODE, SPEC, env={"STARTUP": "import time; time.sleep(100)"}) as replica:
        replica.until(Imported)
        replica.channel.send_blocking(Drain(drain_s_max=1))
        assert isinstance(replica.receive(), Drained)
        assert replica.wait()[0] == 0


@pytest.mark.parametrize("is_full", [False, True])
async def test_a_models_directory_is_waited_for(tmp_path: Path, is_full: bool) -> None:
    error = StorageFullError("no space", where="/models").body() if is_full else None
    with replica_process(tmp_path, CODE, SPEC, models=(MODEL,), env={"READ_PATH": "1"}) as replica:
        replica.until(Imported)
        asked = replica.receive()
        assert isinstance(asked, WaitForDirectory)
        replica.channel.send_blocking(DirectoryReady(model=asked.model, error=error))
        answer = replica.receive()
    if is_full:
        assert isinstance(answer, StageFailed)
        assert answer.error.kind == "storage_full"
    else:
        assert isinstance(answer, Ready)


async def test_a_byte_stream_that_fails_late_is_cut(tmp_path: Path) -> None:
    code = """
from collections.abc import Iterator
class Service:
    def blocks(self) -> Iterator[bytes]:
        yield b"first"
        raise ValueError("late")
"""
    spec = ServiceSpec(
        class_name="Service",
        entry="service:Service",
        endpoints=(EndpointSpec(path="/blocks", method_name="blocks", stream="chunked"),),
    )
    with replica_process(tmp_path, code, spec) as replica:
        replica.until(Ready)
        async with replica.session() as session, session.post("/blocks") as response:
            assert response.status == 200
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()


async def test_what_outlasts_a_drain_is_told_so_and_its_caller_too(tmp_path: Path) -> None:
    code = """
import asyncio, pathlib, threading
from collections.abc import AsyncIterator
import snowdrop as sd

class Service:
    def __init__(self):
        self.told = threading.Event()

    def hold(self) -> str:
        pathlib.Path("held").touch()
        while not sd.cancelled():
            self.told.wait(0.01)
        self.told.set()
        return "too late"

    async def stream(self) -> AsyncIterator[int]:
        yield 1
        pathlib.Path("streaming").touch()
        await asyncio.sleep(60)

    def close(self):
        assert self.told.is_set(), "the handler was not told"
"""
    spec = ServiceSpec(
        class_name="Service",
        entry="service:Service",
        concurrency=2,
        shutdown_name="close",
        endpoints=tuple(EndpointSpec(path=f"/{name}", method_name=name) for name in ("hold", "stream")),
    )
    with replica_process(tmp_path, code, spec) as replica:
        replica.until(Ready)
        answers: dict[str, tuple[int, str]] = {}
        async with replica.session() as session, anyio.create_task_group() as group:

            async def call(path: str) -> None:
                async with session.post(path) as response:
                    answers[path] = (response.status, await response.text())

            group.start_soon(call, "/hold")
            group.start_soon(call, "/stream")
            await _appears(tmp_path / "held")
            await _appears(tmp_path / "streaming")
            replica.channel.send_blocking(Drain(drain_s_max=0.1))
            assert isinstance(await anyio.to_thread.run_sync(replica.receive), Drained)
        status, text = answers["/hold"]
        assert status == 504
        assert "drain_s_max=0.1" in text
        status, text = answers["/stream"]
        assert status == 200
        assert text.startswith("data: 1\n\nevent: error\n")
        assert "drain_s_max=0.1" in text

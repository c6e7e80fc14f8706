"""A replica whose service is a command, as its agent and the gateway see it, without a sandbox."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import anyio.to_thread
import pytest

from replica_helpers import ReplicaProcess, replica_process
from snowdrop.domain.servers import CommandSpec
from snowdrop.domain.service import Model, ServiceSpec
from snowdrop.wire.replica import Drain, Drained, ModelHandle, Ready, StageFailed

pytestmark = pytest.mark.anyio
SERVER = str(Path(__file__).parents[1] / "command_server.py")


def command(
    folder: Path, *more: str, listen: tuple[str, ...] = ("--port", "{port}"), **fields: Any
) -> CommandSpec:
    return CommandSpec(argv=("{python}", SERVER, "--folder", str(folder), *listen, *more), **fields)


def service(kind: CommandSpec, **fields: Any) -> ServiceSpec:
    return ServiceSpec(class_name="chat", command=kind, **{"concurrency": 4, **fields})


async def received(replica: ReplicaProcess) -> Any:
    return await anyio.to_thread.run_sync(replica.receive)


async def wait_for(path: Path) -> None:
    with anyio.fail_after(10):
        while not path.exists():
            await anyio.sleep(0.005)


@pytest.mark.parametrize(("listen", "ready"), [(("--port", "{port}"), ""), (("--socket", "{socket}"), "/health")])
async def test_requests_reach_the_server_as_they_were_sent(
    tmp_path: Path, listen: tuple[str, ...], ready: str
) -> None:
    models = (ModelHandle(name="llama-3", param="model", directory=str(tmp_path), has_all_files=True),)
    kind = command(tmp_path, "--model", "{model:llama-3}", listen=listen, ready=ready)
    spec = service(kind, models=(Model("llama-3"),))
    with replica_process(tmp_path, "", spec, models=models) as replica:
        replica.until(Ready)
        async with replica.session() as session:
            async with session.put("/a%2Fb?x=1&x=2", data=b"body", headers={"x-own": "1"}) as response:
                said = await response.json()
                assert response.headers.getall("set-cookie") == ["a=1", "b=2"]
            assert (said["method"], said["target"], said["bytes"]) == ("PUT", "/a%2Fb?x=1&x=2", 4)
            assert said["headers"]["x-own"] == "1"
            assert said["environment"] == {
                "SNOWDROP_MODEL_MODEL": str(tmp_path),
                "SNOWDROP_DEPLOYMENT": "demo",
            }
            assert said["argv"][-1] == str(tmp_path)
            async with session.post("/upload", data=io.BytesIO(bytes(5 << 20))) as response:
                assert await response.json() == 5 << 20
            async with session.head("/x") as response:
                assert response.status == 200
            async with session.get("/-/stats") as response:
                stats = await response.json()
                assert stats["served"] + stats["in_flight"] == 3


async def test_a_stream_comes_piece_by_piece_and_ends_when_its_caller_leaves(tmp_path: Path) -> None:
    with replica_process(tmp_path, "", service(command(tmp_path))) as replica:
        replica.until(Ready)
        async with replica.session() as session:
            async with session.get("/stream") as response:
                assert response.headers["content-type"] == "text/event-stream"
                for number in range(3):
                    assert await response.content.readuntil(b"\n\n") == f"data: {number}\n\n".encode()
                    (tmp_path / f"go-{number}").touch()
                assert await response.content.read() == b""
            async with session.get("/stream?count=9") as response:
                await response.content.readuntil(b"\n\n")
            await wait_for(tmp_path / "cancelled")


async def test_websockets_pass_both_ways_with_protocol_and_close_code(tmp_path: Path) -> None:
    with replica_process(tmp_path, "", service(command(tmp_path))) as replica:
        replica.until(Ready)
        async with replica.session() as session, session.ws_connect("/chat", protocols=("upper",)) as socket:
            assert socket.protocol == "upper"
            await socket.send_str("hello")
            assert (await socket.receive_str(timeout=10)) == "HELLO"
            await socket.send_bytes(b"abc")
            assert (await socket.receive_bytes(timeout=10)) == b"cba"
            await socket.send_str("bye")
            closed = await socket.receive(timeout=10)
            assert (closed.type, closed.data, closed.extra) == (aiohttp.WSMsgType.CLOSE, 4001, "as you wish")


async def test_a_drain_lets_stream_and_websocket_end_and_then_stops_the_server_in_order(tmp_path: Path) -> None:
    with replica_process(tmp_path, "", service(command(tmp_path))) as replica:
        replica.until(Ready)
        async with replica.session() as session:
            async with session.get("/stream?count=1") as response, session.ws_connect("/chat") as socket:
                await response.content.readuntil(b"\n\n")
                replica.channel.send_blocking(Drain(drain_s_max=20))
                await anyio.sleep(0.5)  # past the grace of a drain
                await socket.send_str("still there")
                assert await socket.receive_str(timeout=10) == "STILL THERE"
                assert not (tmp_path / "stopped-in-order").exists()
                (tmp_path / "go-0").touch()
                assert await response.content.read() == b""
            assert isinstance(await received(replica), Drained)
        code, _ = await anyio.to_thread.run_sync(replica.wait)
        assert code == 0
        assert (tmp_path / "stopped-in-order").exists()


async def test_a_server_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    with replica_process(tmp_path, "", service(command(tmp_path, "--stubborn", stop_s_max=0.2))) as replica:
        replica.until(Ready)
        replica.channel.send_blocking(Drain(drain_s_max=1))
        assert isinstance(await received(replica), Drained)
        code, stderr = await anyio.to_thread.run_sync(replica.wait)
    assert code == 0
    assert "did not end within 0.2 s of SIGTERM: killed" in stderr


async def test_the_replica_ends_with_its_command_and_callers_see_it(tmp_path: Path) -> None:
    with replica_process(tmp_path, "", service(command(tmp_path))) as replica:
        replica.until(Ready)
        async with replica.session() as session:
            with pytest.raises((aiohttp.ClientError, AssertionError)):
                async with session.post("/die") as response:
                    assert response.status == 200, "an error answer will do as well"
        code, stderr = await anyio.to_thread.run_sync(replica.wait)
    assert code == 9
    assert "the service's command ended with exit code 9" in stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("{python}", "-c", "import sys; sys.exit('no GPU: {port}')"), "ended with exit code 1"),
        (("no-such-program", "{port}"), "ended with exit code 127"),
        (("/dev/null", "{port}"), "ended with exit code 126"),
        (("{python}", "-c", "import os; os.kill(os.getpid(), 9)", "{port}"), "was ended by SIGKILL"),
    ],
)
async def test_a_command_that_ends_before_it_is_ready_fails_the_start(
    tmp_path: Path, argv: tuple[str, ...], message: str
) -> None:
    with replica_process(tmp_path, "", service(CommandSpec(argv=argv))) as replica:
        failed: StageFailed = await anyio.to_thread.run_sync(replica.until, StageFailed)
        code, stderr = await anyio.to_thread.run_sync(replica.wait)
    assert (failed.stage, failed.error.kind, code) == ("startup", "user_code", 1)
    assert f"the command {message} before it was ready" in failed.error.message
    assert failed.error.where == (argv[0] if argv[0] != "{python}" else sys.executable)
    assert "snowdrop logs" in failed.error.next_step
    if argv[0] == "no-such-program":
        assert "there is no program 'no-such-program'" in stderr


async def test_a_command_that_is_never_ready_is_told_by_the_name_of_its_bound(tmp_path: Path) -> None:
    (tmp_path / "hold-ready").touch()
    with replica_process(tmp_path, "", service(command(tmp_path), startup_s_max=1.5)) as replica:
        failed: StageFailed = await anyio.to_thread.run_sync(replica.until, StageFailed)
    assert (failed.error.kind, failed.error.where) == ("timed_out", "startup_s_max=1.5")
    assert "/health of the command did not answer" in failed.error.message


async def test_it_is_ready_only_when_the_server_says_so(tmp_path: Path) -> None:
    (tmp_path / "hold-ready").touch()
    with replica_process(tmp_path, "", service(command(tmp_path))) as replica:
        async with anyio.create_task_group() as group:
            seen: list[object] = []

            async def watch() -> None:
                seen.append(await anyio.to_thread.run_sync(replica.until, Ready))

            group.start_soon(watch)
            await anyio.sleep(0.7)
            assert not seen
            (tmp_path / "hold-ready").unlink()
        assert isinstance(seen[0], Ready)


async def test_no_more_than_concurrency_reach_the_server_at_once(tmp_path: Path) -> None:
    with replica_process(tmp_path, "", service(command(tmp_path), concurrency=1)) as replica:
        replica.until(Ready)
        async with replica.session() as session:
            async with session.get("/stream?count=1") as first:
                await first.content.readuntil(b"\n\n")
                async with anyio.create_task_group() as group:
                    statuses: list[int] = []

                    async def call() -> None:
                        async with session.get("/x") as response:
                            statuses.append(response.status)

                    group.start_soon(call)
                    await anyio.sleep(0.2)
                    async with session.get("/x") as refused:  # one may wait there, no more
                        assert refused.status == 503
                        assert (await refused.json())["error"]["kind"] == "unavailable"
                    assert not statuses
                    (tmp_path / "go-0").touch()
                    await first.content.read()
            assert statuses == [200]


async def test_the_command_dies_with_its_replica(tmp_path: Path) -> None:
    with replica_process(tmp_path, "", service(command(tmp_path))) as replica:
        replica.until(Ready)
        async with replica.session() as session, session.get("/stream") as response:
            await response.content.readuntil(b"\n\n")
            children = Path(f"/proc/{replica.process.pid}/task/{replica.process.pid}/children").read_text().split()
            assert len(children) == 1
            replica.process.kill()
        with anyio.fail_after(10):
            while Path(f"/proc/{children[0]}").exists():
                if Path(f"/proc/{children[0]}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                    break
                await anyio.sleep(0.01)

"""The supervisor with small processes in the place of control, agent and gateway."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import msgspec
import pytest

from agent_helpers import WAIT_S_MAX, open_fds
from snowdrop.domain.errors import PlatformDownError, TimedOutError
from snowdrop.domain.layout import StateLayout
from snowdrop.domain.secret import KEYS_VARIABLE
from snowdrop.domain.settings import AgentSettings, GatewaySettings, Settings
from snowdrop.engine import local
from snowdrop.engine.local import PlatformRecord, Supervisor, is_running, read_record, take_lock

pytestmark = pytest.mark.anyio

PROCESS = """
import os, signal, socket, sys
name, ready_fd, listen_fd, journal = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
def note(what):
    fd = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{name} {what}\\n".encode())
    os.close(fd)
def stop(*_):
    note("stopped")
    os._exit(0)
signal.signal(signal.SIGTERM, stop)
note("started")
"""
SERVE = PROCESS + "os.write(ready_fd, b'1')\nsignal.pause()\n"
DIE = PROCESS + "print('port is in use'); print('so I end', flush=True); sys.exit(3)\n"
DIE_SILENT = PROCESS + "os._exit(3)\n"
HANG = PROCESS + "signal.pause()\n"
STUBBORN = PROCESS + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nos.write(ready_fd, b'1')\nsignal.pause()\n"
USES_LISTENER = PROCESS + "s = socket.socket(fileno=listen_fd); note(s.getsockname()[1])\n" + SERVE[len(PROCESS) :]


class SupervisorBench:
    def __init__(self, layout: StateLayout, listener: socket.socket) -> None:
        self.layout = layout
        self.listener = listener
        self.journal = layout.root / "journal"
        self.programs = dict.fromkeys(("control", "agent", "gateway"), SERVE)
        self.settings = Settings()
        self.supervisor: Supervisor | None = None
        self.ready = anyio.Event()

    def command(self, name: str, ready_fd: int) -> list[str]:
        program = [sys.executable, "-S", "-c", self.programs[name]]
        return [*program, name, str(ready_fd), str(self.listener.fileno()), str(self.journal)]

    async def run(self) -> None:
        self.supervisor = Supervisor(self.layout, self.settings, self.listener, self.command)
        lock = take_lock(self.layout)
        assert lock is not None
        try:
            with anyio.fail_after(WAIT_S_MAX):
                await self.supervisor.run(self.ready.set)
        finally:
            os.close(lock)

    @asynccontextmanager
    async def up(self) -> AsyncIterator[PlatformRecord]:
        """Up inside; then told to stop, as `snowdrop down` does."""
        before = open_fds()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.run)
            with anyio.fail_after(WAIT_S_MAX):
                await self.ready.wait()
            record = read_record(self.layout)
            assert record is not None
            yield record
            os.kill(os.getpid(), signal.SIGTERM)
        assert open_fds() == before

    async def record_after(self, old: PlatformRecord) -> PlatformRecord:
        with anyio.fail_after(WAIT_S_MAX):
            while (record := read_record(self.layout)) == old:
                await anyio.sleep(0.001)
        assert record is not None
        return record

    def notes(self) -> list[str]:
        return self.journal.read_text().splitlines()

    async def failure(self) -> Exception:
        """What `run` fails with, out of the groups of its tasks."""
        before = open_fds()
        with pytest.raises(ExceptionGroup) as raised:
            await self.run()
        assert not self.ready.is_set()
        assert open_fds() == before
        assert read_record(self.layout) is None
        error: Exception = raised.value
        while isinstance(error, ExceptionGroup):
            (error,) = error.exceptions
        return error


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SupervisorBench]:
    layout = StateLayout(tmp_path)
    layout.make()
    monkeypatch.setattr(local, "RESTART_S_FIRST", 0.001)
    monkeypatch.setattr(local, "STOP_MARGIN_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield SupervisorBench(layout, listener)


async def test_the_platforms_keys_are_in_the_environment_of_control_alone(
    bench: SupervisorBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, "the-key")
    monkeypatch.setenv("SNOWDROP_OTHER", "for all")
    seen = PROCESS + f"note(os.environ.get({KEYS_VARIABLE!r}, 'nothing') + ' ' + os.environ['SNOWDROP_OTHER'])\n"
    bench.programs = dict.fromkeys(bench.programs, seen + SERVE[len(PROCESS) :])
    async with bench.up():
        notes = bench.notes()
    assert "control the-key for all" in notes
    assert {"agent nothing for all", "gateway nothing for all"} <= set(notes)


async def test_control_is_up_before_the_others_and_stops_after_them(bench: SupervisorBench) -> None:
    async with bench.up() as record:
        assert set(record.pids) == {"control", "agent", "gateway"}
        assert record.supervisor_pid == os.getpid()
        assert record.gateway_url == f"http://127.0.0.1:{bench.listener.getsockname()[1]}"
        assert all(is_alive(pid) for pid in record.pids.values())
    notes = bench.notes()
    assert notes[0] == "control started"
    assert set(notes[1:3]) == {"agent started", "gateway started"}
    assert notes[3:] == ["gateway stopped", "agent stopped", "control stopped"]
    assert read_record(bench.layout) is None
    assert not bench.layout.platform.exists()
    assert not any(is_alive(pid) for pid in record.pids.values())


async def test_the_listening_socket_is_inherited(bench: SupervisorBench) -> None:
    bench.programs["gateway"] = USES_LISTENER
    async with bench.up():
        assert f"gateway {bench.listener.getsockname()[1]}" in bench.notes()


@pytest.mark.parametrize("name", ["control", "agent", "gateway"])
async def test_one_that_ends_before_it_is_ready_says_its_last_line(bench: SupervisorBench, name: str) -> None:
    bench.programs[name] = DIE
    error = await bench.failure()
    assert isinstance(error, PlatformDownError)
    assert error.message == f"{name} ended while it started: so I end"
    assert error.where == str(bench.layout.process_logs / f"{name}.log")
    started = {note.split()[0] for note in bench.notes()}
    assert name != "control" or started == {"control"}


async def test_one_that_says_nothing(bench: SupervisorBench) -> None:
    bench.programs["control"] = DIE_SILENT
    assert "it said nothing" in str(await bench.failure())


async def test_what_an_earlier_run_said_is_not_taken_for_the_reason(bench: SupervisorBench) -> None:
    (bench.layout.process_logs / "control.log").write_text("an old story\n")
    bench.programs["control"] = DIE_SILENT
    assert "it said nothing" in str(await bench.failure())


async def test_one_that_is_never_ready_is_given_up(
    bench: SupervisorBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "READY_S_MAX", 0.3)
    bench.programs["control"] = HANG
    error = await bench.failure()
    assert isinstance(error, TimedOutError)
    assert (error.message, error.where) == ("control was not ready in time", "ready_s_max=0.3")


async def test_a_program_that_cannot_be_run(bench: SupervisorBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "command", lambda _name, _fd: ["/nowhere/python"])
    error = await bench.failure()
    assert isinstance(error, PlatformDownError)
    assert "/nowhere/python" in str(error)


async def test_one_that_dies_is_started_again_alone(bench: SupervisorBench) -> None:
    async with bench.up() as before:
        os.kill(before.pids["agent"], signal.SIGKILL)
        after = await bench.record_after(before)
        assert is_alive(after.pids["agent"])
        assert after.pids["agent"] != before.pids["agent"]
        assert {name: after.pids[name] for name in ("control", "gateway")} == {
            name: before.pids[name] for name in ("control", "gateway")
        }
    assert bench.notes().count("agent started") == 2
    assert bench.notes()[-3:] == ["gateway stopped", "agent stopped", "control stopped"]


async def test_one_that_fails_to_start_again_is_tried_again(bench: SupervisorBench) -> None:
    async with bench.up() as before:
        bench.programs["agent"] = DIE
        os.kill(before.pids["agent"], signal.SIGKILL)
        with anyio.fail_after(WAIT_S_MAX):
            while bench.notes().count("agent started") < 3:
                await anyio.sleep(0.001)
        bench.programs["agent"] = SERVE
        with anyio.fail_after(WAIT_S_MAX):
            while not ((record := read_record(bench.layout)) and is_alive(record.pids["agent"])):
                await anyio.sleep(0.001)
    assert bench.notes()[-1] == "control stopped"


async def test_a_record_that_cannot_be_written_ends_nobody(
    bench: SupervisorBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = anyio.Event()

    def refuse(_path: Path, _data: bytes) -> int:
        refused.set()
        raise OSError(28, "No space left on device")

    async with bench.up() as before:
        with monkeypatch.context() as full:
            full.setattr(Path, "write_bytes", refuse)
            os.kill(before.pids["agent"], signal.SIGKILL)
            with anyio.fail_after(WAIT_S_MAX):
                await refused.wait()
        assert bench.notes().count("agent started") == 2
        assert is_alive(before.pids["control"])
    assert bench.notes()[-1] == "control stopped"


async def test_one_that_does_not_stop_is_killed(bench: SupervisorBench) -> None:
    bench.settings = Settings(gateway=GatewaySettings(shutdown_s_max=0.05), agent=AgentSettings())
    bench.programs["gateway"] = STUBBORN
    async with bench.up() as record:
        pass
    assert not is_alive(record.pids["gateway"])
    assert bench.notes()[-2:] == ["agent stopped", "control stopped"]


class TestRecord:
    def test_none_without_a_file_or_with_nonsense_in_it(self, bench: SupervisorBench) -> None:
        assert read_record(bench.layout) is None
        bench.layout.platform.write_text("{")
        assert read_record(bench.layout) is None

    def test_one_left_by_a_killed_supervisor_counts_for_nothing(self, bench: SupervisorBench) -> None:
        """Also when its process id belongs to somebody else by now: only the lock says who runs."""
        record = PlatformRecord(supervisor_pid=os.getpid(), gateway_url="http://x", pids={}, started_unix_ns=1)
        bench.layout.platform.write_bytes(msgspec.json.encode(record))
        assert read_record(bench.layout) is None

    def test_one_platform_per_state_folder(self, bench: SupervisorBench) -> None:
        lock = take_lock(bench.layout)
        assert lock is not None
        assert is_running(bench.layout)
        assert take_lock(bench.layout) is None
        os.close(lock)
        assert not is_running(bench.layout)


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in {"Z", "X"}


def test_a_process_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "LOG_BYTES_MAX", 4)
    path = tmp_path / "agent.log"
    path.write_text("short")
    local._rotate(path)
    assert not path.exists()
    assert (tmp_path / "agent.log.1").read_text() == "short"
    path.write_text("x")
    local._rotate(path)
    assert path.exists()

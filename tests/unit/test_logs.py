"""Replica logs: bounds, rotation, dropping, reading back and following."""

from __future__ import annotations

import os
from pathlib import Path

import anyio
import pytest

from snowdrop.agent.logs import (
    LineSplitter,
    LogFile,
    LogLimits,
    LogSink,
    RateGate,
    follow,
    parse_line,
    read,
    rotated,
)

pytestmark = pytest.mark.anyio


class _Clock:
    def __init__(self) -> None:
        self.s = 100.0
        self.slept = 0

    def monotonic_s(self) -> float:
        return self.s

    def now_ns(self) -> int:
        return int(self.s * 1e9)

    async def sleep(self, seconds: float) -> None:
        self.slept += 1
        self.s += seconds
        await anyio.lowlevel.checkpoint()


def _sink(path: Path, clock: _Clock, **limits: int) -> LogSink:
    return LogSink(
        path, LogLimits(**limits), now_ns=clock.now_ns, monotonic_s=clock.monotonic_s, sleep=clock.sleep
    )


async def _print(sink: LogSink, stdout: bytes, stderr: bytes = b"") -> None:
    """What a replica does: writes to its pipes and ends, while the sink reads."""

    def write(fd: int, data: bytes) -> None:
        while data:
            data = data[os.write(fd, data) :]

    async with anyio.create_task_group() as group:
        group.start_soon(sink.run)
        await anyio.to_thread.run_sync(write, sink.stdout_fd, stdout)
        await anyio.to_thread.run_sync(write, sink.stderr_fd, stderr)
        sink.close_writers()
    sink.close()


async def test_lines_keep_their_stream_and_time(tmp_path: Path) -> None:
    path = tmp_path / "log"
    await _print(_sink(path, _Clock()), b"one\r\n\nthree \xff\n", b"bad")
    lines = read(path)
    assert [line.text for line in lines if line.stream == "stdout"] == ["one", "", "three \ufffd"]
    assert [line.text for line in lines if line.stream == "stderr"] == ["bad"]
    assert {line.unix_ms for line in lines} == {100_000}


async def test_endless_output_is_bounded_on_disk_and_the_loss_is_told(tmp_path: Path) -> None:
    path, clock = tmp_path / "log", _Clock()
    printed = b"x" * 99 + b"\n"
    sink = _sink(path, clock, log_bytes_max=64 << 10, rate_bytes_s_max=1 << 10, burst_bytes_max=256 << 10)
    await _print(sink, printed * 20_000)
    kept = read(path)
    assert path.stat().st_size + rotated(path).stat().st_size <= (64 << 10) + 200
    assert clock.slept > 0
    assert any(line.stream == "snowdrop" and "dropped" in line.text for line in kept)


async def test_a_line_without_end_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "log"
    await _print(_sink(path, _Clock(), line_bytes_max=1000), b"y" * 2500)
    assert [len(line.text) for line in read(path)] == [1000, 1000, 500]


async def test_full_disk_drops_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, clock = tmp_path / "log", _Clock()
    sink = _sink(path, clock)
    full = True
    write = LogFile.write
    monkeypatch.setattr(LogFile, "write", lambda self, data: False if full else write(self, data))
    assert not sink.write("stdout", [b"lost"])
    full = False
    assert sink.write("stdout", [b"kept"])
    sink.close()
    assert [line.stream for line in read(path)] == ["snowdrop", "stdout"]


async def test_write_to_full_device_reports_failure(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full")
    file = LogFile(full, 1 << 20)
    assert not file.write(b"1 stdout x\n")
    file.close()


async def test_tail(tmp_path: Path) -> None:
    path = tmp_path / "log"
    await _print(_sink(path, _Clock()), b"a\nb\nc\n")
    assert [line.text for line in read(path, tail_lines=2)] == ["b", "c"]
    assert read(tmp_path / "none") == []


async def test_follow_survives_rotation(tmp_path: Path) -> None:
    path, clock = tmp_path / "log", _Clock()
    sink = _sink(path, clock, log_bytes_max=2048)
    script = iter(range(1, 300))
    done = False

    async def sleep(_: float) -> None:
        nonlocal done
        for _step in range(7):  # less than one file between two looks
            number = next(script, None)
            if number is None:
                done = True
                return
            sink.write("stdout", [str(number).encode()])

    seen = [int(line.text) async for line in follow(path, ended=lambda: done, sleep=sleep)]
    sink.close()
    assert seen == list(range(1, 300))
    assert rotated(path).exists()


async def test_follow_reads_what_came_between_last_look_and_rotation(tmp_path: Path) -> None:
    path = tmp_path / "log"
    file = LogFile(path, 100)
    file.write(b"1 stdout first\n")
    rounds = 0

    async def sleep(_: float) -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 1:
            file.write(b"1 stdout second\n")
            file.write(b"1 stdout " + b"z" * 40 + b"\n")

    seen = [line.text async for line in follow(path, ended=lambda: rounds > 1, sleep=sleep)]
    file.close()
    assert seen == ["first", "second", "z" * 40]


def test_rate_gate_refills_up_to_its_burst() -> None:
    gate = RateGate(10, 20, now_s=0.0)
    assert gate.take(20, 0.0)
    assert not gate.take(1, 0.05)
    assert gate.take(10, 1.0)
    assert not gate.take(21, 1000.0)
    assert gate.take(20, 1000.0)


def test_splitter_joins_what_came_in_pieces() -> None:
    splitter = LineSplitter(100)
    assert list(splitter.feed(b"ab")) == []
    assert list(splitter.feed(b"c\nd")) == [b"abc"]
    assert list(splitter.flush()) == [b"d"]
    assert list(splitter.flush()) == []


def test_a_line_of_another_form_is_kept_as_text() -> None:
    assert parse_line(b"no stamp\n").text == "no stamp"
    assert parse_line(b"no stamp\n").stream == "snowdrop"

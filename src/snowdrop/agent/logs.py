"""What replicas print: read from their pipes, kept in a bounded pair of files, read back and followed.

A line in a file is `<unix ms> <stream> <text>`. A full file becomes `<name>.1`, replacing the one before, so the
pair holds at most `log_bytes_max`. A replica that prints faster than its rate loses what is beyond it, and a
line of stream `snowdrop` says how much.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import anyio
import msgspec

from snowdrop.domain.secret import Redactor

LOG_BYTES_MAX = 8 << 20
LINE_BYTES_MAX = 16 << 10
RATE_BYTES_S_MAX = 1 << 20
BURST_BYTES_MAX = 4 << 20
READ_BYTES = 64 << 10
OVER_RATE_PAUSE_S = 0.02
"""How long nothing is read from a replica that is over its rate: bounds the time its output costs the agent."""
FOLLOW_POLL_S = 0.2
_LINE_OVERHEAD_BYTES = 32
OWN_STREAM = "snowdrop"

Sleep = Callable[[float], Awaitable[None]]


class LogLine(msgspec.Struct, frozen=True, kw_only=True):
    """One line. `stream` is stdout, stderr, or snowdrop for what the platform says of the log itself."""

    unix_ms: int
    stream: str
    text: str


class LogLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one replica's log."""

    log_bytes_max: int = LOG_BYTES_MAX
    line_bytes_max: int = LINE_BYTES_MAX
    rate_bytes_s_max: int = RATE_BYTES_S_MAX
    burst_bytes_max: int = BURST_BYTES_MAX


def rotated(path: Path) -> Path:
    """The older file of the pair."""
    return path.with_name(path.name + ".1")


class RateGate:
    """A token bucket over bytes. Times are monotonic seconds given by the caller."""

    def __init__(self, rate_bytes_s: int, burst_bytes: int, *, now_s: float) -> None:
        self._rate = rate_bytes_s
        self._burst = float(burst_bytes)
        self._tokens = float(burst_bytes)
        self._then_s = now_s

    def take(self, count: int, now_s: float) -> bool:
        """Whether `count` bytes may pass now; a refused call takes nothing."""
        self._tokens = min(self._burst, self._tokens + max(0.0, now_s - self._then_s) * self._rate)
        self._then_s = now_s
        if count > self._tokens:
            return False
        self._tokens -= count
        return True


class LineSplitter:
    """Bytes in, whole lines out; a line longer than the bound comes in pieces."""

    def __init__(self, line_bytes_max: int, redactor: Redactor | None = None) -> None:
        self._max = line_bytes_max
        self._rest = b""
        self._redactor = redactor or Redactor(())

    def feed(self, data: bytes) -> Iterator[bytes]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            yield from self._pieces(self._redactor.line(line))
        if len(self._rest) < self._max:
            return
        self._rest = self._redactor.line(self._rest)
        while len(self._rest) >= self._max:
            # A secret that is cut in two would be found in neither piece.
            end = self._redactor.safe_end(self._rest, self._max)
            if end == 0:
                return
            yield self._rest[:end]
            self._rest = self._rest[end:]

    def flush(self) -> Iterator[bytes]:
        """The last line, if it had no end."""
        if self._rest:
            yield from self._pieces(self._redactor.line(self._rest))
            self._rest = b""

    def _pieces(self, line: bytes) -> Iterator[bytes]:
        for start in range(0, max(1, len(line)), self._max):
            yield line[start : start + self._max]


class LogFile:
    """The pair of files, written to. A write that fails (a full disk) is counted, not raised."""

    def __init__(self, path: Path, log_bytes_max: int) -> None:
        self._path = path
        self._file_bytes_max = log_bytes_max // 2
        self._file: BinaryIO = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._size = self._file.tell()

    def write(self, data: bytes) -> bool:
        """Appends whole lines of at most half the bound together. False if the disk took none or not all."""
        try:
            if self._size + len(data) > self._file_bytes_max and self._size:
                self._rotate()
            written = self._file.write(data)
        except OSError:
            return False
        self._size += written
        return written == len(data)

    def close(self) -> None:
        self._file.close()

    def _rotate(self) -> None:
        self._path.replace(rotated(self._path))
        fresh = open(self._path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._file.close()
        self._file = fresh
        self._size = 0


class LogSink:
    """Takes what one replica prints. Hand `stdout_fd` and `stderr_fd` to a launcher, then `close_writers`.

    `run` ends when every process that holds the pipes is gone.
    """

    def __init__(
        self,
        path: Path,
        limits: LogLimits | None = None,
        *,
        redactor: Redactor | None = None,
        now_ns: Callable[[], int] = time.time_ns,
        monotonic_s: Callable[[], float] = time.monotonic,
        sleep: Sleep = anyio.sleep,
    ) -> None:
        self._limits = limits or LogLimits()
        self._redactor = redactor
        self._now_ns = now_ns
        self._monotonic_s = monotonic_s
        self._sleep = sleep
        self._file = LogFile(path, self._limits.log_bytes_max)
        rate = self._limits
        self._gate = RateGate(rate.rate_bytes_s_max, rate.burst_bytes_max, now_s=monotonic_s())
        self._dropped_bytes = 0
        self._readers: dict[str, int] = {}
        self._writers: dict[str, int] = {}
        for stream in ("stdout", "stderr"):
            reader, writer = os.pipe()
            os.set_blocking(reader, False)
            self._readers[stream], self._writers[stream] = reader, writer

    @property
    def stdout_fd(self) -> int:
        return self._writers["stdout"]

    @property
    def stderr_fd(self) -> int:
        return self._writers["stderr"]

    @property
    def dropped_bytes(self) -> int:
        """Bytes dropped and not yet reported by a line."""
        return self._dropped_bytes

    def close_writers(self) -> None:
        """Closes our copies of the pipes' write ends, so that their end can be seen."""
        while self._writers:
            os.close(self._writers.popitem()[1])

    async def run(self) -> None:
        """Reads both pipes until they end. Cancelling it leaves what was read in the files."""
        try:
            async with anyio.create_task_group() as group:
                for stream, fd in self._readers.items():
                    group.start_soon(self._read, stream, fd)
        finally:
            self._say_dropped(force=True)

    def write(self, stream: str, lines: list[bytes]) -> bool:
        """Appends lines under the rate. False if any was dropped."""
        if self._dropped_bytes:
            self._say_dropped()
        stamp = f"{self._now_ns() // 1_000_000} {stream} ".encode()
        passed, dropped = [], 0
        now_s = self._monotonic_s()
        for line in lines:
            if self._gate.take(len(line) + _LINE_OVERHEAD_BYTES, now_s):
                passed.append(stamp + _printable(line) + b"\n")
            else:
                dropped += len(line) + 1
        for chunk in _chunks(passed, self._limits.log_bytes_max // 2):
            if not self._file.write(chunk):
                dropped += len(chunk)
        self._dropped_bytes += dropped
        return dropped == 0

    def close(self) -> None:
        """Closes pipes and file. Idempotent; `run` must have ended."""
        self.close_writers()
        while self._readers:
            os.close(self._readers.popitem()[1])
        self._file.close()

    async def _read(self, stream: str, fd: int) -> None:
        splitter = LineSplitter(self._limits.line_bytes_max, self._redactor)
        try:
            while True:
                await anyio.wait_readable(fd)
                with suppress(BlockingIOError):
                    data = os.read(fd, READ_BYTES)
                    if not data:
                        return
                    if not self.write(stream, list(splitter.feed(data))):
                        await self._sleep(OVER_RATE_PAUSE_S)
        finally:
            self.write(stream, list(splitter.flush()))

    def _say_dropped(self, *, force: bool = False) -> None:
        if not self._dropped_bytes:
            return
        text = f"{self._dropped_bytes} bytes of output dropped: more than {self._limits.rate_bytes_s_max} bytes/s"
        line = f"{self._now_ns() // 1_000_000} {OWN_STREAM} {text}\n".encode()
        # The replica must be well under its rate again, or these lines themselves would be without end.
        room = self._gate.take(self._limits.burst_bytes_max // 4, self._monotonic_s())
        if (room or force) and self._file.write(line):
            self._dropped_bytes = 0


def read(path: Path, tail_lines: int | None = None) -> list[LogLine]:
    """The last `tail_lines` lines of the pair, or all; none if there is no log. Blocking."""
    kept: deque[LogLine] = deque(maxlen=tail_lines)
    for file in (rotated(path), path):
        with suppress(FileNotFoundError), open(file, "rb") as lines:
            kept.extend(parse_line(line) for line in lines if line.endswith(b"\n"))
    return list(kept)


async def follow(
    path: Path,
    *,
    tail_lines: int | None = 10,
    ended: Callable[[], bool] = lambda: False,
    poll_s: float = FOLLOW_POLL_S,
    sleep: Sleep = anyio.sleep,
) -> AsyncIterator[LogLine]:
    """The last lines, then each new one, across rotations, until `ended` and nothing is left to read.

    A reader slower than two whole files misses what lay between.
    """
    reader = _Follower(path)
    try:
        start: deque[LogLine] = deque(maxlen=tail_lines)
        start.extend(reader.take())
        for line in start:
            yield line
        while True:
            last = ended()  # asked before reading, so that what was written until then is seen
            fresh = reader.take()
            for line in fresh:
                yield line
            if last and not fresh:
                return
            if not fresh:
                await sleep(poll_s)
    finally:
        reader.close()


class _Follower:
    """An open file of the pair and how it is found again after a rotation."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._rest = b""

    def take(self) -> list[LogLine]:
        lines = []
        if self._file is None:
            self._open(rotated(self._path))
        while True:
            lines += self._read_open()
            following = self._next()
            if following is None:
                return lines
            lines += self._read_open()  # what came between the reading and the rotation
            if not self._open(following):
                return lines

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, path: Path) -> bool:
        try:
            fresh = open(path, "rb")  # noqa: SIM115 (closed by close)
        except FileNotFoundError:
            return False
        self.close()
        self._file, self._rest = fresh, b""
        return True

    def _next(self) -> Path | None:
        """The file that comes after the open one, None if the open one is the newest."""
        if self._file is None:
            return self._path if self._path.exists() else None
        ours = os.fstat(self._file.fileno()).st_ino
        if _inode(self._path) in (ours, None):
            return None
        # Ours was rotated. If it is not the older of the pair any more, that one comes next.
        return self._path if _inode(rotated(self._path)) == ours else rotated(self._path)

    def _read_open(self) -> list[LogLine]:
        if self._file is None:
            return []
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        return [parse_line(line) for line in lines]


def parse_line(line: bytes) -> LogLine:
    """A stored line; one of another form is kept as text of the platform's own stream."""
    stamp, _, rest = line.rstrip(b"\n").decode(errors="replace").partition(" ")
    stream, _, text = rest.partition(" ")
    if not stamp.isascii() or not stamp.isdigit():
        return LogLine(unix_ms=0, stream=OWN_STREAM, text=line.rstrip(b"\n").decode(errors="replace"))
    return LogLine(unix_ms=int(stamp), stream=stream, text=text)


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _printable(line: bytes) -> bytes:
    """The line as UTF-8 without carriage return at its end."""
    return line.rstrip(b"\r").decode(errors="replace").encode()


def _chunks(lines: list[bytes], bytes_max: int) -> Iterator[bytes]:
    """Lines joined into writes of at most `bytes_max`, a single longer line cut."""
    batch: list[bytes] = []
    size = 0
    for line in lines:
        cut = line if len(line) <= bytes_max else line[: bytes_max - 1] + b"\n"
        if size + len(cut) > bytes_max:
            yield b"".join(batch)
            batch, size = [], 0
        batch.append(cut)
        size += len(cut)
    if batch:
        yield b"".join(batch)

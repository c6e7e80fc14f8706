"""A contestant's process: started and ready before the clock runs, told to go, asked for what it measured.

Lines both ways: the process says {"ready": true}, or {"missing": REASON}; every line that it gets is answered by
one line of JSON.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from benchmarks.harness import PeerError

READY_S_MAX = 180.0
ANSWER_S_MAX = 900.0
END_S_MAX = 20.0


class Worker:
    """One process. Use it as a context manager: it is ended when the block ends."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        prefix: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        """Starts the process and waits until it is ready. Raises PeerError if it says that it cannot run."""
        self._process = subprocess.Popen(
            [*prefix, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **(env or {})},
            cwd=folder,
        )
        try:
            first = self._read(READY_S_MAX)
        except BaseException:
            self.close()
            raise
        if "missing" in first:
            self.close()
            raise PeerError(str(first["missing"]))

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, line: str = "go", *, answer_s_max: float = ANSWER_S_MAX) -> dict[str, Any]:
        """Sends a line and waits for the answer. Raises RuntimeError if the process ends instead."""
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()
        return self._read(answer_s_max)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(END_S_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _read(self, s_max: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        # A process that hangs is killed, which ends the read.
        guard = threading.Timer(s_max, self._process.kill)
        guard.start()
        try:
            line = self._process.stdout.readline()
        finally:
            guard.cancel()
        if not line:
            raise RuntimeError(f"{self._process.args!r} ended with {self._process.wait()} and no answer")
        if line == b"ready\n":
            return {"ready": True}
        answer: dict[str, Any] = msgspec.json.decode(line)
        if "error" in answer:
            raise RuntimeError(f"{self._process.args!r}: {answer['error']}")
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

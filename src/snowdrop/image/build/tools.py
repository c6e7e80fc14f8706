"""Programs that builds run: each with a bound, ended with all that it started, its failure a typed error."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence

from snowdrop.domain.errors import SnowdropError, TimedOutError

REAP_S_MAX = 5.0
SAID_BYTES_MAX = 4_000
"""Of what a failed program wrote, this much of its end is told."""


class ToolFailed(Exception):  # noqa: N818 (not an error of ours yet: the caller knows what it means)
    """Exit status and the end of what it wrote."""

    def __init__(self, code: int, said: str) -> None:
        super().__init__(said)
        self.code = code
        self.said = said


def run_tool(command: Sequence[str], *, bound: str, seconds_max: float, env: Mapping[str, str]) -> None:
    """Raises ToolFailed, TimedOutError naming `bound`, or SnowdropError if it cannot be started."""
    with tempfile.TemporaryFile() as output:  # not a pipe: what a grandchild keeps open must not hold us up
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **env},
            )
        except OSError as error:
            raise SnowdropError(f"{command[0]} cannot be started: {error}", where=command[0]) from error
        try:
            code = process.wait(seconds_max)
        except subprocess.TimeoutExpired:
            raise TimedOutError(
                f"{os.path.basename(command[0])} took longer than {seconds_max:g} s",  # noqa: PTH119
                where=f"{bound}={seconds_max:g}",
                next_step="run the build again: what was made is kept",
            ) from None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(REAP_S_MAX)
        if code != 0:
            size = output.seek(0, os.SEEK_END)
            output.seek(max(0, size - SAID_BYTES_MAX))
            raise ToolFailed(code, output.read().decode("utf-8", "replace").strip())

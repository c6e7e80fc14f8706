"""What user code raised, as a typed error: a short text and a place for the caller, the traceback for the log."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from snowdrop.domain.errors import SnowdropError, UserCodeError

MESSAGE_CHARS_MAX = 2_000

UserRaised = (Exception, SystemExit)
"""What a call into user code may raise that is its own fault. `exit()` in a service must not end the replica."""


def stage_error(error: BaseException, stage: str, code_directory: Path) -> SnowdropError:
    """A stage's failure for `ps` and the caller, with the user's own line. Prints the traceback to stderr."""
    log_traceback(error, f"{stage} failed")
    if isinstance(error, SnowdropError):
        return error
    return UserCodeError(
        describe(error),
        where=_place(error, code_directory),
        next_step=f"the traceback is in the logs (`snowdrop logs`); fix {stage} and deploy again",
    )


def request_error(error: BaseException, where: str, request_id: str) -> SnowdropError:
    """A request's failure for its client: no line of the service's code. Prints the traceback to stderr."""
    if isinstance(error, SnowdropError):
        return error
    log_traceback(error, f"{where} failed, request {request_id}")
    return UserCodeError(
        describe(error), where=where, next_step=f"the traceback is in the logs, beside request id {request_id}"
    )


def describe(error: BaseException) -> str:
    """`ValueError: text`, bounded."""
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    return text if len(text) <= MESSAGE_CHARS_MAX else text[:MESSAGE_CHARS_MAX] + "..."


def log_traceback(error: BaseException, headline: str) -> None:
    text = "".join(traceback.format_exception(error))
    print(f"{headline}\n{text}", end="", file=sys.stderr, flush=True)


def _place(error: BaseException, code_directory: Path) -> str:
    """`file.py:12 in load`: the innermost frame in the user's own code, else the innermost of all."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_short(error.filename, code_directory)}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(code_directory)]
    for frame in reversed(own or frames):
        return f"{_short(frame.filename, code_directory)}:{frame.lineno} in {frame.name}"
    return ""


def _short(filename: str, code_directory: Path) -> str:
    path = Path(filename)
    return str(path.relative_to(code_directory)) if path.is_relative_to(code_directory) else str(path)

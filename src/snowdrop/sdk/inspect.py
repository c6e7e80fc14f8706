"""What a service file declares, found in a process of its own: `python -m snowdrop.sdk.inspect FILE[:Class]`.

User code is never imported by the process that asks, which it could change, block or end.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import msgspec

from snowdrop.domain.errors import ErrorBody, SnowdropError, TimedOutError, UserCodeError, error_from_body
from snowdrop.domain.service import ServiceSpec
from snowdrop.sdk.load import check_file, load_service, split_target
from snowdrop.sdk.requirements import read_requirements

INSPECT_S_MAX = 120.0
REAP_S_MAX = 5.0
"""Longest wait for a killed inspection to be gone."""


class Inspected(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the process prints: one of the two."""

    spec: ServiceSpec | None = None
    error: ErrorBody | None = None


def describe_service(file: Path, class_name: str | None, *, inspect_s_max: float = INSPECT_S_MAX) -> ServiceSpec:
    """The spec of the service in `file`, schemas and requirements resolved; its code folder is the file's folder.

    Raises NotFoundError or InvalidInputError for what is wrong with the file or its declarations, UserCodeError
    for what importing it raised, TimedOutError if that takes longer than `inspect_s_max`.
    """
    path = check_file(file)
    target = f"{path}:{class_name}" if class_name else str(path)
    # -P keeps the caller's folder off the module path, -B keeps byte code out of the service's folder.
    command = [sys.executable, "-P", "-B", "-m", "snowdrop.sdk.inspect", target]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=path.parent,
        start_new_session=True,
    ) as process:
        try:
            output, diagnostics = process.communicate(timeout=inspect_s_max)
        except subprocess.TimeoutExpired as error:
            raise TimedOutError(
                f"importing {path.name} took longer than {inspect_s_max:g} s",
                where=f"inspect_s_max={inspect_s_max:g}",
                next_step="do slow work in a `@sd.startup` method, not while the module is imported",
            ) from error
        finally:
            if process.returncode is None:
                _kill_group(process)
    return _read(output, diagnostics, process.returncode, path)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that was not reaped yet, and what it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(REAP_S_MAX)


def _read(output: bytes, diagnostics: bytes, code: int, path: Path) -> ServiceSpec:
    try:
        found = msgspec.json.decode(output, type=Inspected)
    except msgspec.DecodeError as error:
        ended = f"signal {-code}" if code < 0 else f"exit status {code}"
        last = diagnostics.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise UserCodeError(
            f"importing {path.name} ended the process with {ended}" + (f": {last}" if last else ""),
            where=path.name,
            next_step=f"see what it does at import: python {path.name}",
        ) from error
    if found.error is not None:
        raise error_from_body(found.error)
    assert found.spec is not None, "an inspection gives a spec or an error"
    return found.spec


def inspect_target(target: str) -> Inspected:
    """Imports the service file in this process and describes it."""
    file, class_name = split_target(target)
    try:
        _, spec = load_service(file, class_name)
        requirements = read_requirements(spec.image.requirements, file.absolute().parent)
    except SnowdropError as error:
        return Inspected(error=error.body())
    image = msgspec.structs.replace(spec.image, requirements=requirements)
    return Inspected(spec=msgspec.structs.replace(spec, image=image))


def _claim_output() -> IO[bytes]:
    """The real standard output; user code's prints, Python's and C's, go nowhere instead of into the answer."""
    output = os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    return output


def main(arguments: list[str]) -> int:
    """Prints an Inspected as JSON; the exit status is 1 where it is an error."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m snowdrop.sdk.inspect FILE[:Class]\n")
        return 2
    with _claim_output() as output:
        found = inspect_target(arguments[0])
        output.write(msgspec.json.encode(found))
        output.flush()
    # Threads that user code left running must not keep the process alive.
    os._exit(0 if found.error is None else 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

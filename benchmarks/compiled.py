"""The small C programs in `peers/`: raw limits and the delay of shaped links, compiled when they are needed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SOURCES = Path(__file__).parent / "peers"
COMPILE_S_MAX = 60.0


class CompilerMissingError(Exception):
    """This machine has no C compiler, so that program cannot be made."""


def compiled(name: str, folder: Path) -> Path:
    """The program of `peers/NAME.c`, made in `folder`. Raises CompilerMissingError without cc or gcc."""
    program = folder / name
    if program.exists():
        return program
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise CompilerMissingError("no C compiler: apt-get install gcc libc6-dev")
    source = SOURCES / f"{name}.c"
    command = [compiler, "-O2", "-pthread", "-o", str(program), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_S_MAX, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{source.name} does not compile:\n{done.stderr}")
    return program

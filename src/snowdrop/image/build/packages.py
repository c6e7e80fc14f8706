"""Packages of an environment, by uv: requirements become pins with digests, pins become files.

Only wheels are taken: a source distribution would run its own code here, and give what depends on this machine.
Nothing of the base is run, so an environment can be made without its Python, and without root.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from uv import find_uv_bin

from snowdrop.domain.errors import InvalidInputError, SnowdropError, UnavailableError
from snowdrop.image.build.tools import ToolFailed, run_tool

ENV_FOLDER = "opt/snowdrop/env"
RESOLVE_S_MAX = 600.0
INSTALL_S_MAX = 3_600.0
LIBC = "manylinux_2_28"
"""What wheels may need of a base: glibc 2.28, which all distributions that are kept up have."""
_SCRIPT_HEAD = re.compile(rb"\A#!(?:[^\n]*python[^\n]*\n|/bin/sh\n'''exec' [^\n]*\n' '''\n)")
_CONSTANT_HEAD = b"#!/usr/bin/env python3\n"
_FAILED_RESOLUTION = 1
"""uv's exit status for requirements that cannot be met; others are of the way to the index."""


def resolve(
    requirements: Sequence[str],
    *,
    python: str,
    machine: str,
    index_url: str,
    before: str,
    work: Path,
    where: str,
) -> str:
    """Pins with digests, with the versions of the pins `before` where they still fit.

    Raises InvalidInputError if there is no solution, UnavailableError, TimedOutError.
    """
    wanted, pins = work / "requirements.in", work / "pins.txt"
    wanted.write_text("".join(f"{line}\n" for line in requirements), "utf-8")
    pins.write_text(before, "utf-8")
    options = ["--generate-hashes", "--no-header", "--no-annotate", "-o", str(pins), str(wanted)]
    _uv(["compile", *_common(python, machine, index_url), *options], "resolve_s_max", RESOLVE_S_MAX, where)
    return pins.read_text("utf-8")


def install(pins: str, *, python: str, machine: str, index_url: str, work: Path, where: str) -> Path:
    """A folder with the packages, the same for the same pins. Raises as `resolve`."""
    target, wanted = work / "env", work / "pins.txt"
    target.mkdir()
    wanted.write_text(pins, "utf-8")
    options = ["--require-hashes", "--no-deps", "--link-mode", "copy", "--target", str(target), "-r", str(wanted)]
    _uv(["install", *_common(python, machine, index_url), *options], "install_s_max", INSTALL_S_MAX, where)
    (target / ".lock").unlink(missing_ok=True)
    _settle_scripts(target)
    return target


def _common(python: str, machine: str, index_url: str) -> list[str]:
    index = ["--default-index", index_url] if index_url else []
    platform = f"{machine}-{LIBC}"
    return [
        *("--no-config", "--quiet", "--color", "never", "--only-binary", ":all:"),
        *("--python-version", python, "--python-platform", platform, *index),
    ]


def _uv(arguments: Iterable[str], bound: str, seconds_max: float, where: str) -> None:
    try:
        run_tool([find_uv_bin(), "pip", *arguments], bound=bound, seconds_max=seconds_max, env={})
    except FileNotFoundError as error:
        raise SnowdropError("uv is not installed here", where=where, next_step="pip install uv") from error
    except ToolFailed as error:
        if error.code == _FAILED_RESOLUTION:
            raise InvalidInputError(
                error.said,
                where=where,
                next_step="correct the requirements; only wheels are taken, so build one where there is none",
            ) from error
        raise UnavailableError(
            error.said, where=where, next_step="see that the package index can be reached, then build again"
        ) from error


def _settle_scripts(target: Path) -> None:
    """Scripts name the interpreter that installed them; in the image it is the one of the PATH."""
    changed: dict[str, tuple[str, str]] = {}
    for script in sorted((target / "bin").glob("*")):
        data = script.read_bytes()
        settled = _SCRIPT_HEAD.sub(_CONSTANT_HEAD, data, count=1)
        if settled != data:
            script.write_bytes(settled)
            digest = base64.urlsafe_b64encode(hashlib.sha256(settled).digest()).rstrip(b"=").decode()
            changed[f"bin/{script.name}"] = (f"sha256={digest}", str(len(settled)))
    for record in sorted(target.glob("*.dist-info/RECORD")):
        rows = list(csv.reader(io.StringIO(record.read_text("utf-8"))))
        if not any(row and row[0] in changed for row in rows):
            continue
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(
            [row[0], *changed[row[0]]] if row and row[0] in changed else row for row in rows
        )
        record.write_text(text.getvalue(), "utf-8")

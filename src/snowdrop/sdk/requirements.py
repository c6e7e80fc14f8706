"""Requirements files, read into requirement specifiers.

Nothing is installed from them here: they are held against an environment. So options that say where or how to
install (`--index-url`, `--pre`, `--hash`) are passed over; what would change which requirements there are, and
can't be checked by name and version (`-e`, `-c`, paths, URLs without a name), is refused.
"""

import re
import tomllib
from pathlib import Path

import msgspec
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from snowdrop.domain.errors import InvalidInputError

FILE_BYTES_MAX = 1 << 20
FILES_MAX = 16
REQUIREMENTS_MAX = 2_000

_NESTED = re.compile(r"^(?:-r|--requirement)[\s=]*(?P<path>\S.*)$")
_PYPROJECT = re.compile(r"^--pyproject (?P<path>.+?)(?:\[(?P<extras>[^\]]*)\])?$")
_COMMENT = re.compile(r"(?:^|\s)#.*$")
_PER_REQUIREMENT = re.compile(r"\s--(?:hash|config-settings|global-option)[\s=].*$")
_PASSED_OVER = (
    "-i", "--index-url", "--extra-index-url", "-f", "--find-links", "--no-index", "--trusted-host", "--pre",
    "--prefer-binary", "--only-binary", "--no-binary", "--require-hashes", "--use-feature",
)  # fmt: skip


def read_requirements(entries: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    """Specifiers, in order and without repeats; an entry `-r FILE` stands for the lines of FILE below `folder`,
    `--pyproject FILE[EXTRA,…]` for the dependencies of a project.

    Raises InvalidInputError naming file and line.
    """
    found: dict[str, None] = {}
    seen: list[Path] = []
    for entry in entries:
        project = _PYPROJECT.match(entry)
        lines = _of_project(folder / project["path"], project["extras"] or "") if project else [(entry, "Image")]
        for line, where in lines:
            if project and line.startswith("-"):
                _specifier(line, where)
            _read_line(line, folder, where, found, seen)
    return tuple(found)


def _read_line(line: str, folder: Path, where: str, found: dict[str, None], seen: list[Path]) -> None:
    nested = _NESTED.match(line)
    if nested:
        _read_file(folder / nested["path"], where, found, seen)
    elif not line.startswith("-"):
        found[_specifier(line, where)] = None
        if len(found) > REQUIREMENTS_MAX:
            raise InvalidInputError(
                "too many requirements",
                where=where,
                next_step=f"at most {REQUIREMENTS_MAX}, nested files included",
            )
    elif re.split(r"[\s=]", line, maxsplit=1)[0] not in _PASSED_OVER:
        raise InvalidInputError(
            f"the option `{line}` is not understood",
            where=where,
            next_step="list requirements by name and version, other files with `-r`",
        )


def _read_file(path: Path, where: str, found: dict[str, None], seen: list[Path]) -> None:
    resolved = path.resolve()
    if resolved in seen:
        return
    seen.append(resolved)
    if len(seen) > FILES_MAX:
        raise InvalidInputError("too many requirements files", where=where, next_step=f"at most {FILES_MAX}")
    for number, line in _logical_lines(_text(path, where)):
        _read_line(line, resolved.parent, f"{path.name}:{number}", found, seen)


class _Project(msgspec.Struct, rename="kebab"):
    dependencies: list[str] = []
    optional_dependencies: dict[str, list[str]] = {}
    dynamic: list[str] = []


class _Pyproject(msgspec.Struct):
    project: _Project


def _of_project(path: Path, extras: str) -> list[tuple[str, str]]:
    """(requirement, where it stands) of a project's dependencies and those of its `extras`."""
    try:
        project = msgspec.convert(tomllib.loads(_text(path, "Image")), _Pyproject).project
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise InvalidInputError(
            f"{path.name} describes no project: {error}", where=path.name, next_step="correct its table [project]"
        ) from error
    if {"dependencies", "optional-dependencies"} & set(project.dynamic):
        raise InvalidInputError(
            "its dependencies are dynamic: only its build would say them",
            where=path.name,
            next_step="list them in [project], or use a requirements file",
        )
    found = [(line, f"{path.name}: dependencies") for line in project.dependencies]
    known = {canonicalize_name(name): lines for name, lines in project.optional_dependencies.items()}
    for extra in filter(None, map(str.strip, extras.split(","))):
        lines = known.get(canonicalize_name(extra))
        if lines is None:
            raise InvalidInputError(
                f"there is no extra {extra!r}", where=path.name, next_step=f"it has: {', '.join(known) or 'none'}"
            )
        found += [(line, f"{path.name}: {extra}") for line in lines]
    return found


def _text(path: Path, where: str) -> str:
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise InvalidInputError(
                f"{path.name} is too large", where=where, next_step=f"at most {FILE_BYTES_MAX} B"
            )
        return path.read_text("utf-8-sig")
    except FileNotFoundError as error:
        raise InvalidInputError(
            f"there is no requirements file {path}",
            where=where,
            next_step="name it relative to the service's folder",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(
            f"{path} cannot be read: {error}", where=where, next_step="make it a readable UTF-8 text file"
        ) from error


def _logical_lines(text: str) -> list[tuple[int, str]]:
    """(number of its first line, text) of each line that says something, continuations joined, comments gone."""
    lines: list[tuple[int, str]] = []
    pending, start = "", 0
    for number, raw in enumerate([*text.splitlines(), ""], start=1):
        start = start if pending else number
        if raw.endswith("\\"):
            pending += raw[:-1] + " "
            continue
        line = _COMMENT.sub("", pending + raw).strip()
        pending = ""
        if line:
            lines.append((start, line))
    return lines


def _specifier(text: str, where: str) -> str:
    bare = _PER_REQUIREMENT.sub("", text).strip()
    try:
        return str(Requirement(bare))
    except InvalidRequirement as error:
        raise InvalidInputError(
            f"{bare!r} is no requirement: {str(error).splitlines()[0]}",
            where=where,
            next_step="write it as in `torch>=2.4`, or `name @ URL`",
        ) from error

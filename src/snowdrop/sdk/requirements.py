"""Requirements files, read into requirement specifiers.

Nothing is installed from them here: they are held against an environment. So options that say where or how to
install (`--index-url`, `--pre`, `--hash`) are passed over; what would change which requirements there are, and
can't be checked by name and version (`-e`, `-c`, paths, URLs without a name), is refused.
"""

import re
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from snowdrop.domain.errors import InvalidInputError

FILE_BYTES_MAX = 1 << 20
FILES_MAX = 16
REQUIREMENTS_MAX = 2_000

_NESTED = re.compile(r"^(?:-r|--requirement)[\s=]*(?P<path>\S.*)$")
_COMMENT = re.compile(r"(?:^|\s)#.*$")
_PER_REQUIREMENT = re.compile(r"\s--(?:hash|config-settings|global-option)[\s=].*$")
_PASSED_OVER = (
    "-i", "--index-url", "--extra-index-url", "-f", "--find-links", "--no-index", "--trusted-host", "--pre",
    "--prefer-binary", "--only-binary", "--no-binary", "--require-hashes", "--use-feature",
)  # fmt: skip


def read_requirements(entries: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    """Specifiers, in order and without repeats; an entry `-r FILE` stands for the lines of FILE below `folder`.

    Raises InvalidInputError naming file and line.
    """
    found: dict[str, None] = {}
    seen: list[Path] = []
    for entry in entries:
        _read_line(entry, folder, "Image", found, seen)
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
    try:
        if resolved.stat().st_size > FILE_BYTES_MAX:
            raise InvalidInputError(
                f"{path.name} is too large", where=where, next_step=f"at most {FILE_BYTES_MAX} B"
            )
        text = resolved.read_text("utf-8-sig")
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
    for number, line in _logical_lines(text):
        _read_line(line, resolved.parent, f"{path.name}:{number}", found, seen)


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
